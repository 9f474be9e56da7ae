"""Data operators that drop what is there twice, or in a test set: near duplicates of images, repeated questions, leaks."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import ne
from pathlib import Path
from typing import Any, Literal

from graftwork.contracts import BadRecord, DataOperator, Record, Writer, hookimpl, image_key, setting
from graftwork.data import (
    MAX_DIFFERENCE,
    MAX_DISTANCE,
    Fingerprint,
    HashTable,
    LeakFinder,
    Match,
    NearImages,
    TextFile,
    look_at_images,
    pairs_of,
    plain,
    text_key,
)
from graftwork.errors import DataError


@dataclass(frozen=True)
class NearSettings:
    """How alike images are that count as the same."""

    max_distance: int = setting(
        MAX_DISTANCE, "The most bits of 64 in which their perceptual hashes differ", minimum=0, maximum=15
    )
    max_difference: float = setting(
        MAX_DIFFERENCE, "The largest mean difference of their thumbnails, in levels of 255", minimum=0.0
    )


class NearDuplicateImages(DataOperator[NearSettings]):
    """Keeps, of images that are near duplicates, only the records of the first"""

    name = "near-duplicate-images"
    Settings = NearSettings

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        known = _Known(self.settings.max_distance, self.settings.max_difference)
        for record, looks in look_at_images(records):
            for look, image in zip(looks, record.images, strict=True):
                if look.found is not None:
                    known.add(look.found, str(image))
            why = next((known.texts[look.number] for look in looks if known.near_to[look.number] == BROKEN), None)
            match = next((known.match(look.number) for look in looks if known.near_to[look.number] >= 0), None)
            if why:
                yield BadRecord.of(record, why)
            elif match:
                what = f"its image is a near duplicate of '{known.texts[match.number]}'"
                numbers = f"{match.distance} bits and {match.difference:.1f} levels apart"
                yield BadRecord.of(
                    record, f"{what}, {numbers}", distance=match.distance, difference=round(match.difference, 3)
                )
            else:
                yield record

    def files(self) -> Sequence[Path]:
        """None: it depends on records and images alone."""
        return ()


NEW, BROKEN = -1, -2


class _Known:
    """What became of each image, by its number, in 25 bytes: there may be millions."""

    def __init__(self, max_distance: int, max_difference: float) -> None:
        self._near = NearImages(max_distance, max_difference)
        self.near_to = array("q")
        """The number of the image that it is a near duplicate of, or NEW, or BROKEN."""
        self._distances, self._differences = array("B"), array("d")
        self.texts = TextFile()
        """Its name if it is new, what is wrong with it if it is broken."""

    def add(self, found: Fingerprint | DataError, name: str) -> None:
        """Add the image of the next number."""
        number, match = len(self.near_to), None
        if isinstance(found, DataError):
            self.near_to.append(BROKEN)
            name = found.sentence
        elif match := self._near.nearest(found):
            self.near_to.append(match.number)
            name = ""
        else:
            self.near_to.append(NEW)
            self._near.add(found, number)
        self._distances.append(match.distance if match else 0)
        self._differences.append(match.difference if match else 0.0)
        self.texts.add(name)

    def match(self, number: int) -> Match:
        """What an image is a near duplicate of."""
        return Match(self.near_to[number], self._distances[number], self._differences[number])


@dataclass(frozen=True)
class DuplicateQuestionsSettings:
    """What becomes of a question that is asked again."""

    contradictions: Literal["keep first", "keep all"] = setting(
        "keep first", "What becomes of one that is answered otherwise the second time"
    )


class DuplicateQuestions(DataOperator[DuplicateQuestionsSettings]):
    """Drops records that ask again what was asked about the same image, and nothing else"""

    name = "duplicate-questions"
    Settings = DuplicateQuestionsSettings

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        """Records whose questions have all been asked; case, punctuation and spacing make no difference."""
        asked = HashTable()
        """By a question about an image: its first answer."""
        for record in records:
            said = image_key(record) if record.images else "no image"
            pairs: dict[int, int] = {}
            for question, answer in pairs_of(record):
                pairs.setdefault(text_key(said, plain(question)), text_key(plain(answer)))
                if not record.images:
                    said = f"{said}\0{plain(question)}"
            earlier = list(map(asked.get, pairs))
            repeats = bool(pairs) and None not in earlier
            otherwise = sum(map(ne, earlier, pairs.values())) if repeats else 0
            if repeats and not (otherwise and self.settings.contradictions == "keep all"):
                how = f", and answers {otherwise} of {len(pairs)} otherwise" if otherwise else ""
                why = f"it repeats what was asked about the same image{how}"
                yield BadRecord.of(record, why, questions=len(pairs), answered_otherwise=otherwise)
                continue
            for key, first in pairs.items():
                asked.setdefault(key, first)
            yield record

    def files(self) -> Sequence[Path]:
        """None: it depends on records alone."""
        return ()


@dataclass(frozen=True)
class LeaksSettings(NearSettings):
    """The evaluators whose images and questions must not be trained on."""

    against: dict[str, dict[str, Any]] = setting({}, "Evaluators with their settings, such as {NAME = {}}")


class Leaks(DataOperator[LeaksSettings]):
    """Drops records that show images of a test set, or ask its questions without an image"""

    name = "leaks"
    Settings = LeaksSettings
    evaluators = "against"

    def validate(self, plan: object) -> Iterable[str]:
        if not self.settings.against:
            yield "'against' names no evaluator; name those that the model will be scored by"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        finder = LeakFinder(self.settings.max_distance, self.settings.max_difference)
        for name, questions in self.questions.items():
            counted = finder.add(name, questions())
            if counted.unreadable:
                what = f"{counted.unreadable} questions or images of '{name}' cannot be read, so that leaks would be missed"
                raise DataError(f"{what}; complete its data")
        for record, looks in look_at_images(records):
            if leak := finder.leak(record, looks):
                yield BadRecord.of(
                    record,
                    leak.sentence,
                    evaluator=leak.evaluator,
                    of=leak.question,
                    difference=round(leak.difference, 3),
                )
            else:
                yield record


@hookimpl
def data_operators() -> list[type[DataOperator[Any]]]:
    return [NearDuplicateImages, DuplicateQuestions, Leaks]
