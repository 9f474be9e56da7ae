"""A run that goes on knows the data that it began with: what differs is named, refused, or accepted and written down."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from tiny_runs import Interrupted, interrupt_at, plan_of

from graftwork.checkpoint import manifest
from graftwork.contracts import CheckpointSaved, DictLookup, Image, Plan, Record, RunContext, RunStarted, Turn
from graftwork.contracts.plan import Choice
from graftwork.data import measuring
from graftwork.data.digest import DataDigest, digest_of
from graftwork.data.measuring import measure
from graftwork.errors import CheckpointError
from graftwork.train.loop import Outcome, train

COLOURS = ("red", "blue", "green", "black")
STATE = "optimizer/state.safetensors"


def record(number: int, answer: str = "", question: str = "what colour?", image: bytes | None = None) -> Record:
    turns = (Turn("user", f"<image>\n{question}"), Turn("assistant", answer or COLOURS[number % 4]))
    return Record(f"r{number}", turns, (Image(data=image or bytes([number])),))


RECORDS = [record(number) for number in range(24)]


class Counting:
    """A processor that counts ten tokens and the letters of the answer, but for one record."""

    def __init__(self, other: Mapping[str, int]) -> None:
        self.other = other

    def length(self, record: Record) -> int:
        return self.other.get(record.id, 10 + len(record.turns[-1].text))


def digest(records: Sequence[Record], context: RunContext | None = None, **lengths: int) -> DataDigest:
    """The digest of records as a run computes it; `lengths` are those of single records."""
    files = [
        [image.path.stat().st_size, 0] for one in records for image in one.images if image.path and image.path.exists()
    ]
    known = measure(records, Counting(lengths), numpy.array(files, dtype=numpy.int64).reshape(-1, 2))
    return digest_of(
        records,
        known.fields,
        known.lengths,
        context or RunContext(seed=1),
        by_content=known.by_content,
        sources=known.sources,
        validation=known.fields[:0],
    )


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (RECORDS, []),
        (RECORDS[:17], ["24 records then, 17 now", "7 records of then are gone"]),
        ([*RECORDS, record(24)], ["24 records then, 25 now", "1 record is new ('r24')"]),
        ([*RECORDS[1:], record(30)], ["1 record of then is gone", "1 record is new ('r30')"]),
        ([record(n, "teal") for n in range(24)], ["the answers of 24 records are others ('r0', 'r1', 'r2', …)"]),
        ([*RECORDS[:5], record(5, question="why?"), *RECORDS[6:]], ["the questions of 1 record are others ('r5')"]),
        (
            [record(0, image=b"x"), record(1, image=b"y"), *RECORDS[2:]],
            ["the images of 2 records are others ('r0', 'r1')"],
        ),
        (RECORDS[::-1], ["the records are in another order"]),
        ([replace(RECORDS[0], images=()), *RECORDS[1:]], ["the images of 1 record are others ('r0')"]),
        ([replace(RECORDS[0], where="elsewhere:1", group="of its own"), *RECORDS[1:]], []),
    ],
    ids=["same", "fewer", "more", "exchanged", "relabelled", "asked", "redrawn", "reversed", "blind", "moved"],
)
def test_what_differs_is_said(now: Sequence[Record], said: list[str]) -> None:
    assert digest(now).differences(digest(RECORDS).tensors()) == said


def test_other_lengths_of_the_same_texts_are_the_tokenizers() -> None:
    then, now = digest(RECORDS), digest(RECORDS, r23=8)
    assert now.differences(then.tensors()) == ["the lengths in tokens of 1 record are others ('r23')"]
    assert now.recorded()["lengths"] != then.recorded()["lengths"]
    assert now.recorded()["answers"] == then.recorded()["answers"]


def test_images_in_files_count_by_content_and_many_large_ones_by_size_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "one.png"
    file.write_bytes(b"red")
    records = [replace(RECORDS[0], images=(Image(file),)), *RECORDS[1:]]
    then = digest(records)
    moved = file.rename(tmp_path / "two.png")
    os.utime(moved, (0, 0))
    there = [replace(RECORDS[0], images=(Image(moved),)), *RECORDS[1:]]
    assert digest(there).differences(then.tensors()) == []
    moved.write_bytes(b"tan")
    assert digest(there).differences(then.tensors()) == ["the images of 1 record are others ('r0')"]
    monkeypatch.setattr(measuring, "LARGE", 2)
    by_time = digest(there)
    assert (by_time.by_content, by_time.recorded()["images_by"]) == (False, "size and time")
    assert digest(there).differences(by_time.tensors()) == []
    os.utime(moved, (0, 0))
    assert digest(there).differences(by_time.tensors()) == ["the images of 1 record are others ('r0')"]
    by_content = digest(there).with_images(by_content=True)
    assert by_content.differences(then.tensors()) == ["the images of 1 record are others ('r0')"]
    moved.unlink()
    assert digest(there).by_content


def test_the_files_of_sources_are_known_whatever_becomes_of_their_records(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[1]")

    def now() -> DataDigest:
        settings = {"path": str(tmp_path / "data.json"), "image_folder": str(tmp_path), "limit": None, "group": "a\0b"}
        context = RunContext(seed=1, sources=[Choice("data_source", "llava-json", "p", "d", "0", settings)])
        return digest(RECORDS, context)

    then = now().recorded()["files"]
    assert then.keys() == {"data.source.0.path"}
    (tmp_path / "data.json").write_text("[1, 2]")
    assert now().changed_files(then) == ["data.source.0.path: 6 bytes now, and 3 then"]


# In a run --------------------------------------------------------------------------------------------------------------


def write(folder: Path, count: int = 8, answers: Sequence[str] = COLOURS) -> None:
    """The data file of a run, with so many records of coloured squares."""
    (folder / "pics").mkdir(exist_ok=True)
    records = []
    for number in range(count):
        PILImage.new("RGB", (20 + number, 20), COLOURS[number % 4]).save(folder / "pics" / f"{number}.png")
        turns = [("human", "<image>\nwhat colour?"), ("gpt", answers[number % len(answers)])]
        told = [{"from": role, "value": text} for role, text in turns]
        records.append({"id": str(number), "image": f"pics/{number}.png", "conversations": told})
    (folder / "data.json").write_text(json.dumps(records))


@pytest.fixture(scope="module")
def begun(base: Path, lookup: DictLookup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data file, and in `out` a run on it that was killed after its second step."""
    folder = tmp_path_factory.mktemp("begun")
    write(folder)
    with pytest.raises(Interrupted):
        train(plan_in(folder, base), lookup, folder / "out", device="cpu", listen=interrupt_at(CheckpointSaved, 2))
    return folder


