"""A data set on disk, of which the origin of every record is known: what processing writes, and how it is read again."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from graftwork.contracts.records import BadRecord, Image, Record
from graftwork.data.cache import known_hashes
from graftwork.data.datafiles import is_file, path_below
from graftwork.data.imagefolders import ImageFiles
from graftwork.data.lines import from_object, own_part, to_object
from graftwork.data.pipeline import PipelineResult, common_lines
from graftwork.data.store import DROPPED, RECORDS, REPLIES, LineWriter, RecordStore, ends_of, paths_of
from graftwork.errors import DataError, NoImage
from graftwork.weights import sha256

FORMAT = 1
MANIFEST, CHANGED = "manifest.json", "changed.jsonl"
KEYS: Mapping[str, type] = {"format": int, "files": dict, "image_folder": dict, "stages": list, "records": int}
"""What a manifest cannot do without."""
COPIED = re.compile(r"images/[0-9a-f]{2}/[0-9a-f]{64}\.\w+")
"""The names of images that lie in the data set, by the hash of their bytes."""


class Written(NamedTuple):
    """What was written of a data set, for its manifest."""

    image_folder: str
    """What the names of images that were not copied are relative to, absolute; empty where all were copied."""
    changed: Sequence[int]
    """How many records each operator changed."""


def write_data_set(result: PipelineResult, folder: Path, *, copy: bool) -> Written:
    """Write records, what was dropped and what was changed into an empty folder.

    With `copy` all images are copied; else only those that lie in no file of their own. OSError where there is no room.
    """
    image_folder = "" if copy else _common_folder(result)
    name_of = lru_cache(1 << 16)(_Naming(folder, image_folder))
    records = LineWriter(folder / RECORDS)
    try:
        for record in result.records:
            records.add(to_object(replace(record, source=0), name_of))
        records.complete()
    finally:
        records.close()
    ends_of(folder / RECORDS).unlink()
    _join([stage / DROPPED for stage in result.folders], folder / DROPPED)
    if replies := [file for stage in result.folders if (file := stage / REPLIES).exists()]:
        _join(replies, folder / REPLIES)
    return Written(image_folder, _write_changes(result, folder / CHANGED))


def _join(parts: Sequence[Path], file: Path) -> None:
    """Write files, one after another, as one."""
    with file.open("wb") as to:
        for part in parts:
            with part.open("rb") as lines:
                shutil.copyfileobj(lines, to)
        os.fsync(to.fileno())


def _common_folder(result: PipelineResult) -> str:
    """The folder in which all image files of the records lie; empty where there are none."""
    common = ""
    for path in paths_of(result.folders[-1]):
        parent = os.path.dirname(path)  # noqa: PTH120 — a path a record.
        common = os.path.commonpath([common, parent]) if common else parent
    return common


class _Naming:
    """How the records of a data set name images: where they are, below `image_folder` if there is one, or as copies."""

    def __init__(self, folder: Path, image_folder: str) -> None:
        self.files, self.image_folder = ImageFiles(folder), image_folder

    def __call__(self, image: Image) -> str:
        if image.path and not image.span and self.image_folder:
            return os.path.relpath(image.path, self.image_folder)
        return self.files.name_of(image)


def _write_changes(result: PipelineResult, file: Path) -> list[int]:
    """Write what operators changed, a line for each turn; returns how many records each of them changed."""
    changes, counts = LineWriter(file), []
    try:
        for number, folder in enumerate(result.folders[1:]):
            before = RecordStore(result.folders[number], result.folder)
            after = RecordStore(folder, result.folder)
            stage, changed = result.stages[number - len(result.folders) + 1].name, 0
            for old, new in common_lines(before, after):
                if old != new:
                    changed += 1
                    for row in _changes(before.parse(old), after.parse(new)):
                        changes.add({"id": row[0], "turn": row[1], "stage": stage, "before": row[2], "after": row[3]})
            counts.append(changed)
        changes.complete()
    finally:
        changes.close()
    ends_of(file).unlink()
    return counts


def _changes(old: Record, new: Record) -> Iterator[tuple[str, int | None, Any, Any]]:
    """The id, the number of the turn from 0, and what stood there before and after; no number for what is in no turn."""
    for number in range(max(len(old.turns), len(new.turns))):
        texts = [each.turns[number].text if number < len(each.turns) else None for each in (old, new)]
        if texts[0] != texts[1]:
            yield new.id, number, texts[0], texts[1]
    rest = [{**own_part(each), "images": [image.key for image in each.images]} for each in (old, new)]
    if rest[0] != rest[1]:
        yield new.id, None, rest[0], rest[1]


# Reading ----------------------------------------------------------------------------------------------------------------


def is_data_set(folder: Path) -> bool:
    """Whether a folder is one that processing wrote, as far as its names tell."""
    return (folder / MANIFEST).is_file() and (folder / RECORDS).is_file()


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """The manifest of a data set; DataError when it is none, or of another format, or its files are not as they were written."""
    if not is_data_set(folder):
        raise DataError(
            f"'{folder}' is no data set: it needs {MANIFEST} and {RECORDS}; write one with graftwork data process"
        )
    damaged = f"'{folder / MANIFEST}' is damaged; write the data set again"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(damaged) from None
    if isinstance(manifest, Mapping) and manifest.get("format", FORMAT) != FORMAT:
        raise DataError(
            f"'{folder}' is a data set of format {manifest['format']}, and this Graftwork reads {FORMAT}; upgrade it"
        )
    if not isinstance(manifest, Mapping) or any(not isinstance(manifest.get(n), t) for n, t in KEYS.items()):
        raise DataError(damaged)
    try:
        hashes = known_hashes(folder / name for name in manifest["files"])
        changed = [name for name, known in manifest["files"].items() if hashes[str(folder / name)] != known["sha256"]]
    except OSError as error:
        raise DataError(f"the data set '{folder}' is damaged ({error}); write it again") from None
    except (KeyError, TypeError):
        raise DataError(damaged) from None
    if changed:
        other = ", or read the file as another source, such as llava-json" if changed[0] == RECORDS else ""
        raise DataError(
            f"'{folder / changed[0]}' was changed since the data set was written; put the old one back, make it again{other}"
        )
    content: Mapping[str, Any] = manifest
    return content


def read_data_set(folder: Path) -> Iterator[Record | BadRecord]:
    """The records of a data set; a BadRecord for one whose image is not there. DataError as `read_manifest`."""
    image_folders = _image_folders(read_manifest(folder), folder)

    @lru_cache(1 << 16)
    def find(name: str) -> Image:
        for parent, path in _places(image_folders, name):
            if is_file(path):
                if parent == folder and COPIED.fullmatch(name) and sha256(path) != path.stem:
                    raise DataError(
                        f"the image '{path}' was changed since the data set was written; put the old one back"
                    )
                return Image(path)
        raise NoImage(image_folders[:2][-1] / name, "put it back")

    with (folder / RECORDS).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            content = json.loads(line)
            try:
                yield from_object(content, find)
            except NoImage as error:
                yield BadRecord(f"{folder / RECORDS}:{number}", error.sentence, content["id"], missing=error.path)
            except DataError as error:
                yield BadRecord(f"{folder / RECORDS}:{number}", error.sentence, content["id"])


def image_paths(manifest: Mapping[str, Any], folder: Path, names: str | Sequence[str]) -> list[Path]:
    """Where the images lie that a record of a data set names; those that are nowhere are left out."""
    folders = _image_folders(manifest, folder)
    found = [
        [path for _, path in _places(folders, name) if is_file(path)]
        for name in ([names] if isinstance(names, str) else names)
    ]
    return [paths[0] for paths in found if paths]


def _places(folders: Sequence[Path], name: str) -> Iterator[tuple[Path, Path]]:
    """Where an image may be, each with the folder that it is below."""
    for parent in folders:
        if path := path_below(parent, name):
            yield parent, path


def _image_folders(manifest: Mapping[str, Any], folder: Path) -> list[Path]:
    """Where images are looked for, in turn: in the data set, where they lay beside it when it was written, and where they were."""
    given = manifest["image_folder"]
    return [folder, folder / given["relative"], Path(given["path"])] if given["path"] else [folder]


def manifest_of(folder: Path, written: Written, place: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the data set in a folder that is to be moved to `place`, with this content beside what is known of its
    files."""
    image_folder = {
        "path": written.image_folder,
        "relative": written.image_folder and os.path.relpath(written.image_folder, place),
    }
    files = {
        name: {"bytes": size, "sha256": digest}
        for name in (RECORDS, DROPPED, CHANGED, REPLIES)
        if (folder / name).exists()
        for size, digest in [((folder / name).stat().st_size, sha256(folder / name))]
    }
    return {"format": FORMAT, **content, "image_folder": image_folder, "files": files}


def stage_rows(result: PipelineResult, written: Written, settings: Sequence[Any]) -> list[dict[str, Any]]:
    """What each stage did, as a manifest says it, without its time, so that the same data has the same manifest, and without what was
    verified, which stands by itself; `settings` are those of the components, in their order."""
    sources = len(result.stages) - len(written.changed)
    changed = [0] * sources + [*written.changed]
    return [
        {
            name: value
            for name, value in {**asdict(stage), "settings": given, "changed": count}.items()
            if name not in ("seconds", "verdicts")
        }
        for stage, given, count in zip(result.stages, settings, changed, strict=True)
    ]
