"""A server with OpenAI's interface as a writer: asked about many records at a time, and given up when it fails for long."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, get_args, get_type_hints

from graftwork.config.tables import EndpointTable
from graftwork.contracts.records import Image, Record
from graftwork.contracts.writer import Reply
from graftwork.data.conversations import PLACE
from graftwork.data.images import shown_as
from graftwork.data.store import as_line
from graftwork.errors import DataError
from graftwork.writers.attempts import Client, Stopped, shortened
from graftwork.writers.replies import Keep, key_of, sound

WINDOW = 16
"""How many requests are handed over at a time for each that is under way."""
GIVE_UP_AT_ONCE = 3
"""How many requests fail before an endpoint is given up that has answered none."""
LIMITS = get_args(get_type_hints(EndpointTable)["limit_field"])
"""What servers call the limit of tokens."""

Request = tuple[Record, Mapping[str, Any]]
Numbered = Iterator[tuple[int, Request]]


class Spent(NamedTuple):
    """What was asked of an endpoint, without what was known."""

    requests: int
    retries: int
    read: int
    """Tokens, as the server counts them."""
    written: int
    cost: float | None
    """By the price in the table; None where it has none."""


class EndpointSource:
    """An endpoint, asked from a thread of its own until it is closed; DataError where its package or key is missing."""

    form = 1

    def __init__(self, table: EndpointTable, seed: int, say: Callable[[str], None] = lambda sentence: None) -> None:
        self._fields = {"model": table.model, "temperature": table.temperature, "top_p": table.top_p, "seed": seed}
        if taken := sorted(table.extra.keys() & {*self._fields, "messages", "stream", "n", *LIMITS}):
            to_do = "name it in 'limit_field'" if taken[0] in LIMITS else "leave it out there"
            raise DataError(f"'extra' of an endpoint names '{taken[0]}', which is set without it; {to_do}")
        try:
            as_line(table.extra)
        except DataError as error:
            raise DataError(
                f"'extra' of an endpoint cannot be sent: {error.sentence}; give it text, numbers and lists"
            ) from None
        self.identity: Mapping[str, Any] = {
            "endpoint": table.url,
            **self._fields,
            "limit_field": table.limit_field,
            "extra": table.extra,
        }
        self.window = table.concurrency * WINDOW
        self._table, self._say, self._client = table, say, Client(table)
        self._hash_of = lru_cache(1 << 16)(_hash_of_file)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._requests = self._read = self._written = 0
        self._faults_in_row, self._has_answered = 0, False

    def request(self, prompt: Record, max_new_tokens: int) -> Mapping[str, Any]:
        """The turns, the hashes of the images as they are sent, and the limit of tokens."""
        turns = [[turn.role, turn.text] for turn in prompt.turns]
        places = sum(turn.text.count(PLACE) for turn in prompt.turns)
        if places != len(prompt.images):
            raise DataError(f"a prompt has {places} '{PLACE}' and {len(prompt.images)} images; give it as many of both")
        hashes = [
            self._hash_of(image.path, image.span) if image.path else _hash_of_shown(image) for image in prompt.images
        ]
        return {"turns": turns, "images": hashes, "max_new_tokens": max_new_tokens}

    def ask(self, requests: Sequence[Request], keep: Keep, known: Collection[int] = ()) -> None:
        """Keep the bodies of the responses, as they come.

        DataError where the endpoint refuses a request, or is given up: those that are under way are awaited, each for one
        attempt at most. Any other exception ends them, once what has arrived is kept.
        """
        self._has_answered |= bool(known)
        found: SimpleQueue[tuple[int, Mapping[str, Any]] | str | None] = SimpleQueue()
        asking = asyncio.run_coroutine_threadsafe(self._ask(requests, found, known), self._running_loop())
        asking.add_done_callback(lambda _: found.put(None))
        try:
            goes_on = True
            while goes_on:
                together = [found.get(), *_at_hand(found)]
                if arrived := [each for each in together if isinstance(each, tuple)]:
                    keep(arrived)
                for each in together:
                    if isinstance(each, str):
                        self._say(each)
                goes_on = None not in together
            asking.result()
        except BaseException:
            asking.cancel()
            with suppress(DataError):  # What ended the work is what is said.
                keep([each for each in _at_hand(found) if isinstance(each, tuple)])
            raise

    def read(self, raw: Mapping[str, Any]) -> Reply:
        """The text of a response's first choice, or why it has none."""
        choice = raw["choices"][0]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
        ended = reason != "length"
        if reason == "content_filter":
            return Reply("", "the endpoint's content filter withheld the text")
        if isinstance(text, str):
            return Reply(text, ended=ended)
        if text is not None:
            return Reply("", "the endpoint answered with something that is no text", ended)
        why = "" if ended else ": its tokens ran out before it"
        if isinstance(refusal := choice["message"].get("refusal"), str):
            why = f" ({shortened(refusal)})"
        return Reply("", f"the endpoint answered without a text{why}", ended)

    def usage(self, raw: Mapping[str, Any]) -> tuple[int, int]:
        """How many tokens the server counted of the prompt and of the reply; 0 where it does not say."""
        usage = raw.get("usage")
        return _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")

    def spent(self) -> Spent:
        """What was asked so far, and what it cost."""
        price = self._table.price
        cost = (self._read * price[0] + self._written * price[1]) / 1e6 if price else None
        return Spent(self._requests, self._client.retries, self._read, self._written, cost)

    def close(self) -> None:
        """End what is under way, and the thread."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = None

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
            self._thread.start()
        return self._loop

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()
        await asyncio.get_running_loop().shutdown_default_executor()

    async def _ask(self, requests: Sequence[Request], found: SimpleQueue[Any], known: Collection[int]) -> None:
        """All requests; after the first error no more are sent."""
        waiting, stopped = iter(enumerate(requests)), asyncio.get_running_loop().create_future()

        async def take() -> None:
            try:
                await self._take(waiting, found, known, stopped)
            except Exception as error:
                if not stopped.done():
                    stopped.set_result(error)

        await asyncio.gather(*(take() for _ in range(min(self._table.concurrency, len(requests)))))
        if stopped.done():
            raise stopped.result()

    async def _take(self, waiting: Numbered, found: SimpleQueue[Any], known: Collection[int], stopped: Stopped) -> None:
        """One request after another, as long as there are any and nothing has stopped the work."""
        for number, (prompt, request) in waiting:
            fields = {**self._fields, self._table.limit_field: request["max_new_tokens"]}
            try:
                fields["messages"] = await asyncio.to_thread(messages_of, prompt, request["images"])
            except DataError as error:  # An image that is no longer what it was.
                found.put((number, {"fault": error.sentence}))
                continue
            if stopped.done():
                return
            self._requests += 1
            key = key_of(self, request)
            raw = await self._client.reply(fields, key=key, of=prompt.id, tell=found.put, stopped=stopped)
            found.put((number, raw))
            if number in known:
                self._faults_in_row = 0
            self._judge(raw)
            if stopped.done():
                return

    def _judge(self, raw: Mapping[str, Any]) -> None:
        """Count a reply; DataError when too many in a row failed."""
        if "fault" not in raw:
            read, written = self.usage(raw)
            self._read, self._written = self._read + read, self._written + written
        fault = str(raw["fault"]) if "fault" in raw else sound(self.read(raw)).fault
        self._has_answered |= not fault
        self._faults_in_row = self._faults_in_row + 1 if fault else 0
        patience = self._table.give_up_after
        if fault and self._faults_in_row >= (patience if self._has_answered else min(patience, GIVE_UP_AT_ONCE)):
            raise DataError(
                f"the endpoint '{self._table.url}' is given up, as {self._faults_in_row} requests in a row failed (of the last: "
                f"{fault}); mend it, and go on with --resume, which asks for no reply a second time"
            )


def messages_of(prompt: Record, hashes: Sequence[str]) -> list[dict[str, Any]]:
    """The turns as OpenAI's messages, the images where they stand, as `data:` URLs. DataError where one cannot be opened, or is
    none with its hash."""
    images = zip(prompt.images, hashes, strict=True)
    return [{"role": turn.role, "content": _content(turn.text, images)} for turn in prompt.turns]


def _at_hand(queue: SimpleQueue[Any]) -> list[Any]:
    """What is in a queue that nobody else takes from."""
    return [queue.get() for _ in range(queue.qsize())]


def _content(text: str, images: Iterator[tuple[Image, str]]) -> str | list[dict[str, Any]]:
    first, *others = text.split(PLACE)
    if not others:
        return text
    parts = [_text_part(first)]
    for other in others:
        image, expected = next(images)
        media_type, content = shown_as(image)
        if _hash(content) != expected:  # Its reply would be kept as one about the former image.
            raise DataError(f"'{image}' was replaced while this command ran; run it again")
        url = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
        parts += [{"type": "image_url", "image_url": {"url": url}}, _text_part(other)]
    return [part for part in parts if part.get("text") != ""]


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text.strip()}


def _hash_of_file(path: Path, span: tuple[int, int] | None) -> str:
    return _hash_of_shown(Image(path, span=span))


def _hash_of_shown(image: Image) -> str:
    return _hash(shown_as(image)[1])


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _count(usage: Any, name: str) -> int:
    found = usage.get(name) if isinstance(usage, dict) else None
    return found if type(found) is int and 0 <= found < 1 << 40 else 0
