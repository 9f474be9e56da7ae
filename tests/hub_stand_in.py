"""A stand-in of the Hugging Face hub on this machine, for tests: repositories with revisions, gated and private ones."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_" + "a" * 34


@dataclass
class Repository:
    """A repository: its commits, oldest first, and what its branches and tags are."""

    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


class Hub:
    """What is on the hub, and what it was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.allowed: set[str] = set()
        """The tokens that may read gated and private repositories."""
        self.asked: list[str] = []
        """Every file that was sent, as `owner/name/file`, in order."""
        self.calls = 0
        self.numbers = count(1)
        self.tokens: set[str] = set()

    def push(self, name: str, files: Mapping[str, bytes] | Path, *refs: str, **options: bool) -> str:
        """A new commit of a repository, which `main` and the `refs` are from now on; its id."""
        if isinstance(files, Path):
            files = {
                file.relative_to(files).as_posix(): file.read_bytes() for file in files.rglob("*") if file.is_file()
            }
        repository = self.repositories.setdefault(name, Repository(**options))
        commit = f"{next(self.numbers):040x}"
        repository.commits[commit] = files
        repository.refs |= dict.fromkeys(("main", *refs), commit)
        return commit


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does, as far as huggingface_hub asks."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.hub.calls += 1
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.tokens.add(token)
        path = urlsplit(self.path).path.strip("/").split("/")
        of_api = path[:2] == ["api", "models"]
        owner, name, *rest = map(unquote, path[2:] if of_api else path)
        repository = self.hub.repositories.get(f"{owner}/{name}")
        revision, file = rest[1] if len(rest) > 1 else "main", "/".join(rest[2:])
        may_read = token in self.hub.allowed
        if repository is None or (repository.private and not may_read):
            self.refuse(404 if token else 401, "RepoNotFound")
        elif (commit := repository.refs.get(revision, revision)) not in repository.commits:
            self.refuse(404, "RevisionNotFound")
        elif of_api:
            listing = self.listing(f"{owner}/{name}", commit, repository.commits[commit], rest)
            self.send(json.dumps(listing).encode(), {"Content-Type": "application/json"})
        elif repository.gated and not may_read:
            self.refuse(403 if token else 401, "GatedRepo")
        elif (content := repository.commits[commit].get(file)) is None:
            self.refuse(404, "EntryNotFound")
        else:
            self.hub.asked += [f"{owner}/{name}/{file}"] * (self.command == "GET")
            self.send(content, {"ETag": f'"{digest(content)}"', "X-Repo-Commit": commit})

    def listing(self, name: str, commit: str, files: Mapping[str, bytes], rest: list[str]) -> object:
        if rest[:1] == ["tree"]:
            return [{"type": "file", "path": f, "size": len(c), "oid": digest(c)} for f, c in files.items()]
        return {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}

    def send(self, content: bytes, headers: Mapping[str, str], status: int = 200) -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.send(b"", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def log_message(self, *args: object) -> None:
        """Nothing: the tests look at `Hub.asked`."""


def digest(content: bytes) -> str:
    """What git calls a file of that content."""
    return hashlib.sha1(content).hexdigest()


@contextmanager
def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process, and those that it starts, use as the real one, with an empty cache below `folder`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # huggingface_hub has read its settings when it was imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hf" / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "hf" / "token"))
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
