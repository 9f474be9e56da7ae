"""A data source: conversations about images in LLaVA's JSON format, as a list or one record a line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.contracts import BadRecord, DataSource, MissingFile, Record, Turn, hookimpl, setting
from graftwork.data import (
    LLAVA_ROLES,
    ImageFiles,
    ImageFolder,
    conversation,
    first_object,
    first_records,
    images_of,
    make_records,
    mark_of,
    plain_text,
    read_json_lines,
    read_json_list,
    refuse_moving,
    to_object,
    type_name,
    write_json_lines,
)
from graftwork.errors import DataError

READERS = {".json": read_json_list, ".jsonl": read_json_lines}


@dataclass(frozen=True)
class LlavaJsonSettings:
    """Where the conversations and their images are."""

    path: Path | None = setting(None, "The file: a list (.json) or one record a line (.jsonl)")
    image_folder: Path | None = setting(None, "What image paths are relative to; by default the folder of the file")
    limit: int | None = setting(None, "Read only so many records, from the first", minimum=1)
    group: str = setting("", "The group under which these records are counted")
    open_questions: bool = setting(False, "Also read records that end with a question, which makers can answer")


class LlavaJson(DataSource[LlavaJsonSettings]):
    """Conversations about images in LLaVA's JSON format"""

    name = "llava-json"
    Settings = LlavaJsonSettings

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By the end of its name; one record a line by the names of its turns' parts."""
        if path.suffix.lower() == ".json" and path.is_file():
            return True
        turns = first_object(path).get("conversations")
        return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]

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

        def make(where: str, content: Mapping[str, Any]) -> Record:
            return _record(content, where, folder, self.settings)

        return first_records(make_records(READERS[path.suffix.lower()](path), make), self.settings.limit)

    def files(self) -> Sequence[Path] | None:
        """The file."""
        return [self.settings.path] if self.settings.path else None

    @classmethod
    def write(cls, records: Iterable[Record], folder: Path) -> Path:
        """One record a line."""
        name_of = ImageFiles(folder).name_of
        return write_json_lines(folder / "records.jsonl", (to_object(record, name_of) for record in records))


@hookimpl
def data_sources() -> list[type[DataSource[Any]]]:
    return [LlavaJson]


def _record(content: Mapping[str, Any], where: str, folder: ImageFolder, settings: LlavaJsonSettings) -> Record:
    """The record; DataError says why the object is none."""
    if "conversations" not in content and "messages" in content:
        raise DataError("the record has 'messages', which is another format; read it with 'messages-jsonl'")
    refuse_moving(content)
    given = content.get("conversations")
    if not isinstance(given, list) or not given:
        raise DataError("'conversations' is missing or is not a list of turns")
    turns = [_turn(turn, number) for number, turn in enumerate(given, start=1)]
    return conversation(
        content,
        turns,
        images_of(content, folder),
        where=where,
        group=settings.group,
        names=("human", "gpt"),
        open_questions=settings.open_questions,
    )


def _turn(turn: Any, number: int) -> Turn:
    if not isinstance(turn, dict):
        raise DataError(f"turn {number} is {type_name(turn)}, not an object")
    name, text = turn.get("from"), turn.get("value")
    if not isinstance(name, str) or (role := LLAVA_ROLES.get(name)) is None:
        raise DataError(f"turn {number} is from {name!r}, neither 'human' nor 'gpt', nor 'system'")
    if text is not None and not isinstance(text, str):
        raise DataError(f"'value' of turn {number} is {type_name(text)}, not a text")
    if text is None or not text.strip():
        raise DataError(f"turn {number} has no text in 'value'")
    # What has two keys has no mark.
    return Turn(role, plain_text(f"turn {number}", text), mark_of(turn, role, number) if len(turn) > 2 else None)
