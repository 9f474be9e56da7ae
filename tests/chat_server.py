"""A server with OpenAI's interface for chat completions, on this machine, that fails as a test wants it to."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from graftwork.config.tables import EndpointTable
from graftwork.contracts import Image, Record, Turn
from graftwork.writers.endpoint import EndpointSource
from graftwork.writers.replies import RecordedWriter, ReplyCache

Body = dict[str, Any]


@dataclass(frozen=True)
class Act:
    """What the server does with a request."""

    status: int = 200
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None
    """What it says the length is, where that is not so."""
    how: str = ""
    """`close` without a word, `hang`, `drip` one byte after another, or `flood` with spaces."""


def completion(text: Any, reason: str = "stop", usage: Any = (7, 3), **message: Any) -> Act:
    """A good answer, whatever its text is."""
    if isinstance(usage, tuple):
        usage = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True))
    message = {"role": "assistant", "content": text, **message}
    content = {"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": reason}], "usage": usage}
    return Act(content=json.dumps(content).encode())


def failure(status: int, message: str = "too busy", **headers: str) -> Act:
    """An error as servers send it; by default it asks to come back in a millisecond."""
    named = {name.replace("_", "-"): value for name, value in ({"retry_after_ms": "1"} | headers).items() if value}
    return Act(status, json.dumps({"error": {"message": message}}).encode(), named)


HTML = Act(content=b"<html><body>Log in</body></html>", headers={"Content-Type": "text/html"})
HALF = completion("a text").content[:40]


def asked(body: Body) -> str:
    """The text of the last message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


def echo(body: Body, attempt: int) -> Act:
    """The answer that a test expects by default."""
    return completion(f"re: {asked(body)}")


class ChatServer:
    """Served between `with` and its end; `act` gets the body of each request and which attempt at it this is, from 1."""

    def __init__(self, act: Callable[[Body, int], Act] = echo) -> None:
        self.act, self.bodies, self.headers = act, list[Body](), list[Mapping[str, str]]()
        self.under_way = self.most_under_way = 0
        self.attempts: Counter[str] = Counter()
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.paths: list[str] = []

    def __enter__(self) -> ChatServer:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=lambda: self._server.serve_forever(0.01), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 64
    owner: ChatServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no failure of a test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        owner = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            owner.under_way += 1
            owner.most_under_way = max(owner.most_under_way, owner.under_way)
            owner.bodies.append(body)
            owner.headers.append({name.lower(): value for name, value in self.headers.items()})
            owner.paths.append(self.path)
            owner.attempts[self.headers["Idempotency-Key"]] += 1
            attempt = owner.attempts[self.headers["Idempotency-Key"]]
        act = owner.act(body, attempt)
        with owner.lock:  # Before the answer leaves, after which the client may send the next.
            owner.under_way -= 1
        self.carry_out(act)

    def carry_out(self, act: Act) -> None:
        if act.how == "hang":
            self.server.owner.ended.wait(30)
        if act.how in ("hang", "close"):
            self.close_connection = True
            return
        self.send_response(act.status)
        if act.how == "flood":
            self.send_header("Connection", "close")
            self.end_headers()
            while not self.server.owner.ended.is_set():  # Until the client closes the connection.
                self.wfile.write(b" " * 65536)
        length = len(act.content) if act.length is None else act.length
        for name, value in {"Content-Type": "application/json", "Content-Length": f"{length}", **act.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for place in range(len(act.content)) if act.how == "drip" else ():
            self.wfile.write(act.content[place : place + 1])
            if self.server.owner.ended.wait(0.05):
                return
        if act.how != "drip":
            self.wfile.write(act.content)
        self.close_connection = length != len(act.content)


def prompt(text: str, *images: Image, id: str = "") -> Record:
    return Record(id or text, (Turn("user", "<image>" * len(images) + text),), images)


@contextmanager
def source_of(url: str, **settings: Any) -> Iterator[EndpointSource]:
    seed, say = settings.pop("seed", 0), settings.pop("say", lambda sentence: None)
    table = EndpointTable(**{"url": url, "model": "small", "timeout": 5.0, "retries": 2, **settings})
    with closing(EndpointSource(table, seed, say)) as source:
        yield source


def ask(source: EndpointSource, *prompts: Record) -> list[dict[str, Any]]:
    """The raw replies, in the order of the prompts."""
    requests = [(each, source.request(each, 20)) for each in prompts]
    found = list[tuple[int, Any]]()
    source.ask(requests, found.extend)
    return [dict(raw) for _, raw in sorted(found, key=lambda each: each[0])]


@contextmanager
def writer_of(source: EndpointSource, folder: Path) -> Iterator[RecordedWriter]:
    """A writer that keeps its replies in the cache, and writes them down in a folder."""
    folder.mkdir(exist_ok=True)
    with (
        closing(ReplyCache()) as cache,
        closing(RecordedWriter(source, cache, folder, "stage", "writer", lambda replies, asked: None)) as writer,
    ):
        yield writer


def fault(act: Act | Callable[[Body, int], Act], **settings: Any) -> str:
    """What one request to a server comes to that always does the same."""
    with (
        ChatServer(act if callable(act) else lambda body, attempt: act) as server,
        source_of(server.url, **settings) as source,
    ):
        (raw,) = ask(source, prompt("Hello"))
        return str(raw["fault"]) if "fault" in raw else source.read(raw).fault
