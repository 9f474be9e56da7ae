"""Work that stops: what was answered is kept and never paid for again, and the next command gets further."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from chat_server import Act, Body, ChatServer, ask, asked, echo, failure, prompt, source_of, writer_of

from graftwork.contracts import Reply
from graftwork.errors import DataError, NoRoom
from graftwork.processes import cache_folder
from graftwork.writers import attempts, endpoint
from graftwork.writers.endpoint import EndpointSource
from graftwork.writers.replies import FILE

pytest.importorskip("openai")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(attempts, "FIRST_WAIT", 0.01)


def answers(source: EndpointSource, folder: Path, words: Sequence[str]) -> list[Reply]:
    with writer_of(source, folder) as writer:
        return [reply for _, reply in writer.answer([prompt(word) for word in words], max_new_tokens=20)]


@pytest.mark.parametrize(
    "failing", [("5", "50", "95"), ("0", "1", "2"), tuple(f"{number}" for number in range(0, 100, 5))]
)
def test_requests_that_always_fail_do_not_end_every_further_command(failing: Sequence[str], tmp_path: Path) -> None:
    """Faults are not kept, so that a further command sends nothing but these, one behind the other."""
    words = [f"{number}" for number in range(100)]
    with ChatServer(lambda body, attempt: failure(503) if asked(body) in failing else echo(body, 1)) as server:
        settings = {"concurrency": 4, "retries": 0, "give_up_after": 4}
        for name in ("first", "again"):
            with source_of(server.url, **settings) as source:
                if name == "first" and failing[0] == "0":
                    ask(source, prompt("the first of all"))
                found = answers(source, tmp_path / name, words)
            assert [word for word, reply in zip(words, found, strict=True) if reply.fault] == list(failing)
        assert len(server.bodies) == 100 + len(failing) + (failing[0] == "0")


def test_faults_in_a_row_end_a_further_command_as_well(tmp_path: Path) -> None:
    with ChatServer() as server:
        with source_of(server.url) as source:
            answers(source, tmp_path / "first", ["good"])
        server.act = lambda body, attempt: failure(503)
        with (
            source_of(server.url, concurrency=1, retries=0, give_up_after=5) as source,
            pytest.raises(DataError, match="as 5 requests in a row failed"),
        ):
            answers(source, tmp_path / "again", ["good", *"123456789"])
        assert len(server.bodies) == 1 + 5


@pytest.mark.parametrize("bad", [failure(400), failure(503)])
def test_what_is_under_way_when_the_work_stops_is_awaited_and_kept(bad: Act, tmp_path: Path) -> None:
    """It was sent, so that it is paid for."""
    refused = threading.Event()

    def act(body: Body, attempt: int) -> Act:
        if asked(body) == "bad":
            while server.under_way < 4:
                time.sleep(0.01)
            refused.set()
            return bad
        refused.wait(5)
        time.sleep(0.2)
        return failure(500) if asked(body) == "busy" else echo(body, attempt)

    words = ["bad", "busy", "slow", "slower", *(f"{number}" for number in range(9))]
    with ChatServer(act) as server:
        with (
            source_of(server.url, concurrency=4, retries=0 if bad.status == 503 else 9, give_up_after=1) as source,
            pytest.raises(DataError, match=f"answered {bad.status}"),
        ):
            answers(source, tmp_path / "first", words)
        assert sorted(map(asked, server.bodies)) == sorted(words[:4]), "no other is sent, and none is sent again"
        server.act = echo
        with source_of(server.url) as source:
            assert [reply.text for reply in answers(source, tmp_path / "again", words)] == [
                f"re: {word}" for word in words
            ]
        assert not {"slow", "slower"} & set(map(asked, server.bodies[4:]))


def test_what_waits_for_its_next_attempt_does_not_delay_the_end() -> None:
    def act(body: Body, attempt: int) -> Act:
        if asked(body) == "bad":
            time.sleep(0.3)
            return failure(400)
        return failure(429, retry_after_ms="60000")

    with ChatServer(act) as server, source_of(server.url, concurrency=2) as source:
        started = time.monotonic()
        with pytest.raises(DataError, match="answered 400"):
            ask(source, prompt("busy"), prompt("bad"), prompt("never sent"))
        assert time.monotonic() - started < 30 and len(server.bodies) == 2


def test_what_hangs_when_the_work_stops_has_its_timeout_and_no_more() -> None:
    def act(body: Body, attempt: int) -> Act:
        return failure(401) if asked(body) == "bad" else Act(how="hang")

    with ChatServer(act) as server, source_of(server.url, timeout=0.5, retries=99) as source:
        started = time.monotonic()
        with pytest.raises(DataError, match="answered 401"):
            ask(source, prompt("bad"), prompt("slow"))
        assert time.monotonic() - started < 20


def test_an_exception_while_replies_are_kept_ends_what_is_under_way() -> None:
    def keep(arrived: Sequence[Any]) -> None:
        raise KeyboardInterrupt

    with ChatServer(lambda body, attempt: echo(body, 1) if asked(body) == "1" else Act(how="hang")) as server:
        with source_of(server.url, timeout=60) as source:
            started = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                source.ask([(each, source.request(each, 20)) for each in map(prompt, "123")], keep)
        assert time.monotonic() - started < 20
        assert not [thread for thread in threading.enumerate() if thread.name == "endpoint"]
        source.close()


def test_what_arrives_while_another_process_has_the_file_is_kept_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What arrives first cannot be written; the others arrive before that is known."""
    found = SimpleQueue[Any]()
    monkeypatch.setattr(endpoint, "SimpleQueue", lambda: found)
    with ChatServer() as server, source_of(server.url, concurrency=8) as source:
        with writer_of(source, tmp_path / "first") as writer, closing(other_process()) as other:
            writer.cache._base.execute("PRAGMA busy_timeout = 100")
            all_sent = threading.Barrier(8, lambda: other.execute("BEGIN IMMEDIATE"))

            def act(body: Body, attempt: int) -> Act:
                all_sent.wait(60)
                return echo(body, attempt)

            def put(replies: Any, put: Any = writer.cache.put) -> None:
                while other.in_transaction and found.qsize() < 8 - len(replies):
                    time.sleep(0.01)
                try:
                    put(replies)
                finally:
                    other.rollback()

            server.act = act
            monkeypatch.setattr(writer.cache, "put", put)
            with pytest.raises(NoRoom):
                list(writer.answer([prompt(f"{number}") for number in range(8)], max_new_tokens=20))
        before, server.act = len(server.bodies), echo
        answers(source, tmp_path / "again", [f"{number}" for number in range(8)])
        assert (before, len(server.bodies)) == (8, 8)


def other_process() -> sqlite3.Connection:
    return sqlite3.connect(cache_folder() / FILE, check_same_thread=False)
