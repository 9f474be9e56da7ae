"""The source `data-juicer-jsonl`: samples come back as they were, and what it says of others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from format_files import FRAMES, NO_TOOLS, PNG, read_line, refused

from graftwork.contracts import BadRecord, Record, Turn
from graftwork_data_juicer_jsonl import DataJuicerJsonl, DataJuicerSettings

IMAGE, EOC = "<__dj__image>", "<|__dj__eoc|>"


@pytest.mark.parametrize(
    "sample",
    [
        {"id": "1", "text": f"[[human]]: {IMAGE}\nQ\n[[gpt]]: A {EOC}", "images": ["x.png"]},
        {"id": "1", "text": f"[[human]]: <image>\nQ\n[[gpt]]: A\nB {EOC}", "images": ["x.png"]},
        {
            "id": "1",
            "text": f"[[human]]: {IMAGE}Q\n[[robot]]: A{EOC}[[user]]:{IMAGE}\n[[robot]]: B",
            "images": ["x.png"] * 2,
        },
        {
            "id": "1",
            "text": f"[[system]]: S\n[[human]]: Q\n[[gpt]]: A {EOC}\n[[human]]: R\n[[gpt]]: B {EOC}\n",
            "images": [],
        },
        {
            "id": "1",
            "text": "[[human]]: Q\n[[gpt]]: A",
            "images": [],
            "__dj__stats__": {"text_len": 3},
            "only_caption": False,
        },
    ],
)
def test_a_sample_of_data_juicer_comes_back_as_it_was(tmp_path: Path, sample: dict[str, Any]) -> None:
    record = read_line(DataJuicerJsonl, tmp_path, sample)
    assert isinstance(record, Record), record
    assert not any(token in turn.text for turn in record.turns for token in (IMAGE, EOC, "[["))
    written = json.loads(DataJuicerJsonl.write([record], tmp_path / "out").read_text())
    own = written.pop("graftwork")
    assert own == {"from": record.where}
    assert written == {**sample, "images": written["images"]}
    assert [(tmp_path / "out" / name).read_bytes() for name in written["images"]] == [PNG] * len(sample["images"])


def test_other_tokens_are_read_and_written_as_the_usual_ones(tmp_path: Path) -> None:
    sample = {"id": "1", "text": "[[human]]: <pic>Q\n[[gpt]]: A <end>", "images": ["x.png"]}
    record = read_line(DataJuicerJsonl, tmp_path, sample, image_token="<pic>", eoc_token="<end>")
    assert isinstance(record, Record)
    assert [turn.text for turn in record.turns] == ["<image>Q", "A"]
    written = json.loads(DataJuicerJsonl.write([record], tmp_path / "out").read_text())
    assert written["text"] == f"[[human]]: {IMAGE}Q\n[[gpt]]: A {EOC}"


@pytest.mark.parametrize(
    "text", [f"{IMAGE}\nA cat. {EOC}", f"A cat.\n{IMAGE} {EOC}", f"{IMAGE} {IMAGE} A cat.", "A cat."]
)
def test_captions_answer_the_question_that_is_set_and_are_written_as_captions(tmp_path: Path, text: str) -> None:
    sample = {"id": "1", "text": text, "images": ["x.png"] * text.count(IMAGE)}
    record = read_line(DataJuicerJsonl, tmp_path, sample, question="What is it?")
    assert isinstance(record, Record)
    places = "<image>\n" * len(record.images)
    assert [turn.text for turn in record.turns] == [f"{places}What is it?", "A cat."]
    file = DataJuicerJsonl.write([record], tmp_path / "out")
    assert json.loads(file.read_text())["text"] == text
    (again,) = DataJuicerJsonl(DataJuicerSettings(path=file)).records()
    assert isinstance(again, Record) and again.turns == record.turns and again.meta == record.meta
    other = replace(record, turns=(record.turns[0], Turn("assistant", "A dog.")))
    assert json.loads(DataJuicerJsonl.write([other], tmp_path / "other").read_text())["text"] == text.replace(
        "cat", "dog"
    )
    asked = replace(record, turns=(Turn("user", f"{places}Who?"), record.turns[1]))
    assert "[[human]]: " in json.loads(DataJuicerJsonl.write([asked], tmp_path / "asked").read_text())["text"]


def test_what_is_neither_a_conversation_nor_one_caption_is_refused(tmp_path: Path) -> None:
    for text in (f"{IMAGE} A {EOC} {IMAGE} B {EOC}", f"A {IMAGE} B", f"{IMAGE} {EOC}"):
        bad = read_line(
            DataJuicerJsonl, tmp_path, {"text": text, "images": ["x.png"] * text.count(IMAGE)}, question="What?"
        )
        assert isinstance(bad, BadRecord)
        assert bad.why == "the text is neither a conversation with roles nor one caption of its images"


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        ({}, "'text' is null, not a text"),
        ({"text": 3}, "'text' is a number, not a text"),
        (
            {"text": f"{IMAGE} A cat. {EOC}", "images": ["x.png"]},
            "the text does not begin with a role, such as '[[human]]: ', and so is no conversation; if it is a caption, set "
            "'question' to what it answers",
        ),
        ({"text": "[[human]]: \ud800\n[[gpt]]: A"}, "'text' holds a lone surrogate, which is not text"),
        ({"text": "[[human]]: Q\n[[tool]]: {}"}, f"a turn is from 'tool', and {NO_TOOLS}"),
        ({"text": f"[[human]]: {EOC}\n[[gpt]]: A"}, "turn 1 has no text"),
        (
            {"text": f"[[human]]: Q\n[[gpt]]: A {EOC} more"},
            f"'{EOC}' stands within turn 2, where no turn of a known role follows",
        ),
        ({"text": "[[gpt]]: A"}, "the turns of 'user' and 'assistant' do not alternate"),
        ({"text": "[[human]]: Q"}, "the last turn is not an answer of 'assistant'"),
        (
            {"text": f"[[human]]: {IMAGE}<image>\n[[gpt]]: A"},
            f"the text has both '{IMAGE}' and '<image>'; keep one of them",
        ),
        (
            {"text": "[[human]]: <__dj__video>\n[[gpt]]: A"},
            "the text has '<__dj__video>', and videos are not read; leave such records out",
        ),
        (
            {"text": "[[human]]: Q\n[[gpt]]: A", "videos": ["x.mp4"]},
            f"the record has 'videos', and videos are not read; {FRAMES}",
        ),
        (
            {"text": f"[[human]]: {IMAGE}\n[[gpt]]: A", "images": []},
            "places of '<image>' in the conversation: 1, images of the record: 0; they must be equal",
        ),
        ({"text": f"[[human]]: {IMAGE}\n[[gpt]]: A", "images": [1]}, "'image' is a number, not a path"),
    ],
)
def test_a_malformed_sample_of_data_juicer_says_what_is_wrong(tmp_path: Path, sample: Any, why: str) -> None:
    assert read_line(DataJuicerJsonl, tmp_path, sample) == BadRecord(f"{tmp_path / 'data.jsonl'}:1", why)


def test_what_would_be_read_as_other_turns_is_not_written(tmp_path: Path) -> None:
    for said in ("A\n[[human]]: B", f"A {EOC}", f"A {IMAGE}"):
        record = Record("x", (Turn("user", "Q"), Turn("assistant", said)))
        assert refused(DataJuicerJsonl.write, [record], tmp_path) == (
            "record 'x' has a turn that holds a role's tag or a token of Data-Juicer, and could not be told from two; "
            "change it, or choose another format"
        )
