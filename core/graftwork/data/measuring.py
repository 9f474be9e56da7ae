"""What is known of every record before training: its length in tokens, its group, and hashes by which data is compared."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from graftwork.contracts.model import Processor
from graftwork.contracts.records import Record
from graftwork.data.digest import RECORD_FIELDS, image_hash, record_fields
from graftwork.data.pipeline import SOURCES
from graftwork.data.store import Array, hash64, paths_of
from graftwork.errors import DataError

CHUNK = 256
"""Records that are measured at a time: enough for all cores, and few enough that their tokens take little memory."""
LARGE = 1 << 30
"""Images of more bytes than this, together, are known by their sizes and times: to read them all would take minutes."""


ARRAYS = ("lengths", "groups", "sources", "marks", "fields")
ANY, LAST, MARKED = 1, 2, 4
"""Of the answers of a record: one at least is not excluded from training; the last one is not; one at least is marked."""


@dataclass(frozen=True)
class Measured:
    """A number, or several, for each record of a data set; arrays of as many items as it has records."""

    lengths: Array
    """In tokens, int32; -1 where the model's processor takes no such record."""
    groups: Array
    """The number of each record's group among `group_names`, int32."""
    sources: Array
    """The number of each record's source, int32."""
    marks: Array
    """Which of ANY, LAST and MARKED hold of each record's answers, uint8, added up."""
    fields: Array
    """What `digest.record_fields` gave: int64 `[records, fields]`."""
    by_content: bool
    """Whether images were hashed by their bytes, and not by size and time."""
    unfit: Mapping[int, str] = field(default_factory=dict)
    """Why the processor does not take a record, by its place."""
    group_names: Sequence[str] = ()

    @property
    def has_images(self) -> Array:
        """Whether each record has images, bool."""
        found: Array = self.fields[:, RECORD_FIELDS.index("images")] != hash64([])
        return found

    def select(self, places: Array) -> Measured:
        """The same of some of the records, by their places."""
        return replace(
            self,
            **{name: getattr(self, name)[places] for name in ARRAYS},
            unfit={},
        )

    def save(self, folder: Path) -> None:
        """Write everything into a folder."""
        import numpy

        numpy.savez(folder / "measured.npz", **{name: getattr(self, name) for name in ARRAYS})
        rest = {"unfit": [*self.unfit.items()], "group_names": self.group_names, "by_content": self.by_content}
        (folder / "measured.json").write_text(json.dumps(rest), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Measured:
        """Read what `save` wrote."""
        import numpy

        rest = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
        # numpy leaves a file open that it cannot read.
        with (folder / "measured.npz").open("rb") as file, numpy.load(file) as arrays:
            found = {name: arrays[name] for name in ARRAYS}
        return cls(**found, by_content=rest["by_content"], unfit=dict(rest["unfit"]), group_names=rest["group_names"])


def measure(records: Sequence[Record], processor: Processor, images: Array) -> Measured:
    """Measure every record, the tokens on other threads than the rest; `images` is what `image_states` gave of them."""
    import numpy

    by_content = int(images[:, 0].clip(0).sum()) <= LARGE
    hash_of = image_hash(by_content=by_content)
    lengths, groups, sources, marks = array("i"), array("i"), array("i"), array("B")
    unfit = dict[int, str]()
    # All at once: many small arrays would leave as much memory behind that nothing else takes.
    fields = numpy.empty((len(records), len(RECORD_FIELDS)), dtype=numpy.int64)
    names: dict[str, int] = {}

    def take(found: Sequence[int | DataError]) -> None:
        for length in found:
            if isinstance(length, DataError):
                unfit[len(lengths)] = str(length)
            lengths.append(-1 if isinstance(length, DataError) else length)

    with ThreadPoolExecutor(1) as tokenizing:
        waiting: list[Future[Sequence[int | DataError]]] = []
        for chunk in chunks(records):
            waiting.append(tokenizing.submit(lengths_of, processor, chunk))
            begun = len(groups)
            fields[begun : begun + len(chunk)] = record_fields(chunk, hash_of)
            sources.extend(record.source for record in chunk)
            marks.extend(map(marks_of, chunk))
            groups.extend(names.setdefault(record.group, len(names)) for record in chunk)
            if len(waiting) > 2:
                take(waiting.pop(0).result())
        for each in waiting:
            take(each.result())
    return Measured(
        numpy.array(lengths, dtype=numpy.int32),
        numpy.array(groups, dtype=numpy.int32),
        numpy.array(sources, dtype=numpy.int32),
        numpy.array(marks, dtype=numpy.uint8),
        fields,
        by_content,
        unfit,
        [*names],
    )


def marks_of(record: Record) -> int:
    """Which of ANY, LAST and MARKED hold of a record's answers, added up; none where the record has no weight."""
    trained = [turn.trained for turn in record.turns if turn.role == "assistant"]
    if not trained or not record.weight:
        return 0
    return ANY * any(each is not False for each in trained) + LAST * (trained[-1] is not False) + MARKED * any(trained)


def chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Records, some at a time."""
    left = iter(records)
    while chunk := [*islice(left, CHUNK)]:
        yield chunk


def lengths_of(processor: Processor, records: Sequence[Record]) -> Sequence[int | DataError]:
    """The length of each record in tokens, or why the processor takes no such record."""
    batched: Callable[[Sequence[Record]], Sequence[int | DataError]] | None = getattr(processor, "lengths", None)
    if batched:
        return batched(records)

    def one(record: Record) -> int | DataError:
        try:
            return processor.length(record)
        except DataError as error:
            return error

    return [one(record) for record in records]


def image_states(folder: Path) -> Array:
    """The size and the time in nanoseconds, int64 `[files, 2]`, of every image file that the records of a folder name; -1
    where it is missing."""
    import numpy

    states = array("q")
    for path in paths_of(folder):
        try:
            found = os.stat(path)  # noqa: PTH116 — called a million times.
            states.extend((found.st_size, found.st_mtime_ns))
        except (OSError, ValueError):
            states.extend((-1, -1))
    return numpy.array(states, dtype=numpy.int64).reshape(-1, 2)


IMAGES = "image-states.npy"


def keep_image_states(folder: Path) -> None:
    """Keep, in the folder of all stages, how the images are that the records of its sources name."""
    import numpy

    numpy.save(folder / IMAGES, image_states(folder / SOURCES))


def kept_image_states(folder: Path) -> Array:
    """What `keep_image_states` kept."""
    import numpy

    return numpy.load(folder / IMAGES)


def has_same_images(folder: Path) -> bool:
    """Whether the images that records name, those of records that were left out for a missing one too, are as they were."""
    import numpy

    return bool(numpy.array_equal(kept_image_states(folder), image_states(folder / SOURCES)))


def processor_files(processor: Processor, folder: Path) -> dict[str, Any]:
    """The files that a processor writes into an empty folder, each with its size and hash."""
    from graftwork.weights import sha256

    processor.save(folder)
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
