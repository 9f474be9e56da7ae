"""Data operators that drop what should not be trained on: broken images, duplicates, too long or short records."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.contracts import (
    BadRecord,
    DataOperator,
    Image,
    MissingFile,
    NoSettings,
    Record,
    Writer,
    hookimpl,
    setting,
)
from graftwork.data import PLACE, HashTable, TextFile, hash64, image_digest, load_image
from graftwork.errors import DataError

GOOD = -1
"""Stands for the number of a fault where an image has none."""


class DropBrokenImages(DataOperator[NoSettings]):
    """Drops records whose image cannot be decoded; every image is read once"""

    name = "drop-broken-images"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        known, faults = HashTable(), TextFile()
        """By an image: the number of its fault, or GOOD."""

        def fault(image: Image) -> str | None:
            key = hash64(image.key)
            if (number := known.get(key)) is None:
                why = _fault(image)
                number = known.setdefault(key, faults.add(why) if why else GOOD)
            return None if number == GOOD else faults[number]

        for record in records:
            why = next(filter(None, map(fault, record.images)), None)
            yield BadRecord.of(record, why) if why else record

    def files(self) -> Sequence[Path]:
        """None: it depends on records and images alone."""
        return ()


class DeduplicateImages(DataOperator[NoSettings]):
    """Keeps, of different files with equal pixels, only the records of the first"""

    name = "deduplicate-images"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        known, firsts = HashTable(), HashTable()
        """By an image: the hash of its pixels. By pixels: the number of those images that had them first."""
        owners, names = array("q"), TextFile()

        def pixels(image: Image) -> int:
            key = hash64(image.key)
            return (
                found if (found := known.get(key)) is not None else known.setdefault(key, hash64(image_digest(image)))
            )

        for record in records:
            try:
                number = firsts.setdefault(hash64(*map(pixels, record.images)), len(owners))
            except DataError as error:
                yield BadRecord.of(record, error.sentence)
                continue
            own = hash64(*(image.key for image in record.images))
            if number == len(owners):
                owners.append(own)
                names.add(str(record.images[0]) if record.images else "")
            if owners[number] == own:
                yield record
            else:
                yield BadRecord.of(record, f"'{record.images[0]}' has the same pixels as '{names[number]}'")

    def files(self) -> Sequence[Path]:
        """None: it depends on records and images alone."""
        return ()


@dataclass(frozen=True)
class LimitLengthSettings:
    """How long a conversation may be."""

    min_words: int = setting(0, "Drop records with fewer words in all turns together", minimum=0)
    max_words: int | None = setting(None, "Drop records with more words in all turns together", minimum=1)
    min_tokens: int = setting(0, "Drop records with fewer tokens of text in all turns together", minimum=0)
    max_tokens: int | None = setting(None, "Drop records with more tokens of text in all turns together", minimum=1)
    tokenizer: Path | None = setting(None, "The tokenizer.json that counts tokens, or its folder, such as a model's")


class LimitLength(DataOperator[LimitLengthSettings]):
    """Drops records with too few or too many words or tokens"""

    name = "limit-length"
    Settings = LimitLengthSettings

    def validate(self, plan: object) -> Iterable[str]:
        settings = self.settings
        for unit, least, most in (
            ("words", settings.min_words, settings.max_words),
            ("tokens", settings.min_tokens, settings.max_tokens),
        ):
            if most is not None and most < least:
                yield f"'max_{unit}' is {most}, less than 'min_{unit}', {least}; nothing would be kept"
        if not (settings.min_tokens or settings.max_tokens):
            return
        if settings.tokenizer is None:
            yield "'tokenizer' is not set; name a tokenizer.json to count tokens with, or a folder that has one"
        elif not _file_of(settings.tokenizer).is_file():
            yield MissingFile(f"there is no file '{_file_of(settings.tokenizer)}'; correct 'tokenizer'")

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        settings = self.settings
        measures = [("words", lambda text: len(text.split()), settings.min_words, settings.max_words)]
        if settings.min_tokens or settings.max_tokens:
            measures.append(("tokens", _token_counter(settings.tokenizer), settings.min_tokens, settings.max_tokens))
        for record in records:
            texts = [turn.text.replace(PLACE, " ") for turn in record.turns]
            for unit, count, least, most in measures:
                length = sum(map(count, texts))
                if length < least or (most is not None and length > most):
                    how = f"fewer than {least}" if length < least else f"more than {most}"
                    yield BadRecord.of(record, f"{length} {unit}, {how}", **{unit: length})
                    break
            else:
                yield record

    def files(self) -> Sequence[Path]:
        """The tokenizer, where it counts tokens."""
        settings = self.settings
        counts = settings.tokenizer and (settings.min_tokens or settings.max_tokens)
        return (_file_of(settings.tokenizer),) if counts and settings.tokenizer else ()


@hookimpl
def data_operators() -> list[type[DataOperator[Any]]]:
    return [DropBrokenImages, DeduplicateImages, LimitLength]


def _fault(image: Image) -> str | None:
    try:
        load_image(image)
    except DataError as error:
        return error.sentence
    return None


def _file_of(tokenizer: Path) -> Path:
    return tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer


def _token_counter(tokenizer: Path | None) -> Callable[[str], int]:
    """How many tokens a text has, without those that mark its beginning or end."""
    from tokenizers import Tokenizer

    if tokenizer is None:
        raise DataError("'limit-length' has no 'tokenizer'; name a tokenizer.json, or a folder that has one")
    file = _file_of(tokenizer)
    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises a bare Exception.
        raise DataError(f"'{file}' is no tokenizer that can be read ({error}); correct 'tokenizer'") from None
    return lambda text: len(loaded.encode(text, add_special_tokens=False).ids)