def plan_in(folder: Path, base: Path, **changes: Any) -> Plan:
    source = [{"use": "llava-json", "path": str(folder / "data.json")}]
    return plan_of(base, folder, {"data.source": source, "train.save_every": 2} | changes)


def resumed(begun: Path, base: Path, lookup: DictLookup, out: Path, **options: Any) -> Outcome:
    return train(plan_in(begun, base), lookup, out, resume=True, device="cpu", **options)


def test_the_same_data_in_another_folder_is_the_same(
    begun: Path, base: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(begun, tmp_path / "moved"))
    write(moved)
    assert resumed(moved, base, lookup, moved / "out").checkpoint == moved / "out" / "checkpoint-4"


def test_a_run_counted_in_epochs_ends_when_the_accepted_data_asks_for_fewer_steps(
    base: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    write(tmp_path)
    plan = plan_in(tmp_path, base, **{"train.steps": None, "train.epochs": 1})
    with pytest.raises(Interrupted):
        train(plan, lookup, tmp_path / "out", device="cpu", listen=interrupt_at(CheckpointSaved, 2))
    write(tmp_path, count=4)
    outcome = train(plan, lookup, tmp_path / "out", resume=True, accept_data=True, device="cpu")
    assert outcome.checkpoint == tmp_path / "out" / "checkpoint-2"


def test_a_run_goes_on_with_other_data_only_when_told_so_and_its_checkpoints_say_from_when(
    begun: Path, base: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(begun / "out", tmp_path / "out"))
    write(begun, count=6, answers=("teal",))
    with pytest.raises(CheckpointError) as caught:
        resumed(begun, base, lookup, out)
    sentence, then = caught.value.sentence, manifest.read(out / "checkpoint-2").data["digest"]["files"]
    assert sentence.startswith(
        f"'{out}/checkpoint-2' was trained on other data than is read now: 8 records then, 6 now; "
    )
    assert sentence.endswith("or go on with this data by --accept-data")
    size = then["data.source.0.path"]["bytes"]
    assert caught.value.details == (
        "2 records of then are gone",
        "the answers of 6 records are others ('0', '1', '2', …)",
        f"data.source.0.path: {(begun / 'data.json').stat().st_size:,} bytes now, and {size:,} then",
    )
    told: list[Any] = []
    outcome = resumed(begun, base, lookup, out, accept_data=True, listen=told.append)
    (started,) = (event for event in told if isinstance(event, RunStarted))
    assert started.warnings[0].startswith("the run goes on with other data from step 3: 8 records then, 6 now; ")
    data = manifest.read(outcome.checkpoint).data
    assert [(one["after_step"], one["differences"][0]) for one in data["accepted"]] == [(2, "8 records then, 6 now")]
    assert data["digest"]["records"] == data["records"] == 6
    again = resumed(begun, base, lookup, out)
    assert again.checkpoint == outcome.checkpoint
    write(begun)
    with pytest.raises(CheckpointError, match="6 records then, 8 now"):
        resumed(begun, base, lookup, out)


def test_a_checkpoint_that_does_not_record_its_data_goes_on_and_that_is_said(
    begun: Path, base: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(begun / "out", tmp_path / "out")) / "checkpoint-2"
    tensors = {name: tensor for name, tensor in load_file(folder / STATE).items() if not name.startswith("data/")}
    save_file(tensors, folder / STATE)
    read = manifest.read(folder)
    old = {key: value for key, value in read.data.items() if key not in ("digest", "accepted")}
    (folder / manifest.FILE).unlink()
    manifest.write(replace(read, data=old, files=manifest.describe_files(folder)), folder)
    write(begun)
    told: list[Any] = []
    outcome = resumed(begun, base, lookup, tmp_path / "out", listen=told.append)
    assert told[0].warnings == (
        f"'{folder}' does not record its data, as its Graftwork was older: that it goes on with the same cannot be verified",
    )
    assert manifest.read(outcome.checkpoint).data["digest"]["records"] == 8
