"""The source `llava-json`: what it reads, and what it says of everything else."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.contracts import BadRecord, Image, Record, Turn
from graftwork.errors import DataError
from graftwork_llava_json import LlavaJson, LlavaJsonSettings


def talk(*values: str, first: str = "human") -> list[dict[str, str]]:
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[number % 2], "value": value} for number, value in enumerate(values)]


SYSTEM = {"from": "system", "value": "Be brief."}


def read(path: Path, **settings: Any) -> list[Record | BadRecord]:
    return list(LlavaJson(LlavaJsonSettings(path=path, **settings)).records())


def read_one(folder: Path, content: object) -> Record | BadRecord:
    (folder / "x.png").touch()
    path = folder / "data.jsonl"
    path.write_text(json.dumps(content))
    [item] = read(path)
    return item


def write(path: Path, content: object, **options: Any) -> Path:
    path.write_text(json.dumps(content, **options), encoding="utf-8")
    return path


def test_a_list_and_lines_give_the_same_records(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").touch()
    contents = [
        {"id": 7, "image": "a/x.png", "conversations": talk("<image>\nWhat?", "A cat.", "Sure?", "Yes.")},
        {"conversations": talk("Größe?\u2028", "1 m")},
    ]
    as_list = read(write(tmp_path / "data.json", contents, indent=1), group="cats")
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n\n".join(json.dumps(each, ensure_ascii=False) for each in contents), encoding="utf-8-sig")
    as_lines = read(lines, group="cats")
    turns = (
        Turn("user", "<image>\nWhat?"),
        Turn("assistant", "A cat."),
        Turn("user", "Sure?"),
        Turn("assistant", "Yes."),
    )
    image = Image(tmp_path / "a" / "x.png")
    where = f"{tmp_path / 'data.json'}:2 (record 1)"
    assert as_list[0] == Record("7", turns, (image,), group="cats", where=where)
    assert [each.where for each in as_lines] == [f"{lines}:1", f"{lines}:3"]
    assert [each.turns for each in as_list] == [each.turns for each in as_lines]  # type: ignore[union-attr]
    assert [each.id for each in as_list] == ["7", "2"]  # type: ignore[union-attr]


def test_a_record_of_a_list_is_placed_by_the_line_where_it_starts(tmp_path: Path) -> None:
    good = {"conversations": talk("Q", "A")}
    path = write(tmp_path / "data.json", [good, 5, good, {}], indent=2)
    lines = path.read_text().split("\n")
    places = [item.where for item in read(path)]
    numbers = [int(place.split(":")[-1].split()[0]) for place in places]
    assert places[1] == f"{path}:{numbers[1]} (record 2)"
    assert [lines[number - 1].strip() for number in numbers] == ["{", "5,", "{", "{}"]


def test_image_paths_are_relative_to_the_image_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").touch()
    path = write(tmp_path / "data.json", [{"image": ["x.png"], "conversations": talk("<image>", "A")}])
    [record] = read(path, image_folder=tmp_path / "images")
    assert isinstance(record, Record)
    assert record.images == (Image(tmp_path / "images" / "x.png"),)


def test_the_limit_counts_readable_records(tmp_path: Path) -> None:
    good = {"conversations": talk("Q", "A")}
    items = read(write(tmp_path / "data.json", [5, good, good, 6]), limit=1)
    assert [type(item) for item in items] == [BadRecord, Record]


def test_a_leading_answer_is_dropped(tmp_path: Path) -> None:
    item = read_one(tmp_path, {"conversations": talk("Hello", "Q", "A", first="gpt")})
    assert isinstance(item, Record)
    assert [turn.text for turn in item.turns] == ["Q", "A"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([], "the record is a list, not an object"),
        (None, "the record is null, not an object"),
        (3, "the record is a number, not an object"),
        ({}, "'conversations' is missing or is not a list of turns"),
        ({"conversations": []}, "'conversations' is missing or is not a list of turns"),
        ({"conversations": "Q"}, "'conversations' is missing or is not a list of turns"),
        ({"conversations": ["Q"]}, "turn 1 is a string, not an object"),
        ({"conversations": [{"value": "Q"}]}, "turn 1 is from None, neither 'human' nor 'gpt'"),
        ({"conversations": [{"from": ["human"], "value": "Q"}]}, "turn 1 is from ['human'], neither 'human' nor 'gpt'"),
        (
            {"conversations": [{"from": "tool", "value": "Q"}]},
            "turn 1 is from 'tool', neither 'human' nor 'gpt', nor 'sys",
        ),
        ({"conversations": [SYSTEM]}, "the last turn is not an answer of 'gpt'"),
        ({"conversations": [*talk("Q", "A"), SYSTEM, *talk("Q", "A")]}, "a 'system' turn stands behind other turns"),
        ({"conversations": [SYSTEM, SYSTEM, *talk("Q", "A")]}, "a 'system' turn stands behind other turns"),
        (
            {"image": "x.png", "conversations": [{"from": "system", "value": "<image>"}, *talk("Q", "A")]},
            "'<image>' stands in the system turn; only questions have images",
        ),
        ({"messages": talk("Q", "A")}, "the record has 'messages', which is another format; read it with"),
        ({"conversations": [*talk("Q"), {"from": "gpt", "value": 3}]}, "'value' of turn 2 is a number, not a text"),
        ({"conversations": [{"from": "human"}]}, "turn 1 has no text in 'value'"),
        ({"conversations": talk("Q", " ")}, "turn 2 has no text in 'value'"),
        ({"conversations": talk("Q")}, "the last turn is not an answer of 'gpt'"),
        ({"conversations": talk("Q", "A", "Q")}, "the last turn is not an answer of 'gpt'"),
        ({"conversations": talk("A", first="gpt")}, "the last turn is not an answer of 'gpt'"),
        ({"conversations": talk("Q", "A") + talk("B", first="gpt")}, "the turns of 'human' and 'gpt' do not alternate"),
        ({"conversations": talk("Q\ud800", "A")}, "turn 1 holds a lone surrogate, which is not text"),
        ({"id": "\udfff", "conversations": talk("Q", "A")}, "id holds a lone surrogate, which is not text"),
        ({"id": [1], "conversations": talk("Q", "A")}, "'id' is a list, not a string or an integer"),
        ({"id": True, "conversations": talk("Q", "A")}, "'id' is true, not a string or an integer"),
        ({"id": 1.5, "conversations": talk("Q", "A")}, "'id' is 1.5, not a string or an integer"),
        ({"id": float("nan"), "conversations": talk("Q", "A")}, "'id' is NaN, not a string or an integer"),
        ({"image": 1, "conversations": talk("<image>", "A")}, "'image' is a number, not a path"),
        (
            {"image": "", "conversations": talk("Q", "A")},
            "'image' is empty; name the file, or leave it out of a record",
        ),
        ({"image": [" "], "conversations": talk("<image>", "A")}, "'image' is empty; name the file, or leave it out"),
        (
            {"image": "https://example.org/x.png", "conversations": talk("<image>", "A")},
            "the image 'https://example.org/x.png' is an address, not a path; download it",
        ),
        ({"image": "\udfff", "conversations": talk("<image>", "A")}, "image holds a lone surrogate, which is not text"),
        (
            {"images": ["x.png", "x.png"], "conversations": talk("<image>", "A", "<image> or <image>?", "B")},
            "places of '<image>' in the conversation: 3, images of the record: 2; they must be equal",
        ),
        (
            {"image": "x.png", "images": ["x.png"], "conversations": talk("<image>", "A")},
            "the record has both 'image' and 'images'; keep one of them",
        ),
        (
            {"video": "x.mp4", "conversations": talk("Q", "A")},
            "the record has 'video', and videos are not read; save frames of them as images, such as by 'ffmpeg -i",
        ),
        ({"weight": -1, "conversations": talk("Q", "A")}, "'weight' is -1, not a number of at least 0"),
        ({"weight": "2", "conversations": talk("Q", "A")}, "'weight' is a string, not a number of at least 0"),
        (
            {"conversations": [*talk("Q"), {"from": "gpt", "value": "A", "loss": 1}]},
            "'loss' of turn 2 is 1, not true or false",
        ),
        (
            {"conversations": [{"from": "human", "value": "Q", "train": True}, {"from": "gpt", "value": "A"}]},
            "turn 1 is marked to be trained on, and only answers can be; unmark it",
        ),
        (
            {"conversations": [*talk("Q"), {"from": "gpt", "value": "A", "weight": 1, "train": False}]},
            "'train' and 'weight' of turn 2 contradict each other",
        ),
        (
            {"conversations": talk("<image>", "A")},
            "turns with '<image>' in the conversation: 1, images of the record: 0; they must be equal",
        ),
        (
            {"image": "x.png", "conversations": talk("Q", "A")},
            "turns with '<image>' in the conversation: 0, images of the record: 1; they must be equal",
        ),
        (
            {"image": "x.png", "conversations": talk("<image>", "A", "<image>", "A")},
            "turns with '<image>' in the conversation: 2, images of the record: 1; they must be equal",
        ),
        ({"image": "x.png", "conversations": talk("Q", "<image>")}, "'<image>' stands in an answer; only questions"),
    ],
)
def test_a_malformed_record_says_what_is_wrong(tmp_path: Path, content: object, why: str) -> None:
    item = read_one(tmp_path, content)
    assert isinstance(item, BadRecord)
    assert item.where == f"{tmp_path / 'data.jsonl'}:1"
    assert item.why.startswith(why)


@pytest.mark.parametrize("image", ["/x.png", "../x.png", "a/../../x.png"])
def test_image_paths_that_leave_the_folder_are_refused(tmp_path: Path, image: str) -> None:
    (tmp_path / "x.png").touch()
    (tmp_path / "in").mkdir()
    item = read_one(tmp_path / "in", {"image": image, "conversations": talk("<image>", "A")})
    assert item.why == f"the image path '{image}' leads out of the image folder; make it relative to that"  # type: ignore[union-attr]


def test_an_absolute_path_below_the_image_folder_is_accepted(tmp_path: Path) -> None:
    folder, elsewhere, link = tmp_path / "data", tmp_path / "data-2", tmp_path / "link"
    folder.mkdir(), elsewhere.mkdir(), link.symlink_to(folder)
    (folder / "x.png").touch(), (elsewhere / "x.png").touch()
    content = [
        {"image": str(each / "x.png"), "conversations": talk("<image>", "A")} for each in (folder, link, elsewhere)
    ]
    direct, by_link, other = read(write(folder / "data.json", content))
    assert isinstance(direct, Record) and direct.images == (Image(folder / "x.png"),)
    assert isinstance(by_link, Record) and by_link.images == (Image(link / "x.png"),)
    assert isinstance(other, BadRecord) and "leads out of the image folder" in other.why
    through_link = read(write(tmp_path / "data.json", content[:2]), image_folder=link)
    assert all(isinstance(each, Record) for each in through_link)


@pytest.mark.parametrize(
    ("image", "hint"),
    [
        ("in", "that is a folder; name a file in it"),
        ("in\\A.png", "with '/' for '\\' it is '{folder}/in/A.png'"),
        ("in/a.PNG", "there is 'A.png', whose name has other capitals or another Unicode form; use that"),
        ("in/\u00e9.png", "there is 'e\u0301.png', whose name has other capitals or another Unicode form; use that"),
        ("in/b.png", "check 'image_folder'"),
        ("out/a.png", "check 'image_folder'"),
    ],
)
def test_a_missing_image_that_is_nearly_there_is_pointed_at(tmp_path: Path, image: str, hint: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "A.png").touch(), (tmp_path / "in" / "e\u0301.png").touch()
    item = read_one(tmp_path, {"image": image, "conversations": talk("<image>", "A")})
    assert isinstance(item, BadRecord)
    assert item.why == f"there is no image '{tmp_path / image}'; {hint.format(folder=tmp_path)}"


def test_a_system_turn_comes_first_and_a_leading_answer_behind_it_is_dropped(tmp_path: Path) -> None:
    item = read_one(tmp_path, {"conversations": [SYSTEM, *talk("Hello", "Q", "A", first="gpt")]})
    assert isinstance(item, Record)
    assert item.turns == (Turn("system", "Be brief."), Turn("user", "Q"), Turn("assistant", "A"))


@pytest.mark.parametrize("image", ["none.png", "\0", "x" * 5000])
def test_a_missing_image_is_noticed(tmp_path: Path, image: str) -> None:
    item = read_one(tmp_path, {"image": image, "conversations": talk("<image>", "A")})
    assert item.why == f"there is no image '{tmp_path / image}'; check 'image_folder'"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("image", "there"),
    [
        ("ocr_vqa/images/7.jpg", "ocr_vqa/images/7.png"),
        ("vg/VG_100K/2.jpg", "vg/images/2.jpg"),
        ("vg/VG_100K_2/2.jpg", "vg/images/2.jpg"),
    ],
)
def test_an_image_is_also_found_where_upstream_looks(tmp_path: Path, image: str, there: str) -> None:
    content = {"image": image, "conversations": talk("<image>", "A")}
    other = tmp_path / there
    other.parent.mkdir(parents=True)
    other.touch()
    found = read_one(tmp_path, content)
    assert isinstance(found, Record) and found.images == (Image(other),)
    named = tmp_path / image
    named.parent.mkdir(parents=True, exist_ok=True)
    named.touch()
    found = read_one(tmp_path, content)
    assert isinstance(found, Record) and found.images == (Image(named),), "the name that is given comes first"


def test_a_missing_image_has_no_other_name_without_reason(tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    item = read_one(tmp_path, {"image": "photo.jpg", "conversations": talk("<image>", "A")})
    assert isinstance(item, BadRecord)


def test_several_places_in_one_question_are_one_image(tmp_path: Path) -> None:
    item = read_one(
        tmp_path, {"image": "x.png", "conversations": talk("Is <image> like <image>?", "Yes", "Sure?", "Yes")}
    )
    assert isinstance(item, Record)
    assert item.turns[0].text == "<image>\nIs  like ?"


def test_several_images_stand_in_the_places_of_any_questions(tmp_path: Path) -> None:
    talked = talk("<image> or <image>?", "This", "And <image>?", "No")
    item = read_one(tmp_path, {"image": ["x.png"] * 3, "conversations": talked})
    assert isinstance(item, Record)
    assert item.images == (Image(tmp_path / "x.png"),) * 3
    assert item.turns[0].text == "<image> or <image>?"


def test_marks_and_weights_are_read(tmp_path: Path) -> None:
    talked = talk("Q", "A", "Q", "B", "Q", "C")
    talked[1] |= {"train": False}
    talked[3] |= {"weight": 1}
    item = read_one(tmp_path, {"weight": 0.5, "conversations": talked})
    assert isinstance(item, Record)
    assert [turn.trained for turn in item.turns] == [None, False, None, True, None, None]
    assert item.weight == 0.5


def test_a_truncated_list_keeps_what_can_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", [{"conversations": talk("Q", "A")}] * 3, indent=1)
    path.write_text(path.read_text()[:-20])
    items = read(path)
    assert [type(item) for item in items] == [Record, Record, BadRecord]
    assert "(record 3)" in items[2].where
    assert items[2].why.startswith("from here on the file is not JSON (")  # type: ignore[union-attr]


def test_a_damaged_line_costs_one_record(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"conversations"\n' + json.dumps({"conversations": talk("Q", "A")}) + "\n" + "[" * 100_000)
    items = read(path)
    assert [type(item) for item in items] == [BadRecord, Record, BadRecord]
    assert items[0] == BadRecord(f"{path}:1", "the line is not JSON (Expecting ':' delimiter)")


def test_a_file_that_is_none_of_both_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    for content, words in [
        (b'{"id": 1}', "does not hold a JSON list; if it has one record a line, let its name end in .jsonl"),
        (b"", "does not hold a JSON list"),
        (b"[\n\n\xff", "is not UTF-8 text (line 3); is it the right file?"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(caught.value).startswith(f"'{path}' {words}")
    with pytest.raises(DataError, match=r"ends neither in \.json \(a list\) nor in \.jsonl"):
        read(tmp_path / "data.txt")
    with pytest.raises(DataError, match=r"there is no file .*none\.json'; correct 'path'"):
        read(tmp_path / "none.json")
    with pytest.raises(DataError, match="has no 'path'; name the"):
        list(LlavaJson(LlavaJsonSettings()).records())


def test_a_missing_file_is_an_objection_to_the_plan(tmp_path: Path) -> None:
    def validate(path: Path | None) -> list[str]:
        return list(LlavaJson(LlavaJsonSettings(path=path)).validate(None))

    assert validate(None) == ["'path' is not set; name the .json or .jsonl file"]
    assert validate(tmp_path / "x.json") == [f"there is no file '{tmp_path / 'x.json'}'; correct 'path'"]
    assert validate(write(tmp_path / "y.json", [])) == []


def read_bytes(content: bytes, suffix: str) -> list[Record | BadRecord]:
    """What is read of a file, checked; nothing when the file as a whole is refused."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"data{suffix}"
        path.write_bytes(content)
        try:
            items = read(path)
        except DataError as error:
            assert str(path) in error.sentence
            return []
    for item in items:
        assert item.where.startswith(f"{path}:")
        if isinstance(item, Record):
            assert [turn.role for turn in item.turns] == ["user", "assistant"] * (len(item.turns) // 2)
            assert all(turn.text.encode() for turn in item.turns)
    return items


@settings(deadline=None)
@given(st.binary(), st.sampled_from([b"", b"[", b"[{", b'[{"id":']), st.sampled_from([".json", ".jsonl"]))
def test_any_bytes_end_in_records_bad_records_or_one_error(content: bytes, start: bytes, suffix: str) -> None:
    read_bytes(start + content, suffix)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["human", "gpt", "<image>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
turn = st.fixed_dictionaries({}, optional={"from": st.sampled_from(["human", "gpt"]) | values, "value": values})
near = st.fixed_dictionaries({}, optional={"id": values, "image": values, "conversations": st.lists(turn) | values})


@settings(deadline=None)
@given(st.lists(values | near, max_size=4))
def test_any_json_gives_one_item_for_each_record(contents: list[Any]) -> None:
    assert len(read_bytes(json.dumps(contents).encode(), ".json")) == len(contents)
    lines = "\n".join(json.dumps(content) for content in contents)
    assert len(read_bytes(lines.encode(), ".jsonl")) == len(contents)
