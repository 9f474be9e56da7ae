"""The source `messages-jsonl`: the forms of messages that it reads, and what it says of everything else."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from format_files import ANSWER, FRAMES, GOOD, NO_TOOLS, PNG, QUESTION, asked, messages, read, read_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftwork.contracts import BadRecord, DataSource, Record, Turn
from graftwork.data import image_digest
from graftwork_data_juicer_jsonl import DataJuicerJsonl
from graftwork_llava_json import LlavaJson
from graftwork_messages_jsonl import MessagesJsonl

URI = "data:image/png;base64," + base64.b64encode(PNG).decode()

TEXT = {"type": "text", "text": "What?"}
READ: list[tuple[dict[str, Any], str, int]] = [
    (messages("Q", "A"), "Q", 0),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "Q", 0),
    ({"conversations": [{"role": "User", "content": "Q"}, {"role": "model", "value": "A"}]}, "Q", 0),
    (messages("<image>Q", "A", image="x.png"), "<image>Q", 1),
    (messages("<image>Q<image>", "A", images=["x.png", URI]), "<image>Q<image>", 2),
    (asked({"type": "image"}, TEXT, images=["x.png"]), "<image>\nWhat?", 1),
    (
        asked({"type": "image", "image": "x.png"}, TEXT, {"type": "image", "path": "x.png"}),
        "<image>\nWhat?\n<image>",
        2,
    ),
    (asked(TEXT, {"type": "image_url", "image_url": {"url": URI}}), "What?\n<image>", 1),
    (asked({"type": "input_image", "image_url": URI}, {"type": "input_text", "text": "Q"}), "<image>\nQ", 1),
    (asked({"type": "image", "bytes": URI.partition(",")[2]}, "Q"), "<image>\nQ", 1),
    (messages("<image>Q", "A", images=[{"bytes": URI.partition(",")[2], "path": "lost.png"}]), "<image>Q", 1),
    (messages("<image>Q", "A", images=[URI.partition(",")[2]]), "<image>Q", 1),
    (asked({"type": "image"}, {"type": "image", "image": URI}, images=["x.png"]), "<image>\n<image>", 2),
]


@pytest.mark.parametrize(("content", "question", "images"), READ)
def test_messages_are_read_in_their_usual_forms(tmp_path: Path, content: Any, question: str, images: int) -> None:
    record = read_line(MessagesJsonl, tmp_path, content)
    assert isinstance(record, Record), record
    assert record.turns == (Turn("user", question), Turn("assistant", "A"))
    assert len({image_digest(image) for image in record.images}) == min(images, 1)
    assert len(record.images) == images


def test_a_system_turn_may_stand_beside_and_marks_are_read(tmp_path: Path) -> None:
    content = messages("Q", "A", "Q", "B", system="Be brief.", id=3, weight=2)
    content["messages"][1]["weight"], content["messages"][3]["train"] = 0, True
    record = read_line(MessagesJsonl, tmp_path, content)
    assert isinstance(record, Record)
    assert (record.id, record.weight, record.turns[0]) == ("3", 2.0, Turn("system", "Be brief."))
    assert [turn.trained for turn in record.turns] == [None, None, False, None, True]


SILENT = "sound is not read; write down what it says, or leave such records out"
BAD_MESSAGES: list[tuple[Any, str]] = [
    ([GOOD], "the record is a list, not an object"),
    ({}, "'messages' is missing or is not a list of turns"),
    ({"messages": "Q"}, "'messages' is missing or is not a list of turns"),
    ({"conversations": {}}, "'conversations' is missing or is not a list of turns"),
    ({**GOOD, "conversations": []}, "the record has both 'messages' and 'conversations'; keep one of them"),
    ({"messages": [1, ANSWER]}, "turn 1 is a number, not an object"),
    (
        {"messages": [{"content": "Q"}]},
        "turn 1 is from None, neither 'user' or 'human', nor 'assistant' or 'gpt', nor 'system'",
    ),
    (
        {"messages": [{"role": ["user"], "content": "Q"}]},
        "turn 1 is from ['user'], neither 'user' or 'human', nor 'assistant' or 'gpt', nor 'system'",
    ),
    (
        {"messages": [{"role": "critic", "content": "Q"}]},
        "turn 1 is from 'critic', neither 'user' or 'human', nor 'assistant' or 'gpt', nor 'system'",
    ),
    ({"messages": [QUESTION, ANSWER, {"role": "tool", "content": "{}"}]}, f"turn 3 is from 'tool', and {NO_TOOLS}"),
    ({"conversations": [{"from": "observation", "value": "{}"}]}, f"turn 1 is from 'observation', and {NO_TOOLS}"),
    ({"messages": [QUESTION, {**ANSWER, "tool_calls": [{}]}]}, f"turn 2 has 'tool_calls', and {NO_TOOLS}"),
    ({**GOOD, "tools": [{}]}, f"the record has 'tools', and {NO_TOOLS}"),
    ({**GOOD, "videos": ["x.mp4"]}, f"the record has 'videos', and videos are not read; {FRAMES}"),
    ({**GOOD, "audio": "x.wav"}, f"the record has 'audio', and {SILENT}"),
    (messages("<video>\nWhat happens?", "A"), f"the record has a '<video>', and videos are not read; {FRAMES}"),
    (messages("What is said?\n<audio>", "A"), f"the record has a '<audio>', and {SILENT}"),
    (
        asked({"type": "video_url", "video_url": {}}),
        f"a part of turn 1 is of the type 'video_url', and videos are not read; {FRAMES}",
    ),
    (
        asked({"type": "input_audio"}),
        f"a part of turn 1 is of the type 'input_audio', and {SILENT}",
    ),
    (asked({}), "a part of turn 1 is of the type null, and only 'text', 'image' and 'image_url' are read"),
    (asked(3), "a part of turn 1 is a number, not an object"),
    (asked({"type": "text", "text": 1}), "'text' of a part of turn 1 is a number, not a text"),
    (asked({"type": "image", "image": "x.png", "url": "y"}), "a part of turn 1 names more than one image"),
    (messages({"a": 1}, "A"), "'content' of turn 1 is an object, not a text or a list of parts"),
    (messages(None, "A"), "turn 1 has no text in 'content'"),
    (messages([], "A"), "turn 1 has no text in 'content'"),
    (messages("Q"), "the last turn is not an answer of 'assistant'"),
    ({"messages": [QUESTION, QUESTION, ANSWER]}, "the turns of 'user' and 'assistant' do not alternate"),
    (messages("Q\ud800", "A"), "turn 1 holds a lone surrogate, which is not text"),
    (messages("Q", "A", system=1), "'system' is a number, not a text"),
    (messages("Q", "A", id=[1]), "'id' is a list, not a string or an integer"),
    (messages("Q", "A", weight=float("nan")), "'weight' is NaN, not a number of at least 0"),
    ({"messages": [QUESTION, {**ANSWER, "weight": 0.5}]}, "'weight' of turn 2 is 0.5, not 0 or 1"),
    ({"messages": [QUESTION, {**ANSWER, "weight": True}]}, "'weight' of turn 2 is true, not 0 or 1"),
    (messages("<image>", "A", image=1), "'image' is a number, not a path"),
    (messages("<image>", "A", image={}), "an image is an object without 'bytes', 'path' or 'url'"),
    (messages("<image>", "A", image={"bytes": "%"}), "'bytes' of an image is a text that is not base64"),
    (messages("<image>", "A", image={"bytes": [1]}), "'bytes' of an image is a list, not bytes"),
    (messages("<image>", "A", image={"bytes": ""}), "an image has no bytes; leave it out of a record about text only"),
    (
        messages("<image>", "A", image="https://a.org/x.png"),
        "the image 'https://a.org/x.png' is an address, not a path; download it",
    ),
    (
        messages("<image>", "A", image={"url": "https://a.org/x.png"}),
        "the image 'https://a.org/x.png' is an address, not a path; download it",
    ),
    (
        messages("<image>", "A", image="../x.png"),
        "the image path '../x.png' leads out of the image folder; make it relative to that",
    ),
    (
        messages("<image>", "A", image="data:image/png;base64,é"),
        "an image is a data URI whose content is not base64; is it cut off?",
    ),
    (
        messages("<image>", "A", image="data:image/png,abc"),
        "an image is the data URI 'data:image/png…', and only those in base64 are read",
    ),
    (messages("<image>", "A", image="data:video/mp4;base64,AA"), f"videos are not read; {FRAMES}"),
    (
        asked({"type": "image", "image": URI}, {"type": "image"}),
        "places without an image in the turns: 1, images beside them: 0; they must be equal",
    ),
    (
        messages("<image><image>Q", "A", images=["x.png"] * 3),
        "places of '<image>' in the conversation: 2, images of the record: 3; they must be equal",
    ),
    (messages("Q", "<image>", image="x.png"), "'<image>' stands in an answer; only questions have images"),
    ({**GOOD, "graftwork": 1}, "'graftwork' is a number, not an object"),
    ({**GOOD, "graftwork": "{"}, "'graftwork' is a text that is not JSON"),
    ({**GOOD, "graftwork": {"a": "\ud800"}}, "'graftwork' holds a lone surrogate, which is not text"),
    ({**GOOD, "graftwork": {"trained": [True]}}, "'trained' in 'graftwork' has 1 marks, and the record has 2 turns"),
    ({**GOOD, "graftwork": {"trained": [1, 2]}}, "'trained' in 'graftwork' is not a list of true, false and null"),
    ({**GOOD, "graftwork": {"group": 1}}, "'group' in 'graftwork' is 1, not of its type"),
    ({**GOOD, "graftwork": {"reference": "a"}}, "'reference' in 'graftwork' is a string, not of its type"),
    ({**GOOD, "graftwork": {"source": True}}, "'source' in 'graftwork' is true, not of its type"),
    ({**GOOD, "graftwork": {"weight": -1}}, "'weight' is -1, not a number of at least 0"),
]


@pytest.mark.parametrize(("content", "why"), BAD_MESSAGES)
def test_a_malformed_record_of_messages_says_what_is_wrong(tmp_path: Path, content: Any, why: str) -> None:
    assert read_line(MessagesJsonl, tmp_path, content) == BadRecord(f"{tmp_path / 'data.jsonl'}:1", why)


@pytest.mark.parametrize(("source", "name"), [(MessagesJsonl, "messages"), (LlavaJson, "conversations")])
def test_questions_that_wait_for_an_answer_are_read_where_they_are_wanted(
    source: type[DataSource[Any]], name: str, tmp_path: Path
) -> None:
    turn = {"role": "user", "content": "Q"} if name == "messages" else {"from": "human", "value": "Q"}
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps({"id": "1", name: [turn]}) + "\n")
    (refused,) = source(source.Settings(path=file)).records()
    (asked,) = source(source.Settings(path=file, open_questions=True)).records()
    assert isinstance(refused, BadRecord) and isinstance(asked, Record) and asked.question == "Q"


def test_an_element_of_html_that_is_talked_about_is_no_video(tmp_path: Path) -> None:
    content = messages("What does <video> do?", "It shows\n<video></video>")
    assert isinstance(read_line(MessagesJsonl, tmp_path, content), Record)


def test_a_missing_image_is_named_with_its_path(tmp_path: Path) -> None:
    content = messages("<image>", "A", image="y.png")
    item = read_line(MessagesJsonl, tmp_path, content)
    assert item.why == f"there is no image '{tmp_path / 'y.png'}'; check 'image_folder'"  # type: ignore[union-attr]


@pytest.mark.parametrize("source", [LlavaJson, MessagesJsonl, DataJuicerJsonl])
def test_a_damaged_line_costs_only_itself(source: type[DataSource[Any]], tmp_path: Path) -> None:
    path = source.write([Record("a", (Turn("user", "Q"), Turn("assistant", "A")))] * 2, tmp_path)
    good, _ = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([b"\xef\xbb\xbf" + good, good[:-9], b"\xff" + good, b"[" * 100_000, b"3", b"", good]))
    items = read(source, path)
    assert [type(item) for item in items] == [Record, *[BadRecord] * 4, Record]
    assert [item.where for item in items if isinstance(item, BadRecord)] == [f"{path}:{n}" for n in (2, 3, 4, 5)]
    whys = [item.why for item in items if isinstance(item, BadRecord)]
    assert whys[0].startswith("the line is not JSON (")
    assert whys[1:] == [
        "the line is not UTF-8 text",
        "the line is not JSON (it is nested too deeply)",
        "the record is a number, not an object",
    ]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["user", "gpt", "<image>", "x.png"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "role",
    "from",
    "content",
    "value",
    "weight",
    "train",
    "type",
    "text",
    "image",
    "image_url",
    "bytes",
    "tool_calls",
)
turn = st.dictionaries(
    st.sampled_from(KEYS), values | st.lists(st.dictionaries(st.sampled_from(KEYS), values), max_size=2)
)
RECORD = (
    "id",
    "messages",
    "conversations",
    "image",
    "images",
    "system",
    "tools",
    "weight",
    "graftwork",
    "text",
    "videos",
)
near = st.dictionaries(st.sampled_from(RECORD), values | st.lists(turn, max_size=3))


@pytest.mark.parametrize("source", [MessagesJsonl, DataJuicerJsonl])
def test_any_json_gives_one_item_for_each_line(source: type[DataSource[Any]], tmp_path: Path) -> None:
    @settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(values | near, max_size=3))
    def check(contents: list[Any]) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(map(json.dumps, contents)))
        assert len(read(source, path)) == len(contents)

    check()
