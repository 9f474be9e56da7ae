"""Records on disk: written once, one a line, and read by their place, so that a data set of any size takes little memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, overload

from graftwork.contracts.records import BadRecord, Image, Record
from graftwork.data.lines import from_object, to_object
from graftwork.errors import DataError

RECORDS, DROPPED, BLOBS, PATHS, IDS = "records.jsonl", "dropped.jsonl", "images.bin", "images.txt", "ids.npy"
REPLIES = "replies.jsonl"
"""What was asked of writers, and what they replied, one reply a line, in a stage's folder and in a data set."""
TEMPORARY = "graftwork-data-"
SPAN = "span:"
"""What the name of an image begins with that is a part of a file: `span:FIRST:COUNT:PATH`."""

T = TypeVar("T")
Array = Any  # A numpy array; numpy is imported late.


def hash64(*content: Any) -> int:
    """A hash of plain content, as a signed integer of 64 bits: among a million records, two are the same by chance once
    in 30 million times."""
    text = repr(content).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), signed=True)


class StoredImage(Image):
    """An image that came as bytes, among the bytes that a `RecordWriter` has kept, whose file means nothing to anybody."""

    def __str__(self) -> str:
        return f"{self.span[1] if self.span else 0} bytes of image data"


class TemporaryFolder:
    """A folder that is removed when nobody holds this any more; those that killed processes left go after a month."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=TEMPORARY))
        for left in self.path.parent.glob(f"{TEMPORARY}*"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > 30 * 24 * 3600:
                    shutil.rmtree(left, ignore_errors=True)
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class Lazy(Sequence[T], Generic[T]):
    """A sequence whose items are made when they are asked for."""

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self.item(index) for index in range(*place.indices(len(self)))]
        return self.item(range(len(self))[place])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    def __hash__(self) -> int:
        raise TypeError("what compares by its items has no hash")

    def item(self, place: int) -> T:
        """The item at a place, counted from 0."""
        raise NotImplementedError


class Lines(Lazy[T]):
    """What the lines of a file hold, each read when it is asked for; eight bytes a line stay in memory."""

    def __init__(self, file: Path) -> None:
        import numpy

        self.file = file
        self._ends = numpy.load(ends_of(file))
        self._descriptor = os.open(file, os.O_RDONLY)

    def __del__(self) -> None:
        if (descriptor := getattr(self, "_descriptor", None)) is not None:
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[T]:
        at, rest = 0, b""
        while block := os.pread(self._descriptor, 1 << 20, at):
            at += len(block)
            *lines, rest = (rest + block).split(b"\n")
            yield from map(self.parse, lines)

    def item(self, place: int) -> T:
        """What the line at a place holds."""
        return self.parse(self.line(place))

    def line(self, place: int) -> bytes:
        """The bytes of the line at a place, counted from 0, its end included."""
        first = int(self._ends[place - 1]) if place else 0
        return os.pread(self._descriptor, int(self._ends[place]) - first, first)

    def parse(self, line: bytes) -> T:
        """What a line holds."""
        raise NotImplementedError


class JsonLines(Lines[Any]):
    """The values of a file of JSON lines."""

    def parse(self, line: bytes) -> Any:
        """The value of a line."""
        return json.loads(line)


class RecordStore(Lines[Record]):
    """Records in a folder that a `RecordWriter` has filled; their bytes of images lie in `root`."""

    def __init__(self, folder: Path, root: Path, temporary: TemporaryFolder | None = None) -> None:
        super().__init__(folder / RECORDS)
        self.folder, self.root = folder, root
        self._temporary = temporary  # which lives as long as this

    def parse(self, line: bytes) -> Record:
        """The record of a line."""
        return from_object(json.loads(line), self._image)

    def ids(self) -> Array:
        """The hash of each record's id, int64."""
        import numpy

        return numpy.load(self.folder / IDS)

    def _image(self, name: str) -> Image:
        if not name.startswith(SPAN):
            return Image(Path(name))
        _, first, count, path = name.split(":", 3)
        span = int(first), int(count)
        return StoredImage(self.root / BLOBS, span=span) if path == BLOBS else Image(Path(path), span=span)


