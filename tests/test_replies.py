"""Replies that are kept: on disk as soon as they are there, asked for once, and shared by processes."""

from __future__ import annotations

import json
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from graftwork.contracts import Record, Reply, Turn
from graftwork.errors import DataError, NoRoom
from graftwork.writers import replies
from graftwork.writers.replies import FILE, REPLIES, Keep, RecordedWriter, ReplyCache, sound, total_usage


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))


class Shouting:
    """A source that answers in capitals, last request first, and writes down what it is asked."""

    identity: Mapping[str, Any] = {"writer": "shouting"}
    form = 1
    window = 4

    def __init__(self, asked: Path, patience: float = 0) -> None:
        self.asked, self.patience = asked, patience

    def request(self, prompt: Record, max_new_tokens: int) -> Mapping[str, Any]:
        if prompt.question == "unaskable":
            raise DataError("it cannot be asked")
        return {"question": prompt.question, "max_new_tokens": max_new_tokens}

    def ask(
        self, requests: Sequence[tuple[Record, Mapping[str, Any]]], keep: Keep, known: Collection[int] = ()
    ) -> None:
        for number, (_, request) in reversed(list(enumerate(requests))):
            with self.asked.open("a") as file:
                file.write(f"{request['question']}\n")
            time.sleep(self.patience)
            failed = request["question"] == "unanswered"
            keep([(number, {"fault": "it was not answered"} if failed else {"text": request["question"].upper()})])

    def read(self, raw: Mapping[str, Any]) -> Reply:
        return Reply(f" {raw['text']}\n".replace("MUTE", ""))

    def usage(self, raw: Mapping[str, Any]) -> tuple[int, int]:
        return len(raw["text"]), 1


def answers(folder: Path, words: Sequence[str], patience: float = 0) -> list[Reply]:
    """The replies to these questions, kept and written down as a stage does."""
    folder.mkdir(exist_ok=True)
    prompts = [Record(f"{number}", (Turn("user", word), Turn("assistant", "?"))) for number, word in enumerate(words)]
    source = Shouting(folder / "asked", patience)
    with (
        closing(ReplyCache()) as cache,
        closing(RecordedWriter(source, cache, folder, "ask", "w", lambda replies, asked: None)) as writer,
    ):
        found = list(writer.answer(prompts, max_new_tokens=9))
    assert [prompt for prompt, _ in found] == prompts
    return [reply for _, reply in found]


def test_each_prompt_gets_its_reply_or_a_fault_and_all_is_written_down(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    words = ["one", "unaskable", "two", "one", "mute", "unanswered"]
    assert answers(folder, words) == [
        *(Reply("ONE"), Reply("", "it cannot be asked"), Reply("TWO"), Reply("ONE")),
        *(Reply("", "the writer answered with an empty text"), Reply("", "it was not answered")),
    ]
    assert (folder / "asked").read_text().split() == ["two", "one", "unanswered", "mute"]
    lines = [json.loads(line) for line in (folder / REPLIES).read_text().splitlines()]
    assert lines[0] == {
        "id": "0",
        "stage": "ask",
        "writer": "w",
        "request": lines[3]["request"],
        "prompt": [["user", "one"]],
        "max_new_tokens": 9,
        "reply": {"text": "ONE"},
        "tokens": [3, 1],
    }
    assert [line.get("fault", "") for line in lines] == [reply.fault for reply in answers(tmp_path / "again", words)]
    assert (tmp_path / "again" / "asked").read_text().split() == ["unanswered"]
    assert total_usage(folder / REPLIES) == {"w": {"replies": 6, "faults": 3, "tokens_read": 13, "tokens_written": 4}}


def test_a_reply_in_a_former_form_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(tmp_path / "before", ["one"])
    monkeypatch.setattr(Shouting, "form", 2)
    answers(tmp_path / "after", ["one"])
    assert (tmp_path / "after" / "asked").read_text().split() == ["one"]


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("<think>It is\n5.</think>\nfive ", Reply("five")),
        ("5 <think> 4", Reply("5 <think> 4")),
        ("<think>hm</think>", Reply("", "the writer answered with an empty text")),
        (
            "<think>hm",
            Reply(
                "", "the writer's tokens ran out while it was thinking; raise 'max_new_tokens', or switch thinking off"
            ),
        ),
    ],
)
def test_thoughts_are_no_answers(text: str, reply: Reply) -> None:
    assert sound(Reply(text)) == reply


class Dying(Shouting):
    """Answers one request without a text, another with one, and cannot go on."""

    def ask(self, requests: Any, keep: Any, known: Any = ()) -> None:
        keep([(0, {"text": "MUTE"}), (1, {"text": "GOOD"})])
        raise DataError("given up")


