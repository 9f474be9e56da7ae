"""What data was read, so that another time it can be compared: hashes of every record's texts and images."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.contracts.plan import Choice, RunContext
from graftwork.contracts.records import Image, Record
from graftwork.data.images import read_bytes
from graftwork.weights import sha256

if TYPE_CHECKING:
    from torch import Tensor

LARGE = 1 << 30
"""Images of more bytes than this, together, are known by their sizes and times: to read them all would take minutes."""
STATE = "data/"
"""What the names of the hashes begin with among the tensors of a checkpoint."""
TEXTS = {"user": "questions", "assistant": "answers"}
"""Role to field; turns of other roles are one field."""
FIELDS = ("ids", *TEXTS.values(), "other turns", "images", "lengths")
MAX_NAMED = 3

Hash = Callable[[Image], str]


def image_hash(*, by_content: bool = True) -> Hash:
    """A function that hashes an image's bytes, or without `by_content` the size and time of its file; each file once."""
    known: dict[Path, str] = {}

    def of_file(path: Path) -> str:
        try:
            if by_content:
                return sha256(path)
            found = path.stat()
            return f"{found.st_size} {found.st_mtime_ns}"
        except OSError:
            return "unreadable"

    def of(image: Image) -> str:
        if image.path is None or image.span:
            try:
                return hashlib.sha256(read_bytes(image)).hexdigest()
            except OSError:
                return "unreadable"
        if image.path not in known:
            known[image.path] = of_file(image.path)
        return known[image.path]

    return of


def question_digest(record: Record, hash_of: Hash) -> str:
    """The hash of all that a model is asked: the turns up to the question, and the images."""
    turns = [(turn.role, turn.text) for turn in record.without_answer().turns]
    return _hex(_hash(turns, [hash_of(image) for image in record.images]))


def _hash(*content: Any) -> int:
    """A hash of plain content, as a signed integer of 64 bits: among a million records, two are the same by chance once
    in 30 million times."""
    text = repr(content).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), signed=True)


def _hex(number: int) -> str:
    """A hash as a manifest writes it."""
    return f"{number & (1 << 64) - 1:016x}"


@dataclass(frozen=True)
class DataDigest:
    """The data of a run: a hash for each field of each record, and what else batches are made from."""

    fields: Mapping[str, array[int]]
    names: Sequence[str]
    """The records' ids, to name some."""
    by_content: bool
    files: Mapping[str, Mapping[str, Any]]
    """The files that the sources' settings name."""
    sampling: Mapping[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Every hash, for a checkpoint; eight bytes for a field of a record."""
        import torch

        return {STATE + field: torch.tensor(values, dtype=torch.int64) for field, values in self.fields.items()}

    def recorded(self) -> dict[str, Any]:
        """What a manifest says: a hash for each field of all records together."""
        combined = {field: _hex(_hash(values.tolist())) for field, values in self.fields.items()}
        images = "content" if self.by_content else "size and time"
        return {
            "records": len(self.names),
            **combined,
            "images_by": images,
            "files": self.files,
            "sampling": self.sampling,
        }

    def differences(self, saved: Mapping[str, Tensor]) -> list[str]:
        """What is different from the data whose `tensors` are among `saved`, a clause each; none where all is the same."""
        then = {field: saved[STATE + field].tolist() for field in FIELDS}
        places = {id: place for place, id in enumerate(then["ids"])}
        both = [(places[id], now) for now, id in enumerate(self.fields["ids"]) if id in places]
        clauses = []
        if len(places) != len(self.names):
            clauses.append(f"{_records(len(places))} then, {len(self.names):,} now")
        if gone := len(places) - len(both):
            clauses.append(f"{_records(gone)} of then {'is' if gone == 1 else 'are'} gone")
        added = [now for now, id in enumerate(self.fields["ids"]) if id not in places]
        if added:
            clauses.append(f"{_records(len(added))} {'is' if len(added) == 1 else 'are'} new{self._named(added)}")
        changed = set[int]()
        for field in FIELDS[1:]:
            other = [now for was, now in both if then[field][was] != self.fields[field][now]]
            if field == "lengths":  # They follow from all the rest, and from the tokenizer.
                other = [now for now in other if now not in changed]
            changed.update(other)
            if other:
                what = "lengths in tokens" if field == "lengths" else field
                clauses.append(f"the {what} of {_records(len(other))} are others{self._named(other)}")
        if not clauses and then["ids"] != self.fields["ids"].tolist():
            clauses.append("the records are in another order")
        return clauses

    def _named(self, records: Sequence[int]) -> str:
        shown = ", ".join(f"'{self.names[record]}'" for record in records[:MAX_NAMED])
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
    records: Sequence[Record], lengths: Sequence[int], run_context: RunContext, *, by_content: bool | None = None
) -> DataDigest:
    """The digest of records and their lengths in tokens.

    Images enter by their content, or where all their files take more than LARGE bytes by size and time; `by_content`
    says which, so that it can be compared with an earlier one.
    """
    if by_content is None:
        by_content = _bytes_of(image for record in records for image in record.images) <= LARGE
    hash_of, fields = image_hash(by_content=by_content), {field: array("q") for field in FIELDS}
    for record, length in zip(records, lengths, strict=True):
        texts: dict[str, list[tuple[int, str, str]]] = {field: [] for field in (*TEXTS.values(), "other turns")}
        for place, turn in enumerate(record.turns):
            texts[TEXTS.get(turn.role, "other turns")].append((place, turn.role, turn.text))
        fields["ids"].append(_hash(record.id))
        for field, turns in texts.items():
            fields[field].append(_hash(turns))
        fields["images"].append(_hash([hash_of(image) for image in record.images]))
        fields["lengths"].append(length)
    settings = run_context.train
    sampling = {"seed": run_context.seed, "batch_size": settings.batch_size, "by_length": settings.group_by_length}
    return DataDigest(fields, [record.id for record in records], by_content, _files(run_context.sources), sampling)


def _bytes_of(images: Iterable[Image]) -> int:
    """The bytes of all files of images together."""
    total = 0
    for path in {image.path for image in images if image.path}:
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


def _files(sources: Sequence[Choice]) -> dict[str, dict[str, Any]]:
    """The files that the sources' settings name, by the places of these settings in a run file."""
    hash_of, found = image_hash(), dict[str, dict[str, Any]]()
    for number, source in enumerate(sources):
        for name, value in source.settings.items():
            path = Path(value) if isinstance(value, str | Path) and value and len(str(value)) < 4096 else None
            try:
                if path and path.is_absolute() and path.is_file():
                    size = path.stat().st_size
                    known = hash_of(Image(path)) if size <= LARGE else f"time {path.stat().st_mtime_ns}"
                    found[f"data.source.{number}.{name}"] = {"bytes": size, "sha256": known}
            except (OSError, ValueError):
                continue
    return found
