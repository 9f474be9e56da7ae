"""Every format that is read and written: the same records in all of them, for people and for a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mgm_folders import GOLDEN, small
from tiny_runs import COLOURS, drawn

from graftwork.contracts import BadRecord, DataSource, Image, Processor, Record, Turn
from graftwork.data import read_bytes
from graftwork.errors import DataError
from graftwork_data_juicer_jsonl import DataJuicerJsonl
from graftwork_llava_json import LlavaJson
from graftwork_messages_jsonl import MessagesJsonl
from graftwork_tables import HfDataset, Parquet
from graftwork_webdataset import Webdataset

Source = type[DataSource[Any]]
NEEDS = {"parquet": "pyarrow", "hf-dataset": "datasets"}
FORMATS = (LlavaJson, MessagesJsonl, Parquet, HfDataset, Webdataset, DataJuicerJsonl)


@pytest.fixture(params=FORMATS, ids=[source.name for source in FORMATS])
def source(request: pytest.FixtureRequest) -> Source:
    """Each format, where its library is installed."""
    if package := NEEDS.get(request.param.name):
        pytest.importorskip(package)
    return request.param  # type: ignore[no-any-return]


def example(number: int) -> Record:
    """One of forty records that between them have everything that a record can hold."""
    count = (1, 0, 2, 1, 3)[number % 5]
    images = tuple(Image(data=drawn(number + place, COLOURS[place])) for place in range(count))
    places = "<image>\n" * min(count, 1) + "\u2028 and <image>" * max(count - 1, 0)
    turns = [
        Turn("user", f"{places} Größe {number}? 你好 🙂 "),
        Turn("assistant", f'"{number}"\n\n  is\tit. ', trained=(None, True, False)[number % 3]),
    ]
    if number % 4 == 1:
        turns[:0] = [Turn("system", "Be brief.\nBe\\nkind.")]
    if number % 7 == 3:
        turns += [
            Turn("user", "Sure?"),
            Turn("assistant", "Yes", trained=False),
            Turn("user", "So?"),
            Turn("assistant", "ok"),
        ]
    return Record(
        id=f"näme/{number}" if number % 6 else str(number),
        turns=tuple(turns),
        images=images,
        group="odd" if number % 2 else "",
        reference=("yes", "ja") if number % 8 == 0 else (),
        where=f"kit:{number} (record 7)",
        meta={"made_by": "kit", "of": ["a", "b"], "score": 0.1 * number, "deep": {"x": [None, True]}}
        if number % 9
        else {},
        weight=0.25 if number % 10 == 4 else 1.0,
        source=number % 2,
        unit="pair" if number in (5, 6) else "",
    )


EXAMPLES = [example(number) for number in range(40)]


def with_bytes(record: Record | BadRecord) -> Record:
    """The record with its images as bytes, wherever they lie."""
    assert isinstance(record, Record), record
    return replace(record, images=tuple(Image(data=read_bytes(image)) for image in record.images))


def read(source: Source, path: Path, **settings: Any) -> list[Record | BadRecord]:
    return list(source(source.Settings(path=path, **settings)).records())


def content_of(path: Path) -> dict[str, bytes]:
    """The bytes of all files below a path, or of the one there."""
    return {str(file.relative_to(path)): file.read_bytes() for file in [path, *path.rglob("*")] if file.is_file()}


def test_what_is_written_is_read_again_and_twice_the_same(source: Source, tmp_path: Path) -> None:
    first = source.write(iter(EXAMPLES), tmp_path / "first")
    found = read(source, first)
    assert [with_bytes(record) for record in found] == EXAMPLES
    assert all(file.is_file() for file in source(source.Settings(path=first)).files() or ())
    second = source.write(found, tmp_path / "second")  # type: ignore[arg-type]
    assert content_of(tmp_path / "first") == content_of(tmp_path / "second")
    assert [with_bytes(record) for record in read(source, second, limit=3)] == EXAMPLES[:3]
    assert {record.group for record in read(source, first, group="all") if isinstance(record, Record)} == {"all"}


def test_a_model_sees_the_same_in_every_format(source: Source, processor: Processor, tmp_path: Path) -> None:
    def seen(record: Record) -> Any:
        try:
            encoded = processor.encode(record)
        except DataError as error:
            return error.sentence
        return encoded

    taken = 0
    for wanted, found in zip(EXAMPLES, read(source, source.write(EXAMPLES, tmp_path)), strict=True):
        assert isinstance(found, Record)
        one, other = seen(wanted), seen(found)
        if isinstance(one, str):
            assert other == one
            continue
        taken += 1
        assert [*one.input_ids, *one.labels] == [*other.input_ids, *other.labels]
        assert one.pixels.keys() == other.pixels.keys()
        assert all(torch.equal(one.pixels[part], other.pixels[part]) for part in one.pixels)
    assert taken >= 10


@pytest.fixture(scope="module")
def processor() -> Processor:
    """A small model's processor."""
    return small(GOLDEN / "full").processor  # type: ignore[return-value]


def test_an_image_that_cannot_be_read_is_not_written(source: Source, tmp_path: Path) -> None:
    turns = (Turn("user", "<image>?"), Turn("assistant", "A"))
    lost = Record("a", turns, (Image(tmp_path / "lost.png"),))
    with pytest.raises(DataError, match=r"the image '.*lost.png' cannot be read \(.*\); replace it or leave it out"):
        source.write([lost], tmp_path / "out")
    with pytest.raises(DataError, match="the image '0 bytes of image data' is empty; replace it or leave it out"):
        source.write([replace(lost, images=(Image(data=b""),))], tmp_path / "out")


def test_no_records_are_an_empty_data_set(source: Source, tmp_path: Path) -> None:
    assert read(source, source.write([], tmp_path)) == []
