"""The cleaning operators: what each drops, and the reason that it gives."""

from __future__ import annotations

import gc
import pathlib
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image as PILImage

from graftwork.contracts import BadRecord, DataOperator, Image, NoSettings, Record, Turn
from graftwork.data import HashTable, TextFile, plain
from graftwork.errors import DataError
from graftwork_cleaning import DeduplicateImages, DropBrokenImages, LimitLength, LimitLengthSettings
from graftwork_duplicates import (
    DuplicateQuestions,
    DuplicateQuestionsSettings,
    Leaks,
    LeaksSettings,
    NearDuplicateImages,
    NearSettings,
)
from graftwork_selection import Balance, BalanceSettings, Sample, SampleSettings


def record(id: str, *paths: Path, question: str = "What?", answer: str = "A cat.", where: str = "") -> Record:
    turns = (Turn("user", question), Turn("assistant", answer))
    return Record(id, turns, tuple(Image(path) for path in paths), where=where)


def kept(items: list[Record | BadRecord]) -> list[str]:
    return [item.id for item in items if isinstance(item, Record)]


def test_records_with_broken_images_are_dropped(tmp_path: Path) -> None:
    good, broken = tmp_path / "good.png", tmp_path / "broken.png"
    PILImage.effect_noise((64, 64), 50).save(good)
    broken.write_bytes(good.read_bytes()[:1000])
    records = [
        record("1", good),
        record("2", broken, where="file:2"),
        record("3"),
        record("4", tmp_path / "none.png"),
        record("5", broken),
    ]
    items = list(DropBrokenImages(NoSettings()).apply(records, seed=0))
    assert kept(items) == ["1", "3"]
    bad = [item for item in items if isinstance(item, BadRecord)]
    assert [item.where for item in bad] == ["file:2", "record '4'", "record '5'"]
    assert bad[0].why.startswith(f"'{broken}' cannot be read (")
    assert bad[1].why == f"the image '{tmp_path / 'none.png'}' does not exist"
    assert bad[2].why == bad[0].why


def test_duplicate_images_are_dropped_but_not_the_records_of_one_image(tmp_path: Path) -> None:
    red, copy, blue = tmp_path / "red.png", tmp_path / "copy.bmp", tmp_path / "blue.png"
    PILImage.new("RGB", (4, 4), "red").save(red)
    PILImage.new("RGB", (4, 4), "red").save(copy)
    PILImage.new("RGB", (4, 4), "blue").save(blue)
    records = [
        record("1", red),
        record("2", copy),
        record("3", blue),
        record("4", red),
        record("5"),
        record("6"),
        record("7", tmp_path / "none.png"),
    ]
    items = list(DeduplicateImages(NoSettings()).apply(records, seed=0))
    assert kept(items) == ["1", "3", "4", "5", "6"]
    assert items[1] == BadRecord.of(records[1], f"'{copy}' has the same pixels as '{red}'")
    assert items[6] == BadRecord.of(records[6], f"the image '{tmp_path / 'none.png'}' does not exist")


def test_records_are_limited_by_their_words() -> None:
    records = [
        record("short", question="<image>\nWhat?", answer="Cats."),
        record("right", question="<image>Which one?", answer="A cat."),
        record("long", question="What is it?", answer="A cat."),
    ]
    items = list(LimitLength(LimitLengthSettings(min_words=3, max_words=4)).apply(records, seed=0))
    assert items == [
        BadRecord.of(records[0], "2 words, fewer than 3", words=2),
        records[1],
        BadRecord.of(records[2], "5 words, more than 4", words=5),
    ]
    assert list(LimitLength(LimitLengthSettings()).apply(records, seed=0)) == records


@pytest.mark.parametrize(("most", "count"), [(None, 0), (3, 0), (2, 1)])
def test_limits_that_keep_nothing_are_objected_to(most: int | None, count: int) -> None:
    operator = LimitLength(LimitLengthSettings(min_words=3, max_words=most))
    assert len(list(operator.validate(None))) == count


