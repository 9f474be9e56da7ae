"""Records on disk: the same ones come back, ids stay distinct, what was computed once is kept, and changes are seen."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage
from tiny_runs import COMPONENTS, PlanOf

from graftwork.build import compose
from graftwork.contracts import (
    BadRecord,
    DataOperator,
    DataSource,
    DictLookup,
    Image,
    NoSettings,
    Record,
    Turn,
    setting,
)
from graftwork.data import cache, load_image
from graftwork.data.pipeline import read_records
from graftwork.data.store import RecordStore, RecordWriter
from graftwork.data.training_data import load_training_data
from graftwork.errors import DataError
from graftwork.processes import cache_folder

TURNS = (Turn("user", "<image>\nwhat? \u2028 ü"), Turn("assistant", "a\nb", True))


def png(colour: str) -> bytes:
    """A small image as bytes."""
    from io import BytesIO

    stream = BytesIO()
    PILImage.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


def stored(folder: Path, records: Sequence[Record]) -> RecordStore:
    with RecordWriter(folder / "records", folder) as to:
        for record in records:
            to.add(record)
        to.finish()
    return RecordStore(folder / "records", folder)


def test_every_field_of_a_record_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a b\nc.png"
    path.write_bytes(png("red"))
    records = [
        Record(
            "1",
            (Turn("system", "Be brief."), *TURNS),
            (Image(path), Image(path, span=(3, 4))),
            group="colour",
            reference=("red", "RED"),
            where="data.json:1",
            meta={"made_by": "maker", "of": ["0"], "score": 0.5},
            weight=0.25,
            source=3,
            unit="whole",
        ),
        Record("2", TURNS),
    ]
    store = stored(tmp_path, records)
    assert [*store] == records == [store[0], store[1]] == store[:] and store[-1] == records[1]
    with pytest.raises(IndexError):
        store[2]


def test_images_that_come_as_bytes_are_kept_once_and_named_by_their_size(tmp_path: Path) -> None:
    red, blue = png("red"), png("blue")
    store = stored(tmp_path, [Record(str(n), TURNS, (Image(data=data),)) for n, data in enumerate([red, blue, red])])
    assert (tmp_path / "images.bin").stat().st_size == len(red) + len(blue)
    assert [load_image(record.images[0]).getpixel((0, 0)) for record in store] == [
        (255, 0, 0),
        (0, 0, 255),
        (255, 0, 0),
    ]
    assert str(store[0].images[0]) == f"{len(red)} bytes of image data"
    copied = stored(tmp_path / "again", [])
    assert len(copied) == 0


@pytest.mark.parametrize("meta", [{"x": {1, 2}}, {"x": float("nan")}, {"x": "\ud800"}])
def test_what_no_file_can_hold_is_a_bad_record(tmp_path: Path, meta: dict[str, Any]) -> None:
    result = read_records([Listed([Record("1", TURNS), Record("2", TURNS, meta=meta)])], [], seed=0, strict=False)
    assert [record.id for record in result.records] == ["1"]
    (bad,) = result.bad
    assert bad.id == "2" and "cannot be written as JSON" in bad.why


class Listed(DataSource[NoSettings]):
    """Yields given records."""

    name = "listed"

    def __init__(self, items: Sequence[Any]) -> None:
        super().__init__(NoSettings())
        self.items = items

    def records(self) -> Iterator[Record | BadRecord]:
        yield from self.items


class Maker(DataOperator[NoSettings]):
    """Drops one, changes one, makes one of each other, and loses one."""

    name = "maker"

    def apply(self, records: Any, *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
        for record in records:
            if record.id == "drop":
                yield BadRecord.of(record, "3 words", words=3)
            elif record.id == "change":
                yield replace(record, turns=(record.turns[0], Turn("assistant", "other")))
            elif record.id != "lose":
                yield record
                yield replace(record, id=f"{record.id}-made", meta={"made_by": self.name, "of": [record.id]})


def test_a_stage_balances_whatever_it_does() -> None:
    items = [Record(id, TURNS, where=f"file:{id}") for id in ("keep", "drop", "change", "lose")]
    result = read_records([Listed(items)], [Maker(NoSettings())], seed=0, strict=False)
    stage = result.stages[-1]
    assert (stage.read, stage.made, stage.kept, stage.dropped) == (4, 1, 3, 2)
    assert [record.id for record in result.records] == ["keep", "keep-made", "change"]
    assert [(bad.id, bad.stats) for bad in result.bad] == [("drop", {"words": 3}), ("lose", {})]


def test_an_operator_that_keeps_what_it_drops_is_named() -> None:
    class Both(Maker):
        def apply(self, records: Any, *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
            for record in records:
                yield record
                yield BadRecord.of(record, "too")

    with pytest.raises(DataError, match="'maker' kept or dropped a record twice"):
        read_records([Listed([Record("1", TURNS)])], [Both(NoSettings())], seed=0, strict=False)


def test_stages_that_are_complete_are_not_done_again(tmp_path: Path) -> None:
    class Once(Maker):
        calls = 0

        def apply(self, records: Any, *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
            Once.calls += 1
            if Once.calls == 1:
                raise DataError("interrupted")
            yield from records

    class Reading(Listed):
        calls = 0

        def records(self) -> Iterator[Record | BadRecord]:
            Reading.calls += 1
            return super().records()

    source = Reading([Record("1", TURNS)])
    with pytest.raises(DataError, match="interrupted"):
        read_records([source], [Once(NoSettings())], seed=0, strict=False, folder=tmp_path)
    for _ in range(2):
        result = read_records([source], [Once(NoSettings())], seed=0, strict=False, folder=tmp_path)
    assert (Reading.calls, Once.calls, len(result.records)) == (1, 2, 1)


# What is kept for the next run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileSettings:
    path: Path | None = setting(None, "The file")


class InFile(DataSource[FileSettings]):
    """Reads one record a line, each with an image of its own, and counts how often."""

    name = "in-file"
    Settings = FileSettings
    readings = 0

    def records(self) -> Iterator[Record | BadRecord]:
        assert self.settings.path
        InFile.readings += 1
        for number, line in enumerate(self.settings.path.read_text().splitlines()):
            turns = (Turn("user", f"<image>\nwhat is {number}?"), Turn("assistant", line))
            yield Record(str(number), turns, (Image(self.settings.path.parent / f"{number}.png"),))

    def files(self) -> Sequence[Path] | None:
        return [self.settings.path] if self.settings.path else None


def test_data_is_read_and_measured_once_until_it_or_the_run_changes(run: PlanOf, tmp_path: Path) -> None:
    own, file = DictLookup(*COMPONENTS, InFile), tmp_path / "data.txt"
    file.write_text("red\nblue\ngreen\n")
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png("red"))
    plan = run({"data.source": [{"use": "in-file", "path": str(file)}]}, own)
    processor = compose.build_shape(plan, own).processor

    def loaded() -> tuple[list[str], int]:
        data = load_training_data(plan, own, processor)
        return [record.turns[1].text for record in data.records], InFile.readings

    InFile.readings = 0
    assert loaded() == (["red", "blue", "green"], 1)
    assert loaded() == (["red", "blue", "green"], 1)
    os.utime(tmp_path / "1.png", (1, 1))  # An image was changed, or may have been.
    assert loaded()[1] == 2
    file.write_text("red\nblue\n")
    assert loaded() == (["red", "blue"], 3)
    fields = load_training_data(plan, own, processor).measured.fields
    (tmp_path / "0.png").write_bytes(png("blue"))
    assert (load_training_data(plan, own, processor).measured.fields != fields).sum() == 1


def test_where_nothing_can_be_kept_a_run_reads_for_itself(
    run: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "file"))
    plan = run(
        {"data.source": [{"use": "in-file", "path": str(tmp_path / "data.txt")}]},
        own := DictLookup(*COMPONENTS, InFile),
    )
    (tmp_path / "data.txt").write_text("red\n")
    (tmp_path / "0.png").write_bytes(png("red"))
    assert len(load_training_data(plan, own, compose.build_shape(plan, own).processor).records) == 1


def test_hashes_are_computed_anew_when_a_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    (first,) = cache.known_hashes([file]).values()
    assert cache.known_hashes([file]) == {str(file): first}
    file.write_text("two")
    assert cache.known_hashes([file]) != {str(file): first}
    known = json.loads((cache_folder() / "hashes.json").read_text())
    assert str(file) in known


def test_a_user_without_a_home_has_no_cache_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "file").write_text("content")
    with_cache = cache.known_hashes([file])

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in ("GRAFTWORK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache.known_hashes([file]) == with_cache
    with pytest.raises(OSError):
        cache.entry("key", lambda folder: None)


def test_what_was_not_used_for_long_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))

    def make(folder: Path) -> None:
        (folder / "x").write_text("x")

    old = cache.entry("old", make)
    assert cache.entry("old", lambda folder: pytest.fail("it is there")) == old
    os.utime(old, (1, 1))
    new = cache.entry("new", make)
    assert new.is_dir() and not old.exists()
    assert [each.name for each in new.parent.iterdir()] == ["new"]


def test_a_missing_image_that_is_put_back_is_found(run: PlanOf, tmp_path: Path) -> None:
    own, file = DictLookup(*COMPONENTS), tmp_path / "data.json"
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "it"}]
    file.write_text(json.dumps([{"id": name, "image": f"{name}.png", "conversations": talk} for name in ("a", "b")]))
    (tmp_path / "a.png").write_bytes(png("red"))
    plan = run({"data.source": [{"use": "llava-json", "path": str(file)}]}, own)
    processor = compose.build_shape(plan, own).processor
    assert [len(load_training_data(plan, own, processor).records) for _ in range(2)] == [1, 1]
    (tmp_path / "b.png").write_bytes(png("blue"))
    assert len(load_training_data(plan, own, processor).records) == 2


def test_what_is_kept_and_damaged_is_made_anew(run: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data.txt").write_text("red\n")
    (tmp_path / "0.png").write_bytes(png("red"))
    own = DictLookup(*COMPONENTS, InFile)
    plan = run({"data.source": [{"use": "in-file", "path": str(tmp_path / "data.txt")}]}, own)
    processor = compose.build_shape(plan, own).processor
    for name in ("measured.npz", "image-states.npy"):
        load_training_data(plan, own, processor)
        (damaged,) = (tmp_path / "cache").rglob(name)
        damaged.write_bytes(damaged.read_bytes()[:20])
        assert len(load_training_data(plan, own, processor).records) == 1


def test_numbers_and_texts_that_json_cannot_hold_are_written_as_texts() -> None:
    class Odd(Maker):
        def apply(self, records: Any, *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
            for record in records:
                if record.id == "1":
                    yield record
                else:
                    yield BadRecord.of(
                        replace(record, where="caf\udce9"), "odd", score=float("nan"), more=[1, {2: Path("x")}]
                    )

    result = read_records([Listed([Record("1", TURNS), Record("2", TURNS)])], [Odd(NoSettings())], seed=0, strict=False)
    (bad,) = result.bad
    assert (bad.where, bad.stats) == ("caf\\udce9", {"score": "nan", "more": [1, {"2": "x"}]})
