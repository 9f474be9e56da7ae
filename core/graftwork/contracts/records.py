"""One example, the same everywhere: in training, in evaluation and in every data operator."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `<image>` stands where an image does. Only the first may be the system's."""

    role: Literal["system", "user", "assistant"]
    text: str
    trained: bool | None = None
    """Whether an answer carries loss, as the data marks it; None where the data says nothing, which `data.train_on` then decides."""


@dataclass(frozen=True)
class Image:
    """An image by reference: a file, a span of one, or its encoded bytes. `graftwork.data.load_image` opens it safely."""

    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    span: tuple[int, int] | None = None
    """Where in the file it lies, as the first byte and how many, for archives and stores; None for all of the file."""

    @property
    def key(self) -> str:
        """Equal for references to the same file, span or bytes."""
        if self.path is None:
            return hashlib.sha256(self.data or b"").hexdigest()
        return f"{self.path}[{self.span[0]}:{sum(self.span)}]" if self.span else str(self.path)

    def __str__(self) -> str:
        if self.path is None:
            return f"{len(self.data or b'')} bytes of image data"
        return self.key


@dataclass(frozen=True)
class Record:
    """A conversation about images, and what is known of it; `<image>` stands in its turns once for each, in their order."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Image, ...] = ()
    group: str = ""
    """What scores are split by, such as `colour`."""
    reference: tuple[str, ...] = ()
    """The accepted answers, for evaluation."""
    where: str = ""
    """Where it was read, as `file:line`, for messages."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What else is known, as plain data; `made_by` and `of` name the operator that made it and the ids that it was made from."""
    weight: float = 1.0
    """What its loss counts, against 1 for other records."""
    source: int = 0
    """Which of a run's sources it came from, counted from 0."""
    unit: str = ""
    """What counts only as a whole, such as a question in all rotations of its options: the same in all its records, which follow
    one another. Empty where a record counts alone."""
    coordinates: str = ""
    """What the numbers of its boxes and points count: `pixels`, `relative` or `none` (see `graftwork.contracts.coordinates`). Empty
    where that is not said."""

    @property
    def question(self) -> str:
        """The last text of the user."""
        return next((turn.text for turn in reversed(self.turns) if turn.role == "user"), "")

    @property
    def place(self) -> str:
        """Where it was read, or else which one it is."""
        return self.where or self.id

    def without_answer(self) -> Record:
        """The same record up to its last user turn: what a prompt is made of."""
        turns = self.turns
        while turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        return replace(self, turns=turns)


@dataclass(frozen=True)
class BadRecord:
    """What is not a record, or is to be none any more, with its place and what is wrong with it."""

    where: str
    why: str
    id: str = ""
    """The record's id, where it was one."""
    stats: Mapping[str, Any] = field(default_factory=dict)
    """The numbers that decided, as plain data, such as `{"words": 3}`."""
    missing: Path | None = field(default=None, compare=False)
    """The file that is not there, where that is all that is wrong."""

    @classmethod
    def of(cls, record: Record, why: str, **stats: Any) -> BadRecord:
        """A record that is dropped, why, and the numbers that decided."""
        return cls(record.where or f"record '{record.id}'", why, record.id, stats)


@dataclass(frozen=True)
class RecordCounts:
    """How many records, or questions, were read, and what became of them: each was used, or left out and named.

    Whoever says how many were used or left out says it by one of these, so that the numbers fit one another.
    """

    read: int
    used: int
    left_out: int

    def __post_init__(self) -> None:
        if self.used + self.left_out != self.read or min(self.used, self.left_out) < 0:
            raise AssertionError(f"of {self.read} records {self.used} were used and {self.left_out} left out")

    @classmethod
    def recorded(cls, data: Mapping[str, Any]) -> RecordCounts | None:
        """Those in a checkpoint's facts about its data; None where it is older than they are."""
        return cls(data["read"], data["records"], data["left_out"]) if "left_out" in data else None

    def __str__(self) -> str:
        if not self.left_out:
            return f"{self.read:,} records"
        return f"{self.used:,} of {self.read:,} records used, {self.left_out:,} left out"


def unit_key(record: Record) -> tuple[str, str]:
    """What identifies the whole that a record counts in, which may be the record alone."""
    return (record.unit, "") if record.unit else ("", record.id)


def image_key(record: Record) -> str:
    """What identifies the images of a record; a record without images stands alone."""
    return "\n".join(image.key for image in record.images) or f"no image: {record.id}"
