"""A data source: a data set that `graftwork data process` wrote, whose files are as it wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.contracts import BadRecord, DataSource, Record, hookimpl, setting
from graftwork.data import MANIFEST, RECORDS, is_data_set, missing_files, read_data_set, required


@dataclass(frozen=True)
class CuratedSettings:
    """Where the data set is."""

    path: Path | None = setting(None, "The folder of the data set")


class Curated(DataSource[CuratedSettings]):
    """A data set that graftwork data process wrote, every record with its origin"""

    name = "curated"
    Settings = CuratedSettings

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By the names of the files in it."""
        return is_data_set(path)

    def validate(self, plan: object) -> Iterable[str]:
        yield from missing_files(self.settings, "path")
        path = self.settings.path
        if path and path.exists() and not is_data_set(path):
            yield f"'{path}' is no data set with {MANIFEST} and {RECORDS}; write one with graftwork data process"

    def records(self) -> Iterator[Record | BadRecord]:
        """The records as they were written; DataError when a file is another than was written."""
        return read_data_set(required(self.settings, "path"))

    def files(self) -> Sequence[Path] | None:
        """The manifest, which holds the hashes of all others, and the records."""
        path = required(self.settings, "path")
        return [path / MANIFEST, path / RECORDS]


@hookimpl
def data_sources() -> list[type[DataSource[Any]]]:
    return [Curated]