def test_what_was_answered_without_a_text_is_asked_again_where_the_work_stopped(tmp_path: Path) -> None:
    prompts = [Record(word, (Turn("user", word),)) for word in ("one", "two", "three")]
    with closing(ReplyCache()) as cache:
        for source in (Dying(tmp_path / "asked"), Shouting(tmp_path / "asked")):
            writer = RecordedWriter(source, cache, tmp_path, "ask", "w", lambda replies, asked: None)
            with closing(writer), suppress(DataError):
                found = [reply.text for _, reply in writer.answer(prompts, max_new_tokens=9)]
    assert found == ["ONE", "GOOD", "THREE"] and lines_of(tmp_path / "asked") == ["three", "one"]


def started(folder: Path, words: Sequence[str], patience: float) -> subprocess.Popen[bytes]:
    code = "import sys; from pathlib import Path; from test_replies import answers; answers(Path(sys.argv[1]), sys.argv[3:], float(sys.argv[2]))"
    command = [sys.executable, "-c", code, str(folder), f"{patience}", *words]
    return subprocess.Popen(command, cwd=Path(__file__).parent, stderr=subprocess.PIPE)


def lines_of(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


def test_a_killed_process_has_kept_what_was_answered(tmp_path: Path) -> None:
    words, before, after = [f"w{number}" for number in range(40)], tmp_path / "before", tmp_path / "after"
    with started(before, words, 0.1) as process:
        while len(lines_of(before / "asked")) < 10:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    asked = lines_of(before / "asked")
    assert [reply.text for reply in answers(after, words)] == [word.upper() for word in words]
    twice = set(asked) & set(lines_of(after / "asked"))
    assert len(asked) < 40 and twice <= {asked[-1]}, "but the one that was under way"


def test_two_processes_keep_their_replies_in_one_file(tmp_path: Path) -> None:
    halves = [[f"w{number}" for number in range(start, start + 60)] for start in (0, 30)]
    processes = [started(tmp_path / f"{number}", words, 0.001) for number, words in enumerate(halves)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [(b"", 0)] * 2
    assert len(answers(tmp_path / "all", [f"w{number}" for number in range(90)])) == 90
    assert lines_of(tmp_path / "all" / "asked") == []


def test_a_disk_that_is_full_is_said_and_what_was_kept_stays(tmp_path: Path) -> None:
    answers(tmp_path / "before", ["one", "two"])
    limit, file = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "cache" / FILE
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, limit[1]))
    try:
        with pytest.raises(NoRoom) as caught:
            answers(tmp_path / "full", [f"{number}" * 400 for number in range(60)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    found = caught.value.sentence
    assert found.startswith(f"replies cannot be kept in '{file}' (") and found.endswith("and go on with --resume")
    answers(tmp_path / "after", ["one", "two", "three"])
    assert lines_of(tmp_path / "after" / "asked") == ["three"]


@pytest.mark.parametrize("content", [b"no database" * 999, None])
def test_a_damaged_file_is_named_to_be_removed(content: bytes | None, tmp_path: Path) -> None:
    answers(tmp_path / "before", ["one", "two"])
    file = tmp_path / "cache" / FILE
    if content:
        file.write_bytes(content)
    else:  # Half of a reply.
        with closing(sqlite3.connect(file)) as base:
            base.execute("UPDATE replies SET reply = '{'")
            base.commit()
    with pytest.raises(NoRoom) as caught:
        answers(tmp_path / "damaged", ["one", "two"])
    assert caught.value.sentence.startswith(f"replies cannot be kept in '{file}', as the file is damaged (")
    assert caught.value.sentence.endswith("; remove it, with all replies that it holds, and go on with --resume")
    file.unlink()
    assert [reply.text for reply in answers(tmp_path / "after", ["one"])] == ["ONE"]


def test_a_file_that_another_process_holds_is_no_lack_of_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(tmp_path / "before", ["one"])
    monkeypatch.setattr(replies, "PATIENCE", 0.1)
    file = tmp_path / "cache" / FILE
    with closing(sqlite3.connect(file)) as other, pytest.raises(NoRoom) as caught:
        other.execute("BEGIN EXCLUSIVE")
        ReplyCache()
    assert caught.value.sentence == (
        f"replies cannot be kept in '{file}', as another process has held the file for 0.1 seconds; end that process, and go on "
        "with --resume"
    )


def test_as_many_replies_are_found_as_are_asked_for() -> None:
    """More at a time than one statement of SQLite takes."""
    keys = [f"{number}" for number in range(40_000)]
    with closing(ReplyCache()) as cache:
        cache.put({key: {"text": key} for key in keys})
        assert list(cache.get([*keys, "unknown"])) == keys


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        NoRoom, match="make room there or name another folder in GRAFTWORK_CACHE, and go on with --resume"
    ):
        ReplyCache()


def test_what_is_used_stays_and_what_nobody_used_for_long_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    with closing(ReplyCache()) as cache:
        for key in ("used", "unused"):
            cache.put({key: {"text": key}})
        monkeypatch.setattr(time, "time", lambda: now + 80 * 24 * 3600)
        assert cache.get(["used", "unknown"]) == {"used": {"text": "used"}}
    monkeypatch.setattr(time, "time", lambda: now + 100 * 24 * 3600)
    with closing(ReplyCache()) as cache:
        assert set(cache.get(["used", "unused"])) == {"used"}
