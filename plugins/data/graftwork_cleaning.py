"""Data operators that drop what should not be trained on: broken pictures, duplicates, too long or short records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from graftwork.contracts import BadRecord, DataOperator, NoSettings, Picture, Record, Writer, hookimpl, setting
from graftwork.data import images
from graftwork.errors import DataError


class DropBrokenImages(DataOperator[NoSettings]):
    """Drops records whose picture cannot be decoded; every picture is read once"""

    name = "drop-broken-images"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        fault = cache(_fault)
        for record in records:
            why = next(filter(None, map(fault, record.pictures)), None)
            yield BadRecord(_place(record), why) if why else record


class DeduplicateImages(DataOperator[NoSettings]):
    """Keeps, of different files with equal pixels, only the records of the first"""

    name = "deduplicate-images"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        digest = cache(images.digest)
        first: dict[tuple[str, ...], tuple[Picture, ...]] = {}
        for record in records:
            try:
                owner = first.setdefault(tuple(map(digest, record.pictures)), record.pictures)
            except DataError as error:
                yield BadRecord(_place(record), error.sentence)
                continue
            if owner == record.pictures:
                yield record
            else:
                yield BadRecord(_place(record), f"'{record.pictures[0]}' has the same pixels as '{owner[0]}'")


@dataclass(frozen=True)
class LimitLengthSettings:
    """How long a conversation may be."""

    min_words: int = setting(0, "Drop records with fewer words in all turns together", minimum=0)
    max_words: int | None = setting(None, "Drop records with more words in all turns together", minimum=1)


class LimitLength(DataOperator[LimitLengthSettings]):
    """Drops records with too few or too many words"""

    name = "limit-length"
    Settings = LimitLengthSettings

    def objections(self, plan: object) -> Iterable[str]:
        least, most = self.settings.min_words, self.settings.max_words
        if most is not None and most < least:
            yield f"'max_words' is {most}, less than 'min_words', {least}; nothing would be kept"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        least, most = self.settings.min_words, self.settings.max_words
        for record in records:
            words = sum(len(turn.text.replace("<image>", " ").split()) for turn in record.turns)
            if words < least:
                yield BadRecord(_place(record), f"{words} words, fewer than {least}")
            elif most is not None and words > most:
                yield BadRecord(_place(record), f"{words} words, more than {most}")
            else:
                yield record


@hookimpl
def data_operators() -> list[type[DataOperator[Any]]]:
    return [DropBrokenImages, DeduplicateImages, LimitLength]


def _fault(picture: Picture) -> str | None:
    try:
        images.load(picture)
    except DataError as error:
        return error.sentence
    return None


def _place(record: Record) -> str:
    return record.where or f"record '{record.id}'"
