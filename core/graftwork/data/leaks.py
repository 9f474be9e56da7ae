"""Leaks: training data that shows an evaluator's own images, or asks its questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from graftwork.contracts.records import BadRecord, Record
from graftwork.data.answering import plain, text_key
from graftwork.data.fingerprints import MAX_DIFFERENCE, MAX_DISTANCE, Fingerprint, Look, NearImages, look_at_images
from graftwork.errors import DataError

LEAST_WORDS = 6
"""Shorter questions are asked of many images by anybody."""

Kind = Literal["same image", "near image", "same question"]


@dataclass(frozen=True)
class Leak:
    """What a training record shares with an evaluator."""

    evaluator: str
    question: str
    """The id of the evaluator's question, or of the first about the image."""
    kind: Kind
    difference: float = 0.0
    """Between the thumbnails of the images, in levels of 255."""
    asks_the_same: bool = False
    """Whether the record asks a question that the evaluator asks about that image."""

    @property
    def sentence(self) -> str:
        """What it is, as a clause."""
        what = {
            "same image": "has the same image as",
            "near image": f"has an image within {self.difference:.1f} levels of that of",
            "same question": "asks the same without an image as",
        }[self.kind]
        return f"it {what} '{self.question}' of '{self.evaluator}'" + ", and asks the same" * self.asks_the_same


@dataclass
class Questions:
    """How much of an evaluator was compared."""

    evaluator: str
    questions: int = 0
    images: int = 0
    unreadable: int = 0
    """Questions and images that cannot be read, and so are not compared."""


class LeakFinder:
    """Compares training records with the images and questions of evaluators.

    An image leaks where its pixels are an evaluator's, or a near duplicate of them. A question leaks where both stand without
    an image: the words alone are no leak where images differ, as many data sets ask few questions of many images. A long question that
    an evaluator asks once is worth a look all the same: `rare`.
    """

    def __init__(self, max_distance: int = MAX_DISTANCE, max_difference: float = MAX_DIFFERENCE) -> None:
        self._near = NearImages(max_distance, max_difference)
        self._ids: list[tuple[str, str, bytes]] = []
        """By an image's number: the evaluator, the first question about it, the digest of its pixels."""
        self._asked: dict[int, set[int]] = {}
        """By an image's number: the questions about it."""
        self._without_image: dict[int, tuple[str, str]] = {}
        self._times: dict[int, Counter[str]] = {}
        self._found: dict[int, Leak] = {}
        """By a training image's number."""
        self._numbers: dict[int, int] = {}
        """A training image's number to that of the evaluator's image."""

    def add(self, evaluator: str, questions: Iterable[Record | BadRecord]) -> Questions:
        """Add an evaluator's questions; what of them cannot be read is counted."""
        counted = Questions(evaluator)
        numbers: dict[int, int] = {}

        def readable() -> Iterable[Record]:
            for item in questions:
                counted.questions += isinstance(item, Record)
                counted.unreadable += isinstance(item, BadRecord)
                if isinstance(item, Record):
                    yield item

        for record, looks in look_at_images(readable()):
            asked = text_key(plain(record.question))
            self._times.setdefault(asked, Counter())[evaluator] += 1
            if not looks:
                self._without_image.setdefault(asked, (evaluator, record.id))
            for look in looks:
                if isinstance(look.found, Fingerprint):
                    numbers[look.number] = len(self._ids)
                    self._near.add(look.found, len(self._ids))
                    self._ids.append((evaluator, record.id, look.found.digest))
                    counted.images += 1
                counted.unreadable += isinstance(look.found, DataError)
                if look.number in numbers:
                    self._asked.setdefault(numbers[look.number], set()).add(asked)
        return counted

    def leak(self, record: Record, looks: Sequence[Look]) -> Leak | None:
        """What a record shares with the evaluators; None for nothing. Records come with their looks in the order of
        `look_at_images`."""
        asked = {text_key(plain(turn.text)) for turn in record.turns if turn.role == "user"}
        leaks = []
        for look in looks:
            if isinstance(look.found, Fingerprint) and (match := self._near.nearest(look.found)):
                evaluator, id, digest = self._ids[match.number]
                kind: Kind = "same image" if digest == look.found.digest else "near image"
                self._found[look.number] = Leak(evaluator, id, kind, match.difference)
                self._numbers[look.number] = match.number
            if found := self._found.get(look.number):
                leaks.append(
                    replace(found, asks_the_same=not asked.isdisjoint(self._asked[self._numbers[look.number]]))
                )
        if not looks:
            leaks = [Leak(*self._without_image[key], "same question") for key in asked if key in self._without_image]
        return max(leaks, key=lambda leak: (leak.asks_the_same, -leak.difference), default=None)

    def rare(self, record: Record) -> str | None:
        """The evaluator that asks one of the record's long questions exactly once; None where there is none."""
        for turn in record.turns:
            if turn.role == "user" and len((text := plain(turn.text)).split()) >= LEAST_WORDS:
                for evaluator, times in self._times.get(text_key(text), Counter[str]()).items():
                    if times == 1:
                        return evaluator
        return None
