"""JSON files of any size, read piece by piece: a list's elements, or a value a line, each with its place."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from graftwork.contracts.records import BadRecord
from graftwork.errors import DataError

CHUNK = 2**20
"""How many bytes are read at a time."""
LARGEST = 64 * 2**20
"""More than a record has, in bytes or characters; what goes on for longer is damaged, and is not searched for its end."""
SPACE = re.compile(r"[ \t\r\n]*")
BOM = codecs.BOM_UTF8

_decode = json.JSONDecoder().raw_decode


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The place, as `file:line`, and the value of each line that is not blank; a BadRecord for a line that is not JSON.

    DataError when the file cannot be opened.
    """
    with _opened(path) as file:
        # Lines end at "\n" alone: str.splitlines would also split at U+2028, which JSON allows within a text.
        for number, line in enumerate(iter(partial(file.readline, LARGEST + 1), b""), start=1):
            where = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(BOM)
            if len(line) > LARGEST:
                yield where, BadRecord(where, f"the line is longer than {LARGEST // 2**20} MiB")
                while line and not line.endswith(b"\n"):
                    line = file.readline(CHUNK)
            elif line and not line.isspace():
                try:
                    yield where, json.loads(line.decode("utf-8"))
                except UnicodeDecodeError:
                    yield where, BadRecord(where, "the line is not UTF-8 text")
                except (ValueError, RecursionError) as error:
                    yield where, BadRecord(where, f"the line is not JSON ({_reason(error)})")


def first_object(path: Path) -> dict[str, Any]:
    """The first line of a .jsonl file that is a JSON object, by which a format may be told; empty where the file is another."""
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return {}
    return next((value for _, value in islice(read_json_lines(path), 10) if isinstance(value, dict)), {})


def read_json_list(path: Path) -> Iterator[tuple[str, Any]]:
    """The place, as `file:line (record n)`, and the value of each element of a JSON list; a BadRecord from where on it is damaged.

    DataError when the file cannot be opened, holds no list or is not UTF-8.
    """
    with _opened(path) as file:
        window = _Window(path, file)
        if window.next() != "[":
            raise DataError(
                f"'{path}' does not hold a JSON list; if it has one record a line, let its name end in .jsonl"
            )
        window.at += 1
        number = 0
        while (found := window.next()) != "]":
            number += 1
            where = f"{path}:{window.line()} (record {number})"
            try:
                yield where, window.value()
            except (ValueError, RecursionError) as error:
                yield where, BadRecord(where, _damage(error, window.ended))
                return
            found = window.next()
            if found == ",":
                window.at += 1
            elif found != "]":
                what = "after this record comes neither a comma nor ']', so the rest is not read"
                yield where, BadRecord(where, what)
                return
        window.at += 1
        if window.next():
            where = f"{path}:{window.line()}"
            yield where, BadRecord(where, "what comes after the end of the list is not read")


class _Window:
    """The part of a file's text that is being read, from `at` on."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.ended = "", 0, False
        self._line, self._counted = 1, 0

    def line(self) -> int:
        """The line that `at` is in, from 1."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def next(self) -> str:
        """The next character that is no space, where `at` then is; empty at the end of the file."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # It matches no space, too.
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read(CHUNK):
                return ""

    def value(self) -> Any:
        """The JSON value at `at`, which then is behind it; ValueError or RecursionError where there is none."""
        while True:
            try:
                value, end = _decode(self.text, self.at)
            except (ValueError, RecursionError):
                end = len(self.text)  # It may end in what was not read yet.
                if self.ended or end - self.at > LARGEST:
                    raise
            if end < len(self.text) or self.ended:
                self.at = end
                return value
            # Each time twice as much, so that a large value is not decoded from its beginning over and over.
            self.read(max(CHUNK, end - self.at))

    def read(self, size: int) -> bool:
        """Read on, and forget what is before `at`; False at the end of the file."""
        content = self.file.read(size)
        self.line()
        try:
            # The end of a file may be half a character: then it was cut off, which the JSON will say.
            new = self.decoder.decode(content)
        except UnicodeDecodeError as error:
            line = self._line + self.text.count("\n", self.at) + error.object.count(b"\n", 0, error.start)
            raise DataError(f"'{self.path}' is not UTF-8 text (line {line}); is it the right file?") from None
        self.text, self.at, self._counted = self.text[self.at :] + new, 0, 0
        self.ended = not content
        return not self.ended


def _opened(path: Path) -> BinaryIO:
    try:
        if not path.is_file():  # Opening a named pipe would wait for ever.
            raise DataError(f"there is no file '{path}'; correct 'path'")
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read ({error}); correct the path") from None


def _damage(error: Exception, ended: bool) -> str:
    if ended:
        return f"from here on the file is not JSON ({_reason(error)}); is it cut off?"
    return f"from here on the file is not JSON ({_reason(error)}) within {LARGEST // 2**20} MiB; is it damaged?"


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)
