"""A data source: the images of a folder, without questions or answers, for operators that make some."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from graftwork.contracts import BadRecord, DataSource, Record, Turn, hookimpl, setting
from graftwork.data import PLACE, ImageFolder, extension_of, first_records, missing_files, required
from graftwork.errors import DataError

SUFFIXES = frozenset(["avif", "bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "png", "tif", "tiff", "webp"])
LOOKED_AT = 200
"""How many files are looked at to tell whether a folder holds images alone."""
HEADER = 16
"""How many bytes tell what kind of image a file is."""


@dataclass(frozen=True)
class ImagesSettings:
    """Where the images are."""

    path: Path | None = setting(None, "The folder, which is searched to any depth")
    question: str = setting("", "What is asked about each image; by default nothing")
    group: str = setting("", "The group under which these records are counted")
    limit: int | None = setting(None, "Read only so many records, from the first", minimum=1)


class Images(DataSource[ImagesSettings]):
    """The images of a folder, without answers

    Each becomes a record whose id is its path below the folder. Nothing can be trained on them until an operator such as
    `ask-templates` makes records of them. Files and folders whose names begin with a dot are passed over.
    """

    name = "images"
    Settings = ImagesSettings

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """A folder in which the first files, at any depth, all have names of images."""
        names = [entry.name for entry in islice(_files(path), LOOKED_AT)] if path.is_dir() else []
        return bool(names) and all(map(_is_named_as_one, names))

    def validate(self, plan: object) -> Iterable[str]:
        yield from missing_files(self.settings, "path")
        path = self.settings.path
        if path and path.exists() and not path.is_dir():
            yield f"'path' is '{path}', a file; name the folder of the images"
        if PLACE in self.settings.question:
            yield f"'question' has '{PLACE}', and the image is put in front of it; remove it"

    def records(self) -> Iterator[Record | BadRecord]:
        """A record an image, in the order of their paths; DataError where the folder cannot be read."""
        folder = required(self.settings, "path")
        if not folder.is_dir():
            raise DataError(f"'{folder}' is no folder; name the folder of the images")
        images = ImageFolder(folder)
        found = (self._record(entry, folder, images) for entry in _files(folder))
        return first_records(found, self.settings.limit)

    def _record(self, entry: os.DirEntry[str], folder: Path, images: ImageFolder) -> Record | BadRecord:
        try:
            if entry.is_dir():
                raise DataError(
                    "it is a link to a folder, which is not followed; name that folder in a source of its own"
                )
            name = Path(entry.path).relative_to(folder).as_posix()
            image = images.named(name)
            if not _is_named_as_one(name) and not _begins_like_one(entry.path):
                raise DataError(
                    "it is no image that is read, by its name and its first bytes; remove it, or convert it"
                )
        except DataError as error:
            return BadRecord(entry.path, error.sentence)
        text = f"{PLACE}\n{self.settings.question}" if self.settings.question else PLACE
        return Record(name, (Turn("user", text),), (image,), self.settings.group, where=entry.path)


@hookimpl
def data_sources() -> list[type[DataSource[Any]]]:
    return [Images]


def _files(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """The files below a folder, and links to folders, by name; what is hidden is left out."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"the folder '{folder}' cannot be read ({error.strerror}); let it be read") from None
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(entry.path)
        else:
            yield entry


def _is_named_as_one(name: str) -> bool:
    return name.rpartition(".")[2].lower() in SUFFIXES


def _begins_like_one(path: str) -> bool:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - it is a name of scandir, and there are many
            return extension_of(file.read(HEADER)) != "bin"
    except OSError as error:
        raise DataError(f"it cannot be read ({error.strerror}); let it be read, or remove it") from None
