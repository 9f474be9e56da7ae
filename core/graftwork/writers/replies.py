"""What was asked of a writer and what it replied: kept for the next time, and written down beside the records."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from graftwork.contracts.records import Record
from graftwork.contracts.writer import Reply
from graftwork.data import cache
from graftwork.data.compact import HashTable
from graftwork.data.store import REPLIES, as_line, hash64, values_in
from graftwork.errors import DataError, NoRoom
from graftwork.processes import cache_folder

FILE = "replies.sqlite"
SAME_WORDS = "the same writer would be asked in the very words in which it has answered, which verifies nothing; ask in another phrasing"
THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
"""What a reasoning model writes before its answer, where its server leaves that in."""
PATIENCE = 60
"""Seconds that another process may hold the file."""
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
"""The codes of a file that is none of ours; the last one for tables or columns that it lacks."""

Arrived = Sequence[tuple[int, Mapping[str, Any]]]
"""Numbers of requests, each with its raw reply."""
Keep = Callable[[Arrived], None]
"""Puts on disk what has arrived; DataError where there is no room."""
Told = Callable[[int, int], None]
"""Gets how many replies more there are, and how many of them were not known."""


class Source(Protocol):
    """What answers: it makes requests of prompts, and raw replies of requests, both plain data."""

    identity: Mapping[str, Any]
    """What says whose replies these are, and how they are drawn."""
    form: int
    """Counted up when its raw replies change their form, so that none is read that was kept in another."""
    window: int
    """How many requests it likes to get at a time."""

    def request(self, prompt: Record, max_new_tokens: int) -> Mapping[str, Any]:
        """What identifies a request, images by their hashes: equal ones get equal replies. DataError for what cannot be asked."""
        ...

    def ask(
        self, requests: Sequence[tuple[Record, Mapping[str, Any]]], keep: Keep, known: Collection[int] = ()
    ) -> None:
        """Give `keep` the number of each request with its raw reply, those that came together at a time; one that failed has a
        `fault`, a clause that says why. DataError where it cannot go on.

        `known` numbers the requests before which good replies are known already, as if they had just come.
        """
        ...

    def read(self, raw: Mapping[str, Any]) -> Reply:
        """What a raw reply without a `fault` says."""
        ...

    def usage(self, raw: Mapping[str, Any]) -> tuple[int, int]:
        """How many tokens were read and written for a raw reply."""
        ...


class ReplyCache:
    """Raw replies by the hash of their request, on disk as soon as they are there; those that were not used for long are removed."""

    def __init__(self) -> None:
        self.file = cache_folder() / FILE
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(self.file, timeout=PATIENCE)
            self._base.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT, used REAL)")
            self._base.execute("DELETE FROM replies WHERE used < ?", (time.time() - cache.UNUSED,))
            self._base.commit()
        except (OSError, sqlite3.Error) as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    def get(self, keys: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        """Those that are known."""
        now = time.time()
        try:
            with self._base:
                self._base.executemany("UPDATE replies SET used = ? WHERE key = ?", [(now, key) for key in keys])
            rows = [
                self._base.execute("SELECT key, reply FROM replies WHERE key = ?", (key,)).fetchone() for key in keys
            ]
            return {row[0]: json.loads(row[1]) for row in rows if row}
        except (ValueError, sqlite3.Error) as error:
            raise self._failed(error) from error

    def put(self, replies: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep replies; they are on disk when this returns, which on a slow one takes as long for many as for one."""
        rows = [(key, json.dumps(raw), time.time()) for key, raw in replies.items()]
        try:
            with self._base:
                self._base.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def forget(self, keys: Sequence[str]) -> None:
        """Keep these no more."""
        try:
            with self._base:
                self._base.executemany("DELETE FROM replies WHERE key = ?", [(key,) for key in keys])
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> NoRoom:
        # What is above the lowest byte says it more closely.
        code = sqlite3.SQLITE_CORRUPT if isinstance(error, ValueError) else getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            why = f", as another process has held the file for {PATIENCE} seconds; end that process"
        elif code in DAMAGED:
            why = f", as the file is damaged ({error}); remove it, with all replies that it holds"
        else:
            why = f" ({error}); make room there or name another folder in GRAFTWORK_CACHE"
        return NoRoom(f"replies cannot be kept in '{self.file}'{why}, and go on with --resume")


