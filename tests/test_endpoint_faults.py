"""A server that fails: every failure has its sentence, and the work goes on or stops in time."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
from chat_server import (
    HALF,
    HTML,
    Act,
    Body,
    ChatServer,
    ask,
    asked,
    completion,
    echo,
    failure,
    fault,
    prompt,
    source_of,
)

from graftwork.contracts import Reply
from graftwork.errors import DataError
from graftwork.writers import attempts
from graftwork.writers.attempts import asked_wait, shortened
from graftwork.writers.replies import key_of

pytest.importorskip("openai")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(attempts, "FIRST_WAIT", 0.01)


LATER = formatdate(time.time() + 3600, usegmt=True)
FAULTS = {
    "the endpoint answered 500 (too busy), at the last of 3 attempts": failure(500),
    "the endpoint answered 408 (too busy), at the last of 3 attempts": failure(408),
    "the endpoint answered 409 (too busy), at the last of 3 attempts": failure(409),
    "the endpoint answered 429 (too busy), at the last of 3 attempts": failure(429),
    "the endpoint answered 429 (slow down), at the last of 3 attempts": failure(429, "slow down", retry_after_ms=""),
    "the endpoint answered 503 (a web page), at the last of 3 attempts": Act(503, b"<html>", {"retry-after": "0"}),
    "the endpoint answered 429 (no) and asks to wait 3,600 seconds": failure(
        429, "no", retry_after_ms="", retry_after="3600"
    ),
    "the endpoint answered with a web page instead of JSON, at the last of 3 attempts": HTML,
    "the endpoint answered with nothing, at the last of 3 attempts": Act(),
    "no answer came from the endpoint (Server disconnected without sending a response.), at the last of 3 attempts": Act(
        how="close"
    ),
    "the endpoint answered with an error (no GPU), at the last of 3 attempts": Act(content=b'{"error": "no GPU"}'),
    "the endpoint answered with JSON that has no choice with a message": Act(content=b'{"choices": []}'),
    "the endpoint's content filter withheld the text": completion("", "content_filter"),
    "the endpoint answered without a text": completion(None),
    "the endpoint answered without a text (I cannot help)": completion(None, refusal="I cannot help"),
    "the endpoint answered without a text: its tokens ran out before it": completion(None, "length"),
    "the endpoint answered with something that is no text": completion({"an": "object"}),
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_every_fault_has_a_sentence_of_its_own(sentence: str) -> None:
    assert fault(FAULTS[sentence]) == sentence


@pytest.mark.parametrize("length", [None, 1000])
def test_half_a_json_is_asked_for_again_whatever_length_it_names(length: int | None) -> None:
    found = fault(Act(content=HALF, length=length))
    start = (
        "no answer came from the endpoint (peer closed" if length else "the endpoint answered with JSON that breaks off"
    )
    assert found.startswith(start) and found.endswith("at the last of 3 attempts")


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"7", b"null", b'{"choices": 3}', b'{"choices": [7]}', b"\xff\xfe\xff"]
)
def test_any_other_bytes_are_a_fault(content: bytes) -> None:
    assert fault(Act(content=content), retries=0).startswith("the endpoint answered with JSON that ")


@pytest.mark.parametrize("text", ["half of a pair: \ud83d", float("nan")])
def test_what_cannot_be_written_down_is_a_fault_and_not_the_end(text: Any) -> None:
    assert fault(completion(text)).startswith(
        "the endpoint's answer cannot be kept: a record cannot be written as JSON ("
    )


@pytest.mark.parametrize("how", ["hang", "drip"])
def test_a_server_that_never_ends_is_left_after_the_timeout(how: str) -> None:
    started = time.monotonic()
    act = Act(how=how, content=completion("drop by drop").content)
    assert (
        fault(act, timeout=0.3, retries=1)
        == "the endpoint did not answer within 0.3 seconds, at the last of 2 attempts"
    )
    assert time.monotonic() - started < 10


def test_a_server_that_sends_more_and_more_is_left() -> None:
    assert fault(Act(how="flood")) == "the endpoint answered with more than 16 MiB"
    assert fault(Act(503, how="flood"), retries=0) == "the endpoint answered 503 ()"
    with pytest.raises(DataError, match=r"answered 400 \(\) when"):
        fault(Act(400, how="flood"))


def test_bytes_that_are_not_what_the_headers_say_are_a_fault() -> None:
    packed = Act(content=b"no archive", headers={"Content-Encoding": "gzip"})
    assert fault(packed, retries=0).startswith("no answer came from the endpoint (")


def test_a_client_that_cannot_be_made_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "ftp://me:secret@127.0.0.1:9")
    sentence = "^no client can be made for the endpoint 'http://endpoint.example/v1' .*; check 'url', and the proxies"
    with source_of("http://endpoint.example/v1") as source, pytest.raises(DataError, match=sentence) as caught:
        ask(source, prompt("Hello"))
    assert "secret" not in f"{caught.value}"


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    with source_of(url) as source:
        (raw,) = ask(source, prompt("Hello"))
    assert (
        raw["fault"] == "no answer came from the endpoint (All connection attempts failed), at the last of 3 attempts"
    )


ANEW = "; correct that, and start again: what was answered is kept, and the same is not asked again"
RESUMED = ", and go on with --resume"
REFUSALS = {
    400: "check the record, and 'model' and 'extra' of the endpoint",
    401: "name the environment variable that holds its key in 'key_from'",
    403: "name the environment variable that holds its key in 'key_from'",
    404: "check that it has the model 'small', and that 'url' is its base address, which mostly ends in /v1",
    422: "check the record, and 'model' and 'extra' of the endpoint",
    308: "it has moved to 'https://elsewhere.example/v1'; write its base address there in 'url'",
}


@pytest.mark.parametrize("status", REFUSALS)
def test_what_no_further_attempt_mends_stops_at_once(status: int) -> None:
    refused = failure(status, "not  like\nthis\x1b[31m", location="https://elsewhere.example/v1")
    with ChatServer(lambda body, attempt: refused) as server, source_of(server.url) as source:
        with pytest.raises(DataError) as caught:
            ask(source, prompt("Hello"))
        assert len(server.bodies) == 1
    assert caught.value.sentence == (
        f"the endpoint '{server.url}' answered {status} (not like this [31m) when it was asked about record 'Hello'; "
        f"{REFUSALS[status]}{RESUMED if status in (401, 403) else ANEW}"
    )


def test_an_endpoint_that_has_never_answered_is_given_up_sooner() -> None:
    with ChatServer(lambda body, attempt: failure(500)) as server:
        with source_of(server.url, concurrency=1, retries=0) as source, pytest.raises(DataError) as caught:
            ask(source, *map(prompt, "123456"))
        assert len(server.bodies) == 3
    assert caught.value.sentence == (
        f"the endpoint '{server.url}' is given up, as 3 requests in a row failed (of the last: the endpoint answered 500 "
        "(too busy)); mend it, and go on with --resume, which asks for no reply a second time"
    )


@pytest.mark.parametrize("bad", [failure(500), completion(""), completion(None)])
def test_an_endpoint_is_given_up_after_so_many_in_a_row(bad: Act) -> None:
    def act(body: Body, attempt: int) -> Act:
        return echo(body, attempt) if asked(body) in ("0", "5") else bad

    with ChatServer(act) as server:
        settings = {"concurrency": 1, "retries": 0, "give_up_after": 5}
        with (
            source_of(server.url, **settings) as source,
            pytest.raises(DataError, match="as 5 requests in a row failed"),
        ):
            ask(source, *(prompt(f"{number}") for number in range(20)))
        assert len(server.bodies) == 11


def test_a_wait_that_the_server_names_is_kept() -> None:
    def act(body: Body, attempt: int) -> Act:
        return failure(429, retry_after_ms="300") if attempt == 1 else echo(body, attempt)

    started, said = time.monotonic(), list[str]()
    with ChatServer(act) as server, source_of(server.url, say=said.append, price=(1.0, 10.0)) as source:
        (raw,) = ask(source, prompt("Hello"))
        assert source.read(raw).text == "re: Hello" and time.monotonic() - started >= 0.3
        assert source.spent() == (1, 1, 7, 3, pytest.approx(37e-6))
    assert said == ["the endpoint answered 429 (too busy); it is asked again, later each time"]
    assert [headers["idempotency-key"] for headers in server.headers] == [
        key_of(source, source.request(prompt("Hello"), 20))
    ] * 2


def test_how_long_a_server_wants_to_be_left_alone() -> None:
    assert asked_wait({"retry-after": "2"}) == 2
    assert asked_wait({"retry-after": "2", "retry-after-ms": "10"}) == 0.01
    begun, moment = time.time(), parsedate_to_datetime(LATER).timestamp()
    wait = asked_wait({"retry-after": LATER})
    assert wait is not None and moment - time.time() <= wait <= moment - begun
    for odd in ({}, {"retry-after": ""}, {"retry-after": "soon"}, {"retry-after": "-1"}, {"retry-after": "nan"}):
        assert asked_wait(odd) is None


def test_what_a_server_says_is_one_short_line() -> None:
    assert shortened('{"error": {"message": "over\\nthere"}}') == "over there"
    assert shortened('{"detail": [{"msg": "why"}]}') == "[{'msg': 'why'}]"
    assert shortened("<!doctype html>") == "a web page"
    assert len(shortened("long " * 10_000)) == 200 and shortened("") == ""


@pytest.mark.parametrize(
    "usage", [None, 7, {}, {"prompt_tokens": "many", "completion_tokens": -1}, {"prompt_tokens": True}]
)
def test_a_server_that_does_not_count_is_taken_at_its_word(usage: Any) -> None:
    with ChatServer(lambda body, attempt: completion("yes", usage=usage)) as server, source_of(server.url) as source:
        (raw,) = ask(source, prompt("Hello"))
        assert source.usage(raw) == (0, 0) and source.spent() == (1, 0, 0, 0, None)


def test_the_end_of_the_tokens_is_told_from_the_end_of_the_text() -> None:
    with ChatServer(lambda body, attempt: completion("and so on", "length")) as server, source_of(server.url) as source:
        (raw,) = ask(source, prompt("Hello"))
        assert source.read(raw) == Reply("and so on", ended=False)


WAITING = """
import sys
from chat_server import ask, prompt, source_of

with source_of(sys.argv[1], timeout=60) as source:
    ask(source, prompt("Hello"))
"""


def test_ctrl_c_ends_a_process_that_waits_for_an_endpoint() -> None:
    with ChatServer(lambda body, attempt: Act(how="hang")) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", WAITING, server.url], cwd=Path(__file__).parent, stderr=subprocess.PIPE
        )
        while not server.bodies:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == -signal.SIGINT and errors.rstrip().endswith("KeyboardInterrupt")
