"""Data operators that drop what should not be trained on: broken images, duplicates, too long or short records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from graftwork.contracts import BadRecord, DataOperator, Image, NoSettings, Record, Writer, hookimpl, setting
from graftwork.data import image_digest, load_image
from graftwork.errors import DataError


class DropBrokenImages(DataOperator[NoSettings]):
    """Drops records whose image cannot be decoded; every image is read once"""

    name = "drop-broken-images"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        fault = cache(_fault)
        for record in records:
            why = next(filter(None, map(fault, record.images)), None)
            yield BadRecord.of(record, why) if why else record


class DeduplicateImages(DataOperator[NoSettings]):
    """Keeps, of different files with equal pixels, only the records of the first"""

    name = "deduplicate-images"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        digest = cache(image_digest)
        first: dict[tuple[str, ...], tuple[Image, ...]] = {}
        for record in records:
            try:
                owner = first.setdefault(tuple(map(digest, record.images)), record.images)
            except DataError as error:
                yield BadRecord.of(record, error.sentence)
                continue
            if owner == record.images:
                yield record
            else:
                yield BadRecord.of(record, f"'{record.images[0]}' has the same pixels as '{owner[0]}'")


@dataclass(frozen=True)
class LimitLengthSettings:
    """How long a conversation may be."""

    min_words: int = setting(0, "Drop records with fewer words in all turns together", minimum=0)
    max_words: int | None = setting(None, "Drop records with more words in all turns together", minimum=1)


class LimitLength(DataOperator[LimitLengthSettings]):
    """Drops records with too few or too many words"""

    name = "limit-length"
    Settings = LimitLengthSettings

    def validate(self, plan: object) -> Iterable[str]:
        min_words, max_words = self.settings.min_words, self.settings.max_words
        if max_words is not None and max_words < min_words:
            yield f"'max_words' is {max_words}, less than 'min_words', {min_words}; nothing would be kept"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        min_words, max_words = self.settings.min_words, self.settings.max_words
        for record in records:
            words = sum(len(turn.text.replace("<image>", " ").split()) for turn in record.turns)
            if words < min_words:
                yield BadRecord.of(record, f"{words} words, fewer than {min_words}", words=words)
            elif max_words is not None and words > max_words:
                yield BadRecord.of(record, f"{words} words, more than {max_words}", words=words)
            else:
                yield record


@hookimpl
def data_operators() -> list[type[DataOperator[Any]]]:
    return [DropBrokenImages, DeduplicateImages, LimitLength]


def _fault(image: Image) -> str | None:
    try:
        load_image(image)
    except DataError as error:
        return error.sentence
    return None
