"""What the readers of formats say of bad input: a sentence with its place for each record, and none of the others is lost."""

from __future__ import annotations

import base64
import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import drawn

from graftwork.contracts import BadRecord, DataSource, Image, Record, Turn
from graftwork.data import ImageFiles, extension_of, image_digest, jsonfiles, read_json_list
from graftwork.errors import DataError
from graftwork_data_juicer_jsonl import DataJuicerJsonl
from graftwork_llava_json import LlavaJson
from graftwork_messages_jsonl import MessagesJsonl
from graftwork_tables import HfDataset, Parquet
from graftwork_webdataset import Webdataset

PNG = drawn(1, "red")
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
FRAMES = "save frames of them as images, such as by 'ffmpeg -i x.mp4 -vf fps=1 frames/%04d.jpg', and give these"
NO_TOOLS = "calls of tools are not learned here; leave such records out"
GOOD = {"messages": [QUESTION, ANSWER]}


def read(source: type[DataSource[Any]], path: Path, **settings: Any) -> list[Record | BadRecord]:
    return list(source(source.Settings(path=path, **settings)).records())


def read_line(source: type[DataSource[Any]], folder: Path, content: object, **settings: Any) -> Record | BadRecord:
    """What a line of a file is read as, in a folder with an image `x.png`."""
    (folder / "x.png").write_bytes(PNG)
    path = folder / "data.jsonl"
    path.write_text(json.dumps(content))
    [item] = read(source, path, **settings)
    return item


def refused(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments, **named)
    return str(caught.value)