def test_records_are_limited_by_the_tokens_of_their_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Punctuation, Sequence, Whitespace

    tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = Sequence([Whitespace(), Punctuation()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    records = [
        record("short", question="<image>\nWhat", answer="Cats"),
        record("right", question="<image>What?", answer="A cat."),
        record("long", question="Which, then?", answer="A cat."),
    ]
    settings = LimitLengthSettings(min_tokens=3, max_tokens=5, tokenizer=tmp_path)
    assert list(LimitLength(settings).validate(None)) == []
    assert list(LimitLength(settings).apply(records, seed=0)) == [
        BadRecord.of(records[0], "2 tokens, fewer than 3", tokens=2),
        records[1],
        BadRecord.of(records[2], "7 tokens, more than 5", tokens=7),
    ]


def test_a_tokenizer_that_is_not_there_is_said(tmp_path: Path) -> None:
    (clause,) = LimitLength(LimitLengthSettings(max_tokens=5)).validate(None)
    assert clause.startswith("'tokenizer' is not set; name a tokenizer.json")
    settings = LimitLengthSettings(max_tokens=5, tokenizer=tmp_path)
    (clause,) = LimitLength(settings).validate(None)
    assert clause == f"there is no file '{tmp_path / 'tokenizer.json'}'; correct 'tokenizer'"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer that can be read"):
        list(LimitLength(settings).apply([record("1")], seed=0))


def test_operators_say_which_files_they_depend_on(tmp_path: Path) -> None:
    alone: list[DataOperator[Any]] = [
        *(DropBrokenImages(NoSettings()), DeduplicateImages(NoSettings()), NearDuplicateImages(NearSettings())),
        DuplicateQuestions(DuplicateQuestionsSettings()),
        *(Sample(SampleSettings(count=1)), Balance(BalanceSettings())),
        *(LimitLength(LimitLengthSettings(max_words=3)), LimitLength(LimitLengthSettings(tokenizer=tmp_path))),
    ]
    assert {operator.files() for operator in alone} == {()}
    counting = LimitLength(LimitLengthSettings(max_tokens=3, tokenizer=tmp_path))
    assert counting.files() == (tmp_path / "tokenizer.json",)
    assert Leaks(LeaksSettings(against={"exam": {}})).files() is None


def many(count: int) -> Iterator[Record]:
    for number in range(count):
        yield record(f"record {number}", Path(f"/a/folder/of/images/{number:012d}.png"), question=f"What is {number}?")


@pytest.mark.parametrize("name", ["drop-broken-images", "duplicate-questions"])
def test_a_record_that_was_seen_takes_few_bytes(name: str) -> None:
    """Images that are not there have a fault each, whose text lies on disk."""
    operators: dict[str, DataOperator[Any]] = {
        each.name: each for each in (DropBrokenImages(NoSettings()), DuplicateQuestions(DuplicateQuestionsSettings()))
    }
    items = operators[name].apply(many(20_002), seed=0)
    next(items)
    tracemalloc.start()
    try:
        assert sum(1 for _ in islice(items, 20_000)) == 20_000
        plain.cache_clear()  # It is of a fixed size, and so is what making paths takes in the end.
        gc.collect()
        snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, pathlib.__file__)])
        assert sum(each.size for each in snapshot.statistics("filename")) < 20_000 * 60
    finally:
        tracemalloc.stop()
    assert next(items).id == "record 20001"


def test_a_hash_table_finds_what_a_dictionary_finds() -> None:
    table, expected, random = HashTable(), dict[int, int](), Random(3)
    keys = [
        *(random.randrange(-(2**63), 2**63) for _ in range(4_000)),
        *range(-50, 0),
        *(n << 20 for n in range(1, 99)),
    ]
    for key in keys + keys[::2]:
        value = random.randrange(-(2**63), 2**63)
        assert table.setdefault(key, value) == expected.setdefault(key, value)
    assert len(table) == len(expected)
    assert [table.get(key) for key in keys] == [expected[key] for key in keys]
    assert table.get(5) is None


def test_texts_come_back_from_their_file_by_number() -> None:
    texts = TextFile()
    given = ["a", "", "Größe \udc80", "b\0\n"]
    assert [texts.add(text) for text in given[:2]] == [0, 1] and texts[0] == "a"
    assert [texts.add(text) for text in given[2:]] == [2, 3]
    assert [texts[number] for number in (3, 2, 1, 0)] == given[::-1] and len(texts) == 4