class DroppedStore(Lines[BadRecord]):
    """What was dropped, each with the stage that dropped it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / DROPPED)

    def parse(self, line: bytes) -> BadRecord:
        """What a line says was dropped."""
        content = json.loads(line)
        content.pop("stage")
        return BadRecord(**content)


class Mapped(Lazy[T]):
    """What a function makes of each item of a sequence, when it is asked for."""

    def __init__(self, function: Callable[[Any], T], items: Sequence[Any] | Array) -> None:
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    def item(self, place: int) -> T:
        """What the function makes of an item."""
        return self.function(self.items[place])


class Joined(Lazy[T]):
    """Several sequences as one."""

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def item(self, place: int) -> T:
        """The item of the part in which the place lies."""
        for part in self.parts:
            if place < len(part):
                return part[place]
            place -= len(part)
        raise IndexError(place)


class LineWriter:
    """A file of JSON lines, and where each of them ends."""

    def __init__(self, file: Path) -> None:
        self.file, self._ends, self._at = file, array("q"), 0
        self._stream = file.open("wb", buffering=1 << 20)

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, content: Any) -> None:
        """Write one line."""
        self._at += self._stream.write(as_line(content))
        self._ends.append(self._at)

    def close(self) -> None:
        """Close the file as it is."""
        self._stream.close()

    def complete(self) -> None:
        """Write where the lines end; the file is complete and on the disk."""
        import numpy

        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.close()
        numpy.save(ends_of(self.file), numpy.frombuffer(self._ends, dtype=numpy.int64))


class RecordWriter:
    """Writes records, and what was dropped, into an empty folder.

    Ids that repeat get `#2`, `#3`, … so that all differ. Bytes of images go into one file of `root`, each content once. Used as a
    context, with `finish` after the last record: a folder that was left by an exception is not complete.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.root = folder, root
        self.records, self.dropped = LineWriter(folder / RECORDS), LineWriter(folder / DROPPED)
        self._paths = (folder / PATHS).open("w", encoding="utf-8", errors="surrogateescape", newline="\n")
        self._ids, self._path_hashes = array("q"), array("q")
        self._places: dict[int, int] = {}
        """Where in the file the bytes of images begin, by their hash."""

    def __len__(self) -> int:
        return len(self.records) + len(self.dropped)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        try:
            if failed is None:
                self._complete()
        finally:
            for file in (self.records, self.dropped, self._paths):
                file.close()

    def add(self, record: Record) -> None:
        """Write a record; DataError where it holds what no file can."""
        self.records.add(to_object(record, self._name))
        self._ids.append(hash64(record.id))

    def drop(self, bad: BadRecord, stage: str) -> None:
        """Write what a stage dropped."""
        if bad.missing:
            self._note_path(os.path.abspath(bad.missing))  # noqa: PTH100
        texts = {name: writable(getattr(bad, name)) for name in ("id", "where", "why")}
        stats = writable(bad.stats)
        self.dropped.add(
            {"id": texts["id"], "where": texts["where"], "stage": stage, "why": texts["why"], "stats": stats}
        )

    def finish(self) -> Array:
        """Make the ids of the records distinct, after the last one; returns their hashes, int64, in the records' order."""
        import numpy

        self.records.complete()
        ids = numpy.frombuffer(self._ids, dtype=numpy.int64).copy()
        known, firsts = numpy.unique(ids, return_index=True)
        if len(known) < len(ids):
            self._rename(ids, known, firsts)
        numpy.save(self.folder / IDS, ids)
        return ids

    def _rename(self, ids: Array, known: Array, firsts: Array) -> None:
        """Write the records again, those whose id was used before under another; `ids` get the new hashes."""
        import numpy

        repeated = numpy.ones(len(ids), dtype=bool)
        repeated[firsts] = False
        new, numbers = set[int](), dict[str, int]()
        work = LineWriter(self.folder / f"renamed-{RECORDS}")
        try:
            for place, content in enumerate(JsonLines(self.records.file)):
                if repeated[place]:
                    id = content["id"]
                    number = numbers.get(id, 1) + 1
                    while (key := hash64(name := f"{id}#{number}")) in new or _holds(known, key):
                        number += 1
                    numbers[id] = number
                    new.add(key)
                    ids[place], content["id"] = key, name
                work.add(content)
            work.complete()
        finally:
            work.close()
        work.file.replace(self.records.file)
        ends_of(work.file).replace(ends_of(self.records.file))

    def _name(self, image: Image) -> str:
        """How a record's line names an image; what lies in no file yet is put into one."""
        if image.path is None:
            return self._stored(image.data or b"")
        path = os.path.abspath(image.path)  # noqa: PTH100 — pathlib's takes several times as long.
        if isinstance(image, StoredImage):
            path = BLOBS
        else:
            self._note_path(path)
        return f"{SPAN}{image.span[0]}:{image.span[1]}:{path}" if image.span else path

    def _note_path(self, path: str) -> None:
        self._path_hashes.append(hash64(path))
        self._paths.write(path.replace("\n", "\0") + "\n")

    def _stored(self, data: bytes) -> str:
        digest = int.from_bytes(hashlib.blake2b(data, digest_size=16).digest())
        if digest not in self._places:
            with (self.root / BLOBS).open("ab") as file:
                self._places[digest] = file.tell()
                file.write(data)
        return f"{SPAN}{self._places[digest]}:{len(data)}:{BLOBS}"

    def _complete(self) -> None:
        import numpy

        self.dropped.complete()
        self._paths.close()
        first = numpy.zeros(len(self._path_hashes), dtype=bool)
        first[numpy.unique(numpy.frombuffer(self._path_hashes, dtype=numpy.int64), return_index=True)[1]] = True
        every = self.folder / PATHS
        work = every.with_suffix(".unfinished")
        with every.open("rb") as lines, work.open("wb") as file:
            file.writelines(line for line, is_first in zip(lines, first.tolist(), strict=True) if is_first)
        work.replace(every)


def _holds(ordered: Array, value: int) -> bool:
    """Whether a sorted array has a value."""
    place = int(ordered.searchsorted(value))
    return place < len(ordered) and int(ordered[place]) == value


def paths_of(folder: Path) -> Iterator[str]:
    """The paths of every image file that the records of a folder name, each once."""
    with (folder / PATHS).open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            yield line[:-1].replace("\0", "\n")


def writable(value: Any) -> Any:
    """Plain data that JSON can hold, of what may hold numbers or texts that it cannot."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {writable(str(name)): writable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [writable(each) for each in value]
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def ends_of(file: Path) -> Path:
    """Where it is kept where the lines of a file end."""
    return file.with_suffix(".ends.npy")


def as_line(content: Any) -> bytes:
    """Plain content as one line of JSON; the same content gives the same bytes. DataError for what is not plain, or no text."""
    try:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        what = "a lone surrogate, which is not text" if isinstance(error, UnicodeEncodeError) else f"{error}"
        raise DataError(f"a record cannot be written as JSON ({what})") from None


def values_in(file: Path) -> Iterator[Any]:
    """The values of a file of JSON lines, one after another."""
    with file.open("rb") as lines:
        yield from map(json.loads, lines)
