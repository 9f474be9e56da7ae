"""What data was read, so that another time it can be compared: hashes of every record's texts and images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.contracts.plan import Choice, RunContext
from graftwork.contracts.records import Image, Record
from graftwork.data.cache import known_hashes
from graftwork.data.curated import MANIFEST, is_data_set
from graftwork.data.images import read_bytes
from graftwork.data.store import Array, StoredImage, hash64
from graftwork.weights import sha256

if TYPE_CHECKING:
    from torch import Tensor

STATE = "data/"
"""What the names of the hashes begin with among the tensors of a checkpoint."""
TEXTS = {"user": "questions", "assistant": "answers"}
"""Role to field; turns of other roles are one field."""
OTHERS = "other turns"
TEXT_FIELDS = (*TEXTS.values(), OTHERS)
RECORD_FIELDS = ("ids", *TEXT_FIELDS, "images")
FIELDS = (*RECORD_FIELDS, "lengths")
OTHER_FIELDS = {
    "sources": "the sources, which are mixed by weights, have other records",
    "validation": "the records for validation are others",
}
"""What else is compared, and what is said where it differs."""
MAX_NAMED = 3

Hash = Callable[[Image], str]


def image_hash(*, by_content: bool = True) -> Hash:
    """A function that hashes an image's bytes, or without `by_content` the size and time of its file; each file once, as long
    as it is among the last few thousand."""

    @lru_cache(1 << 16)
    def of_file(path: Path) -> str:
        try:
            if by_content:
                return sha256(path)
            found = path.stat()
            return f"{found.st_size} {found.st_mtime_ns}"
        except OSError:
            return "unreadable"

    def of(image: Image) -> str:
        if image.path and image.span and not by_content and not isinstance(image, StoredImage):
            return f"{of_file(image.path)} {image.span}"
        if image.path and not image.span:
            return of_file(image.path)
        try:
            return hashlib.sha256(read_bytes(image)).hexdigest()
        except OSError:
            return "unreadable"

    return of


def record_fields(records: Iterable[Record], hash_of: Hash) -> Array:
    """A hash of each of `RECORD_FIELDS` of each record, int64 `[records, fields]`."""
    import numpy

    return numpy.array([_hashes(record, hash_of) for record in records], dtype=numpy.int64).reshape(
        -1, len(RECORD_FIELDS)
    )


def _hashes(record: Record, hash_of: Hash) -> tuple[int, ...]:
    texts: dict[str, list[tuple[Any, ...]]] = {field: [] for field in TEXT_FIELDS}
    for place, turn in enumerate(record.turns):
        marked = () if turn.trained is None else (turn.trained,)
        texts[TEXTS.get(turn.role, OTHERS)].append((place, turn.role, turn.text, *marked))
    if record.weight != 1:
        texts["answers"].append((record.weight,))
    hashes = [hash64(texts[field]) for field in TEXT_FIELDS]
    return (hash64(record.id), *hashes, hash64([hash_of(image) for image in record.images]))


def question_digest(record: Record, hash_of: Hash) -> str:
    """The hash of all that a model is asked: the turns up to the question, and the images."""
    turns = [(turn.role, turn.text) for turn in record.without_answer().turns]
    return _hex(hash64(turns, [hash_of(image) for image in record.images]))


def _hex(number: int) -> str:
    """A hash as a manifest writes it."""
    return f"{number & (1 << 64) - 1:016x}"


@dataclass(frozen=True)
class DataDigest:
    """The data of a run: a hash for each field of each record, and what else batches are made from."""

    fields: Mapping[str, Array]
    """`FIELDS` to int64 `[records]`."""
    others: Mapping[str, Array]
    """`OTHER_FIELDS` to int64, of the records as a whole; runs that began before there were some have not recorded them."""
    records: Sequence[Record]
    """The records, to name some."""
    by_content: bool
    files: Mapping[str, Mapping[str, Any]]
    """The files that the sources' settings name."""
    sampling: Mapping[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Every hash, for a checkpoint; eight bytes for a field of a record."""
        import torch

        arrays = {**self.fields, **self.others}
        return {STATE + field: torch.from_numpy(values) for field, values in arrays.items()}

    def recorded(self) -> dict[str, Any]:
        """What a manifest says: a hash for each field of all records together."""
        combined = {field: _hex(hash64(values.tobytes())) for field, values in self.fields.items()}
        images = "content" if self.by_content else "size and time"
        return {
            "records": len(self.records),
            **combined,
            "images_by": images,
            "files": self.files,
            "sampling": self.sampling,
        }

    def with_images(self, *, by_content: bool) -> DataDigest:
        """The same data, with its images hashed by their bytes, or by size and time."""
        images = record_fields(self.records, image_hash(by_content=by_content))[:, RECORD_FIELDS.index("images")]
        return replace(self, fields={**self.fields, "images": images}, by_content=by_content)

    def differences(self, saved: Mapping[str, Tensor]) -> list[str]:
        """What is different from the data whose `tensors` are among `saved`, a clause each; none where all is the same."""
        import numpy

        then = {field: saved[STATE + field].numpy() for field in FIELDS}
        others = [
            clause
            for field, clause in OTHER_FIELDS.items()
            if STATE + field in saved and not numpy.array_equal(saved[STATE + field].numpy(), self.others[field])
        ]
        if all(numpy.array_equal(then[field], self.fields[field]) for field in FIELDS):
            return others
        ids, ids_then = self.fields["ids"], then["ids"]
        known, now, was = numpy.intersect1d(ids, ids_then, return_indices=True)
        order = numpy.argsort(now)
        now, was = now[order], was[order]
        clauses = []
        if len(ids_then) != len(ids):
            clauses.append(f"{_records(len(ids_then))} then, {len(ids):,} now")
        if gone := len(ids_then) - len(known):
            clauses.append(f"{_records(gone)} of then {'is' if gone == 1 else 'are'} gone")
        added = numpy.setdiff1d(numpy.arange(len(ids)), now)
        if len(added):
            clauses.append(f"{_records(len(added))} {'is' if len(added) == 1 else 'are'} new{self._named(added)}")
        changed = numpy.zeros(len(ids), dtype=bool)
        for field in FIELDS[1:]:
            other = now[then[field][was] != self.fields[field][now]]
            if field == "lengths":  # They follow from all the rest, and from the tokenizer.
                other = other[~changed[other]]
            changed[other] = True
            if len(other):
                what = "lengths in tokens" if field == "lengths" else field
                clauses.append(f"the {what} of {_records(len(other))} are others{self._named(other)}")
        return [*(clauses or ["the records are in another order"]), *others]

    def _named(self, records: Array) -> str:
        shown = ", ".join(f"'{self.records[int(record)].id}'" for record in records[:MAX_NAMED])
        return f" ({shown}{', …' * (len(records) > MAX_NAMED)})"

    def changed_files(self, saved: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """A line for each file of the sources that is another one than was `saved`."""
        return [
            f"{name}: {file['bytes']:,} bytes now, and {saved[name]['bytes']:,} then"
            for name, file in self.files.items()
            if name in saved and file != saved[name]
        ]


def _records(count: int) -> str:
    return f"{count:,} record{'s' * (count != 1)}"


def digest_of(
    records: Sequence[Record],
    fields: Array,
    lengths: Array,
    run_context: RunContext,
    *,
    by_content: bool,
    sources: Array,
    validation: Array,
) -> DataDigest:
    """The digest of records, from their `record_fields`, their lengths in tokens and the numbers of their sources, and of the
    `record_fields` of those that are kept for validation."""
    import numpy

    columns = {name: numpy.ascontiguousarray(fields[:, place]) for place, name in enumerate(RECORD_FIELDS)}
    columns["lengths"] = numpy.asarray(lengths, dtype=numpy.int64)
    settings = run_context.train
    sampling = {"seed": run_context.seed, "batch_size": settings.batch_size, "by_length": settings.group_by_length}
    # Images may be hashed in two ways, and those of records for validation are what decides which these are.
    others = {
        "sources": numpy.asarray(sources if run_context.mix else sources[:0], dtype=numpy.int64),
        "validation": numpy.ascontiguousarray(validation[:, : RECORD_FIELDS.index("images")]).ravel(),
    }
    return DataDigest(columns, others, records, by_content, _files(run_context.sources), sampling)


def _files(sources: Sequence[Choice]) -> dict[str, dict[str, Any]]:
    """The files that the sources' settings name, by the places of these settings in a run file."""
    found = dict[str, dict[str, Any]]()
    for number, source in enumerate(sources):
        for name, value in source.settings.items():
            path = Path(value) if isinstance(value, str | Path) and value and len(str(value)) < 4096 else None
            try:
                if path and is_data_set(path):  # Its manifest holds the hashes of all its files.
                    path = path / MANIFEST
                if path and path.is_absolute() and path.is_file():
                    (known,) = known_hashes([path]).values()
                    found[f"data.source.{number}.{name}"] = {"bytes": path.stat().st_size, "sha256": known}
            except (OSError, ValueError):
                continue
    return found
