"""A data source: conversations about images in LLaVA's JSON format, as a list or one record a line."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftwork.contracts import BadRecord, DataSource, Image, MissingFile, Record, Turn, hookimpl, setting
from graftwork.data import is_file, path_below
from graftwork.errors import DataError

MAX_BYTES = 8 * 2**30
"""The file is read as a whole; a larger one is more often a mistake than a data set."""

ROLES: dict[str, Literal["system", "user", "assistant"]] = {"system": "system", "human": "user", "gpt": "assistant"}
SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class LlavaJsonSettings:
    """Where the conversations and their images are."""

    path: Path | None = setting(None, "The file: a list (.json) or one record a line (.jsonl)")
    image_folder: Path | None = setting(None, "What image paths are relative to; by default the folder of the file")
    limit: int | None = setting(None, "Read only so many records, from the first", minimum=1)
    group: str = setting("", "The group under which these records are counted")


class LlavaJson(DataSource[LlavaJsonSettings]):
    """Conversations about images in LLaVA's JSON format"""

    name = "llava-json"
    Settings = LlavaJsonSettings

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By the end of its name."""
        return path.suffix.lower() in READERS and path.is_file()

    def validate(self, plan: object) -> Iterable[str]:
        if self.settings.path is None:
            yield "'path' is not set; name the .json or .jsonl file"
        elif not self.settings.path.is_file():
            yield MissingFile(f"there is no file '{self.settings.path}'; correct 'path'")

    def records(self) -> Iterator[Record | BadRecord]:
        """The file's records in order; DataError when the file as a whole cannot be read."""
        path = self.settings.path
        if path is None:
            raise DataError("'llava-json' has no 'path'; name the .json or .jsonl file")
        if path.suffix.lower() not in READERS:
            raise DataError(f"'{path}' ends neither in .json (a list) nor in .jsonl (one record a line); rename it")
        folder = ImageFolder(self.settings.image_folder or path.parent)
        left = self.settings.limit
        for item in READERS[path.suffix.lower()](path, _text(path)):
            if isinstance(item, BadRecord):
                yield item
                continue
            name, where, content = item
            try:
                record = _record(content, name, where, folder, self.settings.group)
            except DataError as error:
                yield BadRecord(where, error.sentence)
                continue
            yield record
            if left is not None:
                left -= 1
                if not left:
                    return


@hookimpl
def data_sources() -> list[type[DataSource[Any]]]:
    return [LlavaJson]


# The file -------------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise DataError(f"there is no file '{path}'; correct 'path'")
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"'{path}' is larger than {MAX_BYTES // 2**30} GiB; split it into several files")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error.strerror})") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"'{path}' is not UTF-8 text (line {line}); is it the right file?") from None


def _elements(path: Path, text: str) -> Iterator[tuple[str, str, Any] | BadRecord]:
    """The number, place and value of each element of a JSON list, as far as it can be read."""
    decode = json.JSONDecoder().raw_decode
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        raise DataError(f"'{path}' does not hold a JSON list; if it has one record a line, let its name end in .jsonl")
    line, counted, number = 1, 0, 0
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]":
        number += 1
        line += text.count("\n", counted, at)
        counted = at
        where = f"{path}:{line} (record {number})"
        try:
            content, at = decode(text, at)
        except (ValueError, RecursionError) as error:
            yield BadRecord(where, f"from here on the file is not JSON ({_reason(error)}); is it cut off?")
            return
        yield str(number), where, content
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            yield BadRecord(where, "after this record comes neither a comma nor ']', so the rest is not read")
            return
    if _skip(text, at + 1) < len(text):
        yield BadRecord(f"{path}:{text.count(chr(10), 0, at) + 1}", "what comes after the end of the list is not read")


def _lines(path: Path, text: str) -> Iterator[tuple[str, str, Any] | BadRecord]:
    """The number, place and value of each line that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines also splits at U+2028, which JSON allows
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield str(number), where, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield BadRecord(where, f"the line is not JSON ({_reason(error)})")


def _skip(text: str, at: int) -> int:
    match = SPACE.match(text, at)
    return match.end() if match else at


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


READERS = {".json": _elements, ".jsonl": _lines}
"""By what a file's name ends in."""


# A record -------------------------------------------------------------------------------------------------------------


