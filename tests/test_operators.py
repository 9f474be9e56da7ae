"""The cleaning operators: what each drops, and the reason that it gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image as PILImage

from graftwork.contracts import BadRecord, Image, NoSettings, Record, Turn
from graftwork.errors import DataError
from graftwork_cleaning import DeduplicateImages, DropBrokenImages, LimitLength, LimitLengthSettings


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
