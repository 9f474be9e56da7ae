"""One request to a server with OpenAI's interface: attempts with a deadline each, and what every failure means."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from graftwork.config.tables import EndpointTable
from graftwork.config.writers import is_loopback
from graftwork.data.store import as_line
from graftwork.errors import DataError

FIRST_WAIT, MAX_WAIT = 0.5, 8.0
"""Seconds before the second attempt; twice as many before each further one, up to the second number."""
MAX_ASKED_WAIT = 120.0
"""How many seconds of waiting a server may ask for."""
AGAIN = {408, 409, 429}
"""The statuses below 500 after which the same request may be answered."""
MAX_SAID = 200
MAX_BYTES, MAX_ERROR_BYTES = 16 * 2**20, 2**16
"""How long a response may be, and how much is read of one without a good status; a server may send without an end."""
HEADERS = {
    *("accept", "accept-encoding", "connection", "content-length", "content-type", "host"),
    *("idempotency-key", "user-agent", "x-stainless-raw-response"),
}
"""What is sent. The client adds others, some of them from the environment; the last one it looks for itself."""


Stopped = asyncio.Future[Exception]
"""Done when something has stopped the work: no request is sent any more, and none is sent again."""


class Failed(Exception):
    """An attempt that failed."""

    def __init__(self, clause: str, *, again: bool = True, wait: float | None = None) -> None:
        self.clause, self.again, self.wait = clause, again, wait


class BadStatus(Exception):
    """A response without a good status: the status, its headers, and the beginning of its text."""


class Client:
    """The client of an endpoint, which belongs to one event loop. Made without its package or its key, it is a DataError."""

    def __init__(self, table: EndpointTable) -> None:
        if find_spec("openai") is None:
            raise DataError("an endpoint needs the package openai, which is missing: pip install 'graftwork[endpoint]'")
        self._table, self._key = table, _key_of(table)
        self._client: Any = None
        self.retries, self._has_told = 0, False

    async def reply(
        self, fields: Mapping[str, Any], *, key: str, of: str, tell: Callable[[str], None], stopped: Stopped
    ) -> Mapping[str, Any]:
        """The body of the response to a request about the record `of`, or the fault that its last attempt ended in.

        `key` lets a server know a request again that it has answered already. DataError for what no attempt mends.
        """
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._body(await self._attempt(fields, key, of))
            except Failed as failure:
                wait = min(FIRST_WAIT * 2.0 ** min(attempt - 1, 9), MAX_WAIT) * random.uniform(0.75, 1)
                wait = wait if failure.wait is None else failure.wait
                clause = failure.clause
                if wait > MAX_ASKED_WAIT:
                    clause += f" and asks to wait {wait:,.0f} seconds"
                elif failure.again and attempt <= self._table.retries and not stopped.done():
                    if not self._has_told:
                        tell(f"{clause}; it is asked again, later each time")
                    self._has_told = True
                    await asyncio.wait([stopped], timeout=wait)
                    if not stopped.done():
                        self.retries += 1
                        continue
                return {"fault": clause + f", at the last of {attempt} attempts" * (attempt > 1)}

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()

    async def _attempt(self, fields: Mapping[str, Any], key: str, of: str) -> bytes:
        """The bytes of a good status."""
        import openai

        self._client = self._client or self._connect()
        ask = self._client.chat.completions.with_streaming_response.create
        also = {"extra_body": self._table.extra, "extra_headers": {"Idempotency-Key": key}}
        try:
            async with asyncio.timeout(self._table.timeout), ask(**fields, **also) as response:
                return await self._read(response)
        except TimeoutError:
            raise Failed(f"the endpoint did not answer within {self._table.timeout:g} seconds") from None
        except (BadStatus, openai.APIConnectionError) as error:
            found = error if isinstance(error, BadStatus) else error.__cause__  # openai 2 wraps it, and 3 does not.
            if not isinstance(found, BadStatus):
                raise self._no_answer(found or error) from None
            status, headers, said = found.args
            what = f"answered {status} ({self._said(said)})"
            if status in AGAIN or status >= 500:
                raise Failed(f"the endpoint {what}", wait=asked_wait(headers)) from None
            raise DataError(self._refusal(status, what, headers.get("location"), of)) from None

    async def _read(self, response: Any) -> bytes:
        content = bytearray()
        try:
            async for piece in response.iter_bytes():
                content += piece
                if len(content) > MAX_BYTES:
                    break
        except Exception as error:  # Of the HTTP library, which is another one in openai 2 than in 3.
            raise self._no_answer(error) from None
        if len(content) > MAX_BYTES:
            raise Failed(f"the endpoint answered with more than {MAX_BYTES // 2**20} MiB", again=False)
        return bytes(content)

    def _no_answer(self, error: BaseException) -> Failed:
        return Failed(f"no answer came from the endpoint ({self._said(str(error)) or type(error).__name__})")

    def _connect(self) -> Any:
        import openai

        try:
            http = openai.DefaultAsyncHttpxClient(
                trust_env=not is_loopback(self._table.url),  # The environment's proxies do not reach this machine.
                follow_redirects=False,
                timeout=None,
                event_hooks={"request": [self._keep_to_ours], "response": [_refuse_bad_status]},
            )
            # The client insists on some key.
            return openai.AsyncOpenAI(
                api_key="none", base_url=self._table.url, max_retries=0, timeout=None, http_client=http
            )
        except Exception as error:  # Of any type, for an address, a proxy or a file of certificates.
            raise DataError(
                f"no client can be made for the endpoint '{self._table.url}' ({self._said(str(error))}); check 'url', and the proxies "
                "and certificates that the environment names"
            ) from error

    async def _keep_to_ours(self, request: Any) -> None:
        """Send no header that the client has from elsewhere, and the key of the table or none."""
        for name in {name.lower() for name in request.headers} - HEADERS:
            del request.headers[name]
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"

    def _refusal(self, status: int, what: str, moved: str | None, of: str) -> str:
        """The sentence about a status that no further attempt mends."""
        table = self._table
        # What says whose replies these are is part of what --resume compares; the name of a key is not.
        anew = "correct that, and start again: what was answered is kept, and the same is not asked again"
        if status in (401, 403):
            to_do = "name the environment variable that holds its key in 'key_from', and go on with --resume"
            if table.key_from:
                variable = f"environment variable '{table.key_from}', which 'key_from' names"
                to_do = f"check the key in the {variable}, and go on with --resume"
        elif status == 404:
            to_do = f"check that it has the model '{table.model}', and that 'url' is its base address, which mostly ends in /v1; {anew}"
        elif status < 400:
            to_do = f"it has moved to '{self._said(moved or '?')}'; write its base address there in 'url'; {anew}"
        else:
            to_do = f"check the record, and 'model' and 'extra' of the endpoint; {anew}"
        return f"the endpoint '{table.url}' {what} when it was asked about record '{of}'; {to_do}"

    def _said(self, text: str) -> str:
        """What a server says, on one line, without the key."""
        return shortened(text, self._key)

    def _body(self, content: bytes) -> Mapping[str, Any]:
        """The plain data of a response, which has a choice with a message."""
        if not content.strip():
            raise Failed("the endpoint answered with nothing")
        if content.lstrip().startswith(b"<"):
            raise Failed("the endpoint answered with a web page instead of JSON")
        try:
            raw = json.loads(content)
            as_line(raw)
        except (ValueError, RecursionError) as error:
            raise Failed(f"the endpoint answered with JSON that breaks off or is damaged ({error})") from None
        except DataError as error:
            raise Failed(f"the endpoint's answer cannot be kept: {error.sentence}", again=False) from None
        if isinstance(raw, dict) and raw.get("error"):
            raise Failed(f"the endpoint answered with an error ({self._said(content.decode(errors='replace'))})")
        choices = raw.get("choices") if isinstance(raw, dict) else None
        first = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(first, dict) or not isinstance(first.get("message"), dict):
            raise Failed("the endpoint answered with JSON that has no choice with a message", again=False)
        return dict(raw)


async def _refuse_bad_status(response: Any) -> None:
    """BadStatus for what is no good one; the client itself would read all of its text, however long it is."""
    if 200 <= response.status_code < 300:
        return
    content = bytearray()
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > MAX_ERROR_BYTES:
            break
    raise BadStatus(response.status_code, response.headers, content[:MAX_ERROR_BYTES].decode(errors="replace"))


def _key_of(table: EndpointTable) -> str:
    """The key, from the environment; empty where none is sent."""
    if table.key_from is None:
        return ""
    key = os.environ.get(table.key_from, "").strip()
    if not key:
        raise DataError(
            f"'key_from' names the environment variable '{table.key_from}', which is not set; put the endpoint's key there"
        )
    if not key.isascii() or not key.isprintable():
        raise DataError(f"the environment variable '{table.key_from}' holds characters that no key has; set it anew")
    return key


def shortened(text: str, secret: str = "") -> str:
    """What a server says of an error: the message in its JSON, or the text, on one short line without the secret."""
    content: Any = text
    with suppress(ValueError, RecursionError):
        content = json.loads(text)
    for name in ("error", "message", "detail"):
        if isinstance(content, dict) and content.get(name):
            content = content[name]
    text = str(content).replace(secret, "[key]") if secret else str(content)
    if text.lstrip().startswith("<"):
        return "a web page"
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text[: 20 * MAX_SAID]).split())
    return text if len(text) <= MAX_SAID else text[: MAX_SAID - 1] + "…"


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """How many seconds a server wants to be left alone, from its headers."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1)):
        with suppress(ValueError):
            seconds = float(headers.get(name, "")) * unit
            return seconds if seconds >= 0 else None
    with suppress(ValueError, OverflowError):
        moment = email.utils.parsedate_tz(headers.get("retry-after", ""))
        return max(0.0, email.utils.mktime_tz(moment) - time.time()) if moment else None
    return None