def _record(content: Any, number: str, where: str, folder: ImageFolder, group: str) -> Record:
    """The record; DataError says why the content is none."""
    if not isinstance(content, dict):
        raise DataError(f"the record is {_named(content)}, not an object")
    name = content.get("id")
    if name is not None and type(name) not in (str, int):
        what = json.dumps(name) if isinstance(name, bool | float) else _named(name)
        raise DataError(f"'id' is {what}, not a string or an integer")
    if "conversations" not in content and "messages" in content:
        raise DataError(
            "the record has 'messages', which is another format; give 'conversations' of 'from' and 'value'"
        )
    turns = _turns(content.get("conversations"))
    images = _images(content, folder)
    for role, what in (("assistant", "an answer"), ("system", "the system turn")):
        if any("<image>" in turn.text for turn in turns if turn.role == role):
            raise DataError(f"'<image>' stands in {what}; only questions have images")
    places = sum("<image>" in turn.text for turn in turns)
    if places != len(images):
        counts = f"turns with '<image>' in the conversation: {places}, images of the record: {len(images)}"
        raise DataError(f"{counts}; they must be equal")
    id = number if name in (None, "") else _unicode("id", str(name))
    return Record(id, turns, images, group=group, where=where)


def _turns(conversation: Any) -> tuple[Turn, ...]:
    if not isinstance(conversation, list) or not conversation:
        raise DataError("'conversations' is missing or is not a list of turns")
    turns = [_turn(turn, number) for number, turn in enumerate(conversation, start=1)]
    system = [turns.pop(0)] if turns[0].role == "system" else []
    if turns and turns[0].role == "assistant":  # An answer without a question, which LLaVA drops as well.
        del turns[0]
    for number, turn in enumerate(turns):
        if turn.role == "system":
            raise DataError("a 'system' turn stands behind other turns; only the first may be one")
        if turn.role != ("user", "assistant")[number % 2]:
            raise DataError("the turns of 'human' and 'gpt' do not alternate")
    if not turns or turns[-1].role == "user":
        raise DataError("the last turn is not an answer of 'gpt'")
    return (*system, *turns)


def _turn(turn: Any, number: int) -> Turn:
    if not isinstance(turn, dict):
        raise DataError(f"turn {number} is {_named(turn)}, not an object")
    role, text = turn.get("from"), turn.get("value")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"turn {number} is from {role!r}, neither 'human' nor 'gpt', nor 'system'")
    if text is not None and not isinstance(text, str):
        raise DataError(f"'value' of turn {number} is {_named(text)}, not a text")
    if text is None or not text.strip():
        raise DataError(f"turn {number} has no text in 'value'")
    if text.count("<image>") > 1:  # One image, for which upstream keeps one place, at the beginning.
        text = f"<image>\n{text.replace('<image>', '').strip()}"
    return Turn(ROLES[role], _unicode(f"turn {number}", text))


def _images(content: dict[str, Any], folder: ImageFolder) -> tuple[Image, ...]:
    for key in ("images", "video", "videos"):
        if content.get(key):
            raise DataError(f"'{key}' is not supported; give one image as 'image'")
    given = content.get("image")
    names = given if isinstance(given, list) else [] if given is None else [given]
    if len(names) > 1:
        raise DataError(f"the record has {len(names)} images; only one is supported")
    return tuple(map(folder.image, names))


class ImageFolder:
    """Where images are looked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: dict[Path, dict[str, str]] = {}

    def image(self, name: Any) -> Image:
        """The image that a record names; DataError says why there is none."""
        if not isinstance(name, str):
            raise DataError(f"'image' is {_named(name)}, not a path")
        if not name.strip():
            raise DataError("'image' is empty; name the file, or leave it out of a record about text only")
        if "://" in name:
            raise DataError(f"the image '{_unicode('image', name)}' is an address, not a path; download it")
        path = path_below(self.path, _unicode("image", name))
        if path is None:
            raise DataError(f"the image path '{name}' leads out of the image folder; make it relative to that")
        for each in (path, *(self.path / other for other in _also_known_as(name))):
            if is_file(each):
                return Image(each)
        raise DataError(f"there is no image '{path}'; {self._hint(path)}")

    def _hint(self, path: Path) -> str:
        """What to do about a path at which there is no image."""
        if "\\" in path.name and is_file(other := Path(str(path).replace("\\", "/"))):
            return f"with '/' for '\\' it is '{other}'"
        try:
            if path.is_dir():
                return "that is a folder; name a file in it"
            if path.parent not in self._names:
                self._names[path.parent] = {_folded(each.name): each.name for each in path.parent.iterdir()}
        except (OSError, ValueError):
            return "check 'image_folder'"
        if found := self._names[path.parent].get(_folded(path.name)):
            return f"there is '{found}', whose name has other capitals or another Unicode form; use that"
        return "check 'image_folder'"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _also_known_as(name: str) -> Iterator[str]:
    """Where else upstream looks for an image: OCR-VQA's may be PNG, and Visual Genome's two folders may be one."""
    if "ocr" in name and name.endswith(".jpg"):
        yield f"{name.removesuffix('.jpg')}.png"
    if "VG_100K" in name:
        yield name.replace("VG_100K_2", "images").replace("VG_100K", "images")


def _unicode(what: str, text: str) -> str:
    """The text; DataError when it holds half of a surrogate pair, which no tokenizer or file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} holds a lone surrogate, which is not text") from None
    return text


def _named(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