class RecordedWriter:
    """The writer that an operator is lent for one stage: what it asks is asked once, and written into the stage's folder.

    `name` says which writer of a data set it is. Requests whose keys are among `refused` are not made.
    """

    def __init__(
        self,
        source: Source,
        cache: ReplyCache,
        folder: Path,
        stage: str,
        name: str,
        told: Told,
        refused: Container[str] = (),
    ) -> None:
        self.source, self.cache, self.stage, self.name, self.told = source, cache, stage, name, told
        self.refused = refused
        self._is_known = False
        """Whether a good reply was known of what came after the last request that was sent."""
        self._log = (folder / REPLIES).open("ab")

    def close(self) -> None:
        """Close the file of replies."""
        self._log.close()

    def answer(self, prompts: Iterable[Record], *, max_new_tokens: int) -> Iterator[tuple[Record, Reply]]:
        """Each prompt, in its order, with its reply."""
        rest = iter(prompts)
        while chunk := list(islice(rest, self.source.window)):
            yield from zip(
                chunk, self._answer([prompt.without_answer() for prompt in chunk], max_new_tokens), strict=True
            )

    def _answer(self, prompts: Sequence[Record], max_new_tokens: int) -> Iterator[Reply]:
        requests = [self._request(prompt, max_new_tokens) for prompt in prompts]
        keys = [key_of(self.source, request) for request in requests]
        requests = [
            {"fault": SAME_WORDS} if key in self.refused else request
            for key, request in zip(keys, requests, strict=True)
        ]
        known = self.cache.get(keys)
        good = {key for key, raw in known.items() if not sound(self.source.read(raw)).fault}
        new: dict[str, tuple[Record, Mapping[str, Any]]] = {}
        between = {0} if self._is_known else set()
        for key, prompt, request in zip(keys, prompts, requests, strict=True):
            if key in good:
                between.add(len(new))
            elif key not in known and "fault" not in request:
                new[key] = (prompt, request)
        self._is_known = len(new) in between
        if new:
            self._ask(new, known, between)
        self.told(len(prompts), len(new))
        for prompt, request, key in zip(prompts, requests, keys, strict=True):
            raw = request if "fault" in request else known[key]
            reply = Reply("", str(raw["fault"])) if "fault" in raw else sound(self.source.read(raw))
            self._write(prompt, max_new_tokens, key, raw, reply.fault)
            yield reply

    def _ask(
        self,
        new: Mapping[str, tuple[Record, Mapping[str, Any]]],
        known: dict[str, Mapping[str, Any]],
        between: set[int],
    ) -> None:
        """Add the replies to what is known, and keep those that are no faults."""
        asked, unkept = list(new), dict[str, Mapping[str, Any]]()

        def keep(arrived: Arrived) -> None:
            found = {asked[number]: raw for number, raw in arrived}
            known.update(found)
            unkept.update({key: raw for key, raw in found.items() if "fault" not in raw})
            self.cache.put(unkept)
            unkept.clear()  # Not before: where that failed, the next call tries again.

        try:
            self.source.ask(list(new.values()), keep, between)
        except DataError:
            # Whoever mends the writer wants to ask again what it answered without a text.
            self.cache.forget([key for key in asked if key in known and self._is_textless(known[key])])
            raise

    def _is_textless(self, raw: Mapping[str, Any]) -> bool:
        return "fault" not in raw and bool(sound(self.source.read(raw)).fault)

    def _request(self, prompt: Record, max_new_tokens: int) -> Mapping[str, Any]:
        """The request of a prompt, or why there can be none."""
        try:
            return self.source.request(prompt, max_new_tokens)
        except DataError as error:
            return {"fault": error.sentence}

    def _write(self, prompt: Record, max_new_tokens: int, key: str, raw: Mapping[str, Any], fault: str) -> None:
        turns = [[turn.role, turn.text] for turn in prompt.turns]
        usage = (0, 0) if "fault" in raw else self.source.usage(raw)
        whose = {"id": prompt.id, "stage": self.stage, "writer": self.name, "request": key}
        line = {**whose, "prompt": turns, "max_new_tokens": max_new_tokens, "reply": raw, "tokens": usage}
        self._log.write(as_line(line | ({"fault": fault} if fault else {})))


def sound(reply: Reply) -> Reply:
    """A reply without the space around it, and without what a model thought before it; one without any text is a fault."""
    text = THOUGHT.sub("", reply.text).strip()
    if text.startswith("<think>"):
        return Reply(
            "", "the writer's tokens ran out while it was thinking; raise 'max_new_tokens', or switch thinking off"
        )
    return Reply(text, reply.fault or ("" if text else "the writer answered with an empty text"), reply.ended)


def key_of(source: Source, request: Mapping[str, Any]) -> str:
    """The hash that a reply is kept under."""
    return cache.key_of(source.identity, request, form=source.form)


class RequestKeys:
    """The keys of the requests that files of replies hold of one writer, in a few bytes each."""

    def __init__(self, files: Iterable[Path], name: str) -> None:
        self._known = HashTable()
        for reply in chain.from_iterable(map(values_in, files)):
            if reply["writer"] == name:
                self._known.setdefault(hash64(reply["request"]), 0)

    def __contains__(self, key: object) -> bool:
        return self._known.get(hash64(key)) is not None


def total_usage(file: Path) -> dict[str, dict[str, int]]:
    """By the name of a writer, how many replies a file of them holds, and how many tokens were read and written for them."""
    found: dict[str, dict[str, int]] = {}
    for reply in values_in(file):
        counts = found.setdefault(
            reply["writer"], dict.fromkeys(("replies", "faults", "tokens_read", "tokens_written"), 0)
        )
        counts["replies"] += 1
        counts["faults"] += "fault" in reply
        counts["tokens_read"] += reply["tokens"][0]
        counts["tokens_written"] += reply["tokens"][1]
    return found
