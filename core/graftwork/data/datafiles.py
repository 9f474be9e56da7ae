"""Reading the files of a data set: paths in settings, JSON, objects made records, and images, with every mistake at its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from graftwork.contracts.component import MissingFile
from graftwork.contracts.records import BadRecord, Image, Record
from graftwork.data.texts import type_name
from graftwork.errors import DataError

T = TypeVar("T")


def missing_files(settings: Any, *names: str) -> Iterator[str]:
    """A clause for each of these settings, all of them paths, that is not set or leads nowhere; for `validate`."""
    for name in names:
        path: Path | None = getattr(settings, name)
        if path is None:
            yield f"'{name}' is not set"
        elif not path.exists():
            yield MissingFile(f"'{name}' is '{path}', which does not exist")


def required(settings: Any, name: str) -> Path:
    """The path that a setting holds; DataError when it is not set or leads nowhere."""
    for clause in missing_files(settings, name):
        raise DataError(f"{clause}; set it to where the data is")
    path: Path = getattr(settings, name)
    return path


def files_at(settings: Any, suffix: str) -> list[Path]:
    """The file that the setting `path` names, or the files in that folder whose names end so, sorted; DataError without any."""
    path = required(settings, "path")
    try:
        found = sorted(each for each in path.iterdir() if each.name.endswith(suffix)) if path.is_dir() else [path]
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error.strerror}); correct the path") from None
    if not found:
        raise DataError(f"the folder '{path}' has no file that ends in {suffix}; correct 'path'")
    return found


def write_json_lines(file: Path, objects: Iterable[Mapping[str, Any]]) -> Path:
    """Write an object a line into a new file, in whose folder it makes room, and return it; equal objects give equal bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="\n") as lines:
        for content in objects:
            lines.write(json.dumps(content, ensure_ascii=False) + "\n")
    return file


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with line ends as `\\n`; DataError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error.strerror}); correct the path") from None
    except UnicodeDecodeError:
        raise DataError(f"'{path}' is not UTF-8 text; is it the right file?") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds; DataError when it is not JSON."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is not JSON ({error}); is it the right file, and whole?") from None


def make_records(
    items: Iterable[tuple[str, Any]], make: Callable[[str, Mapping[str, Any]], Record]
) -> Iterator[Record | BadRecord]:
    """The record that `make` builds from each item's place and object; a BadRecord for its DataError, or for no object."""
    for where, content in items:
        if isinstance(content, BadRecord):
            yield content
        elif not isinstance(content, Mapping):
            yield BadRecord(where, f"the record is {type_name(content)}, not an object")
        else:
            try:
                yield make(where, content)
            except DataError as error:
                id = content.get("id")
                known = str(id) if isinstance(id, str) or type(id) is int else ""
                yield BadRecord(where, error.sentence, known, missing=getattr(error, "path", None))


def member(content: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """A member of a JSON object; DataError when it is missing or of another type."""
    value = content.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"'{name}' is missing, or is not {KINDS[kind]}")
    return value


def find_image(folder: Path, name: str) -> Image:
    """The image of that name in the folder; DataError when there is none, or the name leads elsewhere."""
    if not name:
        raise DataError("the image's name is empty")
    if (path := path_below(folder, name)) is None:
        raise DataError(f"the image's name '{name}' does not lie within its folder")
    if not is_file(path):
        raise DataError(f"there is no image '{path}'")
    return Image(path)


def path_below(folder: Path, name: str) -> Path | None:
    """The path that a data set means by a name: relative to its folder, or absolute and below that; None if it leads elsewhere."""
    path = folder / name
    try:
        below = path.is_relative_to(folder) or path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # A name that no file can have, or a link to itself.
        below = False
    return path if below and ".." not in Path(name).parts else None


def is_file(path: Path) -> bool:
    """Whether there is such a file."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # Too long a name, or one that holds a NUL.
        return False


KINDS: Mapping[type, str] = {str: "a string", int: "an integer", list: "a list", dict: "an object"}
