"""A data source: chat messages, one record a line, as OpenAI's and ShareGPT's users write them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.contracts import BadRecord, DataSource, Record, hookimpl, setting
from graftwork.data import (
    ImageFiles,
    ImageFolder,
    files_at,
    first_object,
    first_records,
    make_records,
    missing_files,
    read_json_lines,
    read_messages,
    to_messages,
    write_json_lines,
)


@dataclass(frozen=True)
class MessagesSettings:
    """Where the messages and their images are."""

    path: Path | None = setting(None, "The file of one record a line, or a folder of such files that end in .jsonl")
    image_folder: Path | None = setting(None, "What image paths are relative to; by default the folder of each file")
    limit: int | None = setting(None, "Read only so many records, from the first", minimum=1)
    group: str = setting("", "The group under which these records are counted")
    open_questions: bool = setting(False, "Also read records that end with a question, which makers can answer")


class MessagesJsonl(DataSource[MessagesSettings]):
    """Chat messages with images, as `messages` or `conversations`, one record a line"""

    name = "messages-jsonl"
    Settings = MessagesSettings

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By the names of its first line: messages, or turns that have roles."""
        first = first_object(path)
        turns = first.get("conversations")
        return "messages" in first or (
            isinstance(turns, list) and any("role" in t for t in turns if isinstance(t, dict))
        )

    def validate(self, plan: object) -> Iterable[str]:
        return missing_files(self.settings, "path")

    def records(self) -> Iterator[Record | BadRecord]:
        """The records of each file in turn."""
        return first_records((item for file in self.files() for item in self._of(file)), self.settings.limit)

    def files(self) -> Sequence[Path]:
        """The file, or those of the folder."""
        return files_at(self.settings, ".jsonl")

    @classmethod
    def write(cls, records: Iterable[Record], folder: Path) -> Path:
        """`messages` of `role` and `content`, with the paths of their `images`."""
        name_of = ImageFiles(folder).name_of
        lines = (to_messages(record, list(map(name_of, record.images))) for record in records)
        return write_json_lines(folder / "records.jsonl", lines)

    def _of(self, file: Path) -> Iterator[Record | BadRecord]:
        folder = ImageFolder(self.settings.image_folder or file.parent)

        def make(where: str, content: Mapping[str, Any]) -> Record:
            asked = self.settings.open_questions
            return read_messages(content, folder, where=where, group=self.settings.group, open_questions=asked)

        return make_records(read_json_lines(file), make)


@hookimpl
def data_sources() -> list[type[DataSource[Any]]]:
    return [MessagesJsonl]