def messages(*contents: Any, **rest: Any) -> dict[str, Any]:
    """Messages of the user and the assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": each} for n, each in enumerate(contents)], **rest}


def asked(*parts: Any, **rest: Any) -> dict[str, Any]:
    return messages(list(parts), "A", **rest)


# Messages -------------------------------------------------------------------------------------------------------------

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
    ({**GOOD, "audio": "x.wav"}, "the record has 'audio', and sound is not read"),
    (
        asked({"type": "video_url", "video_url": {}}),
        f"a part of turn 1 is a 'video_url', and videos are not read; {FRAMES}",
    ),
    (
        asked({"type": "input_audio"}),
        "a part of turn 1 is of the type 'input_audio', and only 'text', 'image' and 'image_url' are read",
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


def test_a_large_list_is_not_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonfiles, "CHUNK", 2**16)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": "a" * 1000}] * 8000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_json_list(path)) == 8000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 8


# Data-Juicer ----------------------------------------------------------------------------------------------------------

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
    ("sample", "why"),
    [
        ({}, "'text' is null, not a text"),
        ({"text": 3}, "'text' is a number, not a text"),
        (
            {"text": f"{IMAGE} A cat. {EOC}", "images": ["x.png"]},
            "the text does not begin with a role, such as '[[human]]: ', and so is no conversation",
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


# Archives -------------------------------------------------------------------------------------------------------------


def archive(path: Path, members: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def link(kind: bytes, name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


TALK = json.dumps(messages("<image>Q", "A")).encode()


def test_samples_are_read_from_their_place_in_the_archive(tmp_path: Path) -> None:
    members = {
        "a/1.jpg": PNG,
        "a/1.json": json.dumps(messages("<image>Q", "A")).encode(),
        "a/2.json": json.dumps({"question": "Q", "answers": ["b", "a", "a"], "id": 7}).encode(),
        "a/2.left.png": PNG,
        "a/2.right.png": PNG,
        "a/3.json": json.dumps(asked({"type": "image", "image": "3.jpg"}, "Q")).encode(),
        "a/3.jpg": PNG,
        "a/4.txt": b"A shape.\n",
        "a/4.png": PNG,
    }
    path = archive(tmp_path / "x.tar", members)
    records = read(Webdataset, path, question="Describe it.")
    assert all(isinstance(record, Record) for record in records), records
    assert [record.id for record in records] == ["a/1", "7", "a/3", "a/4"]
    assert [record.turns[0].text for record in records] == [
        "<image>Q",
        "<image>\n<image>\nQ",
        "<image>\nQ",
        "<image>\nDescribe it.",
    ]  # type: ignore[union-attr]
    assert (records[1].turns[1].text, records[1].reference) == ("a", ("a", "b"))  # type: ignore[union-attr]
    for record in records:
        for image in record.images:  # type: ignore[union-attr]
            assert image.path == path and image_digest(image) == image_digest(Image(data=PNG))
    assert records[0].where == f"{path}:a/1 (sample 1)"


BAD_MEMBERS: list[tuple[dict[str, bytes | tarfile.TarInfo], str]] = [
    ({"../x.json": TALK}, "its name leads out of the archive; it is not read"),
    ({"/x.json": TALK}, "its name leads out of the archive; it is not read"),
    ({"x.jpg": link(tarfile.SYMTYPE, "x.jpg")}, "it is a link, and only files are read"),
    ({"x.jpg": link(tarfile.LNKTYPE, "x.jpg")}, "it is a link, and only files are read"),
    ({"x.jpg": link(tarfile.CHRTYPE, "x.jpg")}, "it is a device or a pipe, and only files are read"),
    (
        {"x.json": b"{"},
        "member 'x.json' is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
    ),
    ({"x.json": b"[]"}, "member 'x.json' is a list, not an object"),
    ({"x.json": b"\xff"}, "member 'x.json' is not UTF-8 text"),
    ({"x.json": b"{}"}, "sample 'x' has neither a conversation in .json nor an answer in .txt"),
    ({"x.jpg": PNG}, "sample 'x' has neither a conversation in .json nor an answer in .txt"),
    ({"x.txt": b"A", "x.jpg": PNG}, "member 'x.txt' answers no question; set 'question' to what it answers"),
    ({"x.mp4": b"", "x.txt": b"A"}, f"member 'x.mp4' is a video, and videos are not read; {FRAMES}"),
    (
        {"x.json": TALK},
        "turns with '<image>' in the conversation: 1, images of the record: 0; they must be equal",
    ),
    (
        {"x.json": json.dumps(messages("<image>", "A", image="y.png")).encode(), "x.png": PNG},
        "sample 'x' has no image 'y.png'; it has png",
    ),
    ({"x.json": json.dumps({"question": 1}).encode()}, "'question' is a number, not a text"),
    ({"x.json": json.dumps({"question": "Q"}).encode()}, "an answer is null, not a text"),
    ({"x.json": json.dumps({"question": "Q", "answers": []}).encode()}, "there is a question without an answer"),
]


@pytest.mark.parametrize(("members", "why"), BAD_MEMBERS)
def test_a_bad_member_costs_only_its_sample(tmp_path: Path, members: dict[str, Any], why: str) -> None:
    path = archive(
        tmp_path / "x.tar", {"a.json": json.dumps(GOOD).encode(), **members, "z.json": json.dumps(GOOD).encode()}
    )
    items = read(Webdataset, path)
    assert [item.id for item in items if isinstance(item, Record)] == ["a", "z"]
    [bad] = [item for item in items if isinstance(item, BadRecord)]
    assert bad.why == why
    assert bad.where.startswith(f"{path}:")


def test_an_archive_that_is_cut_off_gives_what_it_still_has(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.tar", {f"{n}.json": json.dumps(messages("Q", "A" * 600)).encode() for n in range(3)})
    whole = path.read_bytes()
    size = whole.index(b"1.json")  # Where the second member begins.
    for end, count, why in [
        (size + 64, 1, "there is no member, and no mark of the end"),
        (size + 700, 1, "member '1.json' is not whole"),
        (2 * size, 2, "the mark of the end is missing"),
    ]:
        path.write_bytes(whole[:end])
        *records, bad = read(Webdataset, path)
        assert [record.id for record in records if isinstance(record, Record)] == ["0", "1"][:count]
        place = f"{path}:{size * count}"
        assert bad == BadRecord(place, f"from this byte on the archive cannot be read ({why}); is it cut off?")
    path.write_bytes(whole[:size] + b"x" * 512 + whole[size + 512 :])
    items = read(Webdataset, path)
    assert [type(item) for item in items] == [Record, BadRecord]
    assert items[1].why.startswith("from this byte on the archive cannot be read (")  # type: ignore[union-attr]


def test_what_is_no_archive_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz"):
        pass
    assert refused(read, Webdataset, path) == (
        f"'{path}' does not end in .tar; a compressed archive is not read, as images are read in their place: "
        "uncompress it, such as by 'gunzip'"
    )
    assert refused(read, Webdataset, path.rename(tmp_path / "x.tar")).startswith(
        f"'{tmp_path / 'x.tar'}' is not a tar archive ("
    )
    (tmp_path / "empty").mkdir()
    assert (
        refused(read, Webdataset, tmp_path / "empty")
        == f"the folder '{tmp_path / 'empty'}' has no file that ends in .tar; correct 'path'"
    )
    assert (
        refused(read, Webdataset, tmp_path / "none")
        == f"'path' is '{tmp_path / 'none'}', which does not exist; set it to where the data is"
    )


def test_a_folder_of_archives_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in "ba":
        archive(tmp_path / f"{name}.tar", {f"{name}.json": json.dumps(GOOD).encode()})
    assert [record.id for record in read(Webdataset, tmp_path)] == ["a", "b"]


# Tables ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Writes a parquet file of columns."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def write(_schema: Any = None, /, **columns: Any) -> Path:
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=2)
        return path

    return write


def test_common_layouts_of_tables_are_recognised_and_others_named(table: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(PNG)
    path = table(image=["x.png", None], question=["Q", "R"], answers=[["b", "a", "a"], ["c"]], junk=[1, 2])
    one, two = read(Parquet, path)
    assert (one.id, one.where, one.turns, one.reference) == (  # type: ignore[union-attr]
        *("1", f"{path}:1"),
        (Turn("user", "<image>\nQ"), Turn("assistant", "a")),
        ("a", "b"),
    )
    assert two.turns == (Turn("user", "R"), Turn("assistant", "c"))  # type: ignore[union-attr]
    path = table(picture=[{"bytes": PNG, "path": "y.png"}], query=["Q"], label=["A"])
    [record] = read(Parquet, path, image="picture", question="query", answer="label")
    assert record.images == (Image(data=PNG),) and record.reference == ()  # type: ignore[union-attr]
    path = table(
        images=[[PNG, PNG]],
        chat=[[{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "A"}]],
    )
    [record] = read(Parquet, path, messages="chat")
    assert len(record.images) == 2  # type: ignore[union-attr]


def test_a_bad_row_costs_only_itself(table: Callable[..., Path]) -> None:
    path = table(image=["lost.png", None, None], question=["Q", "", "Q"], answer=["A", "A", "A"])
    items = read(Parquet, path)
    assert [type(item) for item in items] == [BadRecord, BadRecord, Record]
    assert items[:2] == [
        BadRecord(f"{path}:1", f"there is no image '{path.parent / 'lost.png'}'; check 'image_folder'"),
        BadRecord(f"{path}:2", "'question' is empty, not a text"),
    ]
    path = table(image=[1, 2], question=["Q", "R"], answer=[1.5, 2.5])
    assert {item.why for item in read(Parquet, path)} == {"an answer is a number, not a text"}  # type: ignore[union-attr]


def test_a_table_that_cannot_be_read_is_one_sentence(table: Callable[..., Path]) -> None:
    path = table(a=[1], b=[2])
    assert refused(read, Parquet, path) == (
        f"'{path}' has neither a column of messages nor one of questions and one of answers, but a, b; "
        "name them in 'messages', or in 'question' and 'answer'"
    )
    assert (
        refused(read, Parquet, path, question="c") == f"'{path}' has no column 'c', which 'question' names; it has a, b"
    )
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PAR1", b"no table at all"):
        path.write_bytes(content)
        said = refused(read, Parquet, path)
        assert said.startswith(f"'{path}' is not a parquet file, or not a whole one (")
        assert said.endswith("); copy or download it again")


def test_damage_within_a_parquet_file_costs_a_group_of_rows(table: Callable[..., Path]) -> None:
    path = table(question=[f"Q{n}" * 50 for n in range(6)], answer=["A"] * 6)
    content = bytearray(path.read_bytes())
    place = content.index(b"Q2Q2")
    content[place - 40 : place + 20] = b"\xff" * 60
    path.write_bytes(content)
    items = read(Parquet, path)
    assert [type(item) for item in items] == [Record, Record, BadRecord, Record, Record]
    assert items[2].where == f"{path}:3"
    assert items[2].why.startswith("the rows 3 to 4 cannot be read (")  # type: ignore[union-attr]


def test_without_its_library_a_table_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftwork_tables.missing_packages", lambda requires: f"needs {requires.packages[0]}")
    assert refused(read, Parquet, tmp_path) == "'parquet' needs pyarrow>=15"
    assert refused(read, HfDataset, tmp_path) == "'hf-dataset' needs datasets>=4"


def test_a_data_set_of_the_library_is_read_by_split_and_from_any_folder(
    table: Callable[..., Path], tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"question": ["Q"], "answer": ["A"], "image": [{"bytes": PNG, "path": None}]}
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    saved = tmp_path / "saved"
    datasets.DatasetDict({"val": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(str(saved))
    [record] = read(HfDataset, saved, split="val")
    assert record.images == (Image(data=PNG),) and record.where == f"{saved}[val]:1"  # type: ignore[union-attr]
    assert refused(read, HfDataset, saved) == f"'{saved}' has no split 'train'; it has val"
    plain = tmp_path / "plain"
    Parquet.write([record], plain)  # type: ignore[list-item]
    found = datasets.load_dataset(str(plain), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.features["images"] == datasets.List(datasets.Image()), (
        "other readers are told which columns are images"
    )
    assert refused(read, HfDataset, tmp_path / "none") == (
        f"'path' is '{tmp_path / 'none'}', which does not exist; set 'path' to a folder, or 'dataset' to a hub id"
    )
    (tmp_path / "junk").mkdir()
    assert refused(read, HfDataset, tmp_path / "junk").startswith(
        f"the data set '{tmp_path / 'junk'}' cannot be loaded ("
    )
    assert list(HfDataset(HfDataset.Settings(path=saved, dataset="a/b")).validate(None)) == [
        "both 'path' and 'dataset' are set; leave out one of them"
    ]


# Writing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "extension"),
    [
        (PNG[:16], "png"),
        (b"\xff\xd8\xff\xe0", "jpg"),
        (b"GIF89a", "gif"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "webp"),
        (b"BM", "bmp"),
        (b"II*\0", "tiff"),
        (b"MM\0*", "tiff"),
        (b"\0\0\0 ftypavif", "avif"),
        (b"no image", "bin"),
    ],
)
def test_an_image_is_called_by_its_content(start: bytes, extension: str, tmp_path: Path) -> None:
    assert extension_of(start) == extension
    name = ImageFiles(tmp_path).name_of(Image(data=start))
    assert name.endswith(f".{extension}") and (tmp_path / name).read_bytes() == start
