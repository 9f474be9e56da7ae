"""Boxes and points in texts: what their numbers count, and where they lie in an image as the model gets it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any, Literal

from graftwork.contracts.model import Processor
from graftwork.contracts.records import Record
from graftwork.errors import CoordinatesRefused, DataError

Coordinates = Literal["pixels", "relative", "none"]
"""What the numbers of boxes and points count: pixels of the image as its file has it, x before y; shares of its sides, from 0 to 1,
to 100 or to 1000, which stay true in any size; or nothing of an image."""
Size = tuple[int, int]
"""Width and height in pixels."""

NUMBER = r"(?<![\w.])-?\d+(?:\.\d+)?"
PAIR = rf"{NUMBER}\s*,\s*{NUMBER}"
ENCLOSED = r"[\s\d.,()\[\]-]*\d[\s\d.,()\[\]-]*"
PLACES = re.compile(
    rf'"(?:bbox|point)(?:_2d)?"\s*:\s*\[\s*{PAIR}(?:\s*,\s*{PAIR})?\s*\]'
    rf"|<\|box_start\|>{ENCLOSED}<\|box_end\|>|<box>{ENCLOSED}</box>"
    rf'|<points?(?:\s+[xy]\d*\s*=\s*"{NUMBER}")+'
    rf"|\[\s*{PAIR}\s*,\s*{PAIR}\s*\]|\[\s*\[\s*{PAIR}\s*\](?:\s*,\s*\[\s*{PAIR}\s*\])+\s*\]"
)
"""How texts write a box or a point: Qwen's, InternVL's and Molmo's ways, `[x1, y1, x2, y2]`, and lists of `[x, y]`."""
IN_PIXELS = re.compile(
    rf'{PLACES.pattern}|"x"\s*:\s*{NUMBER}\s*,\s*"y"\s*:\s*{NUMBER}|<point>\s*{NUMBER}[\s,]+{NUMBER}\s*</point>'
    rf"|[\[(]\s*{PAIR}(?:\s*,\s*{PAIR})*\s*[\])]"
)
"""What else is one where data is said to hold them in pixels: a single `(x, y)` or `[x, y]`, and polygons."""
LISTS = re.compile(rf"[\[(]\s*{NUMBER}(?:\s*,\s*{NUMBER})+\s*[\])]")


class InView:
    """A model's processor that gets each record `in_view`; everything else is the processor's own."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor

    def __getattr__(self, name: str) -> Any:
        if name == "processor":  # a copy has nothing yet
            raise AttributeError(name)
        return getattr(self.processor, name)

    def encode(self, record: Record) -> Any:
        """What the processor encodes; DataError for boxes and points that it must not see."""
        return self.processor.encode(in_view(record, self.processor))

    def length(self, record: Record) -> int:
        """How many tokens that makes."""
        return self.processor.length(in_view(record, self.processor))

    def lengths(self, records: Sequence[Record]) -> Sequence[int | DataError]:
        """The length of each record in tokens, or why the processor takes no such record."""
        several = getattr(self.processor, "lengths", None)
        found: list[Record | DataError] = []
        for record in records:
            try:
                found.append(in_view(record, self.processor))
            except CoordinatesRefused:
                raise
            except DataError as error:
                found.append(error)
        fit = [each for each in found if isinstance(each, Record)]
        taken: Iterator[int | DataError] | None = iter(several(fit)) if several else None

        def length(each: Record | DataError) -> int | DataError:
            if isinstance(each, DataError):
                return each
            if taken is not None:
                return next(taken)
            try:
                return self.processor.length(each)
            except DataError as error:
                return error

        return [length(each) for each in found]


def in_view(record: Record, processor: Any) -> Record:
    """The record with its boxes and points where they lie in the image as the model gets it, in all turns and references.

    Raises DataError for a record of which one lies outside its image, and CoordinatesRefused where it is not said what the numbers
    count, or where the model gets an image in no one size.
    """
    forms = (IN_PIXELS, LISTS) if record.coordinates == "pixels" else (PLACES,)
    held = any(form.search(text) for form in forms for text in texts_of(record))
    if not record.images or record.coordinates == "none" or not held:
        return record
    if record.coordinates == "relative":
        check_relative(record)
        return record
    if not record.coordinates:
        check_said(record)
        return record
    if record.coordinates != "pixels":
        raise DataError(
            f"record '{record.id}' has the coordinates '{record.coordinates}'; correct it to pixels, relative or none"
        )
    resized = getattr(processor, "resized", None)
    if resized is None:
        raise CoordinatesRefused(
            f"'{record.place}' holds boxes or points in pixels, and this model's processor does not say to what size it resizes an image; "
            'write them as shares of the sides, and set coordinates = "relative"'
        )
    sizes: Sequence[tuple[Size, Size]] = resized(record)
    if len(set(sizes)) > 1:
        raise DataError(
            f"record '{record.id}' holds boxes or points in pixels, and its {len(sizes)} images differ in size; split it"
        )
    (size, seen), *_ = sizes
    check_inside(record, size)
    if size == seen:
        return replace(record, coordinates="none")
    return replace(
        record,
        turns=tuple(replace(turn, text=moved(turn.text, size, seen)) for turn in record.turns),
        reference=tuple(moved(text, size, seen) for text in record.reference),
        coordinates="none",
    )


def check_said(record: Record) -> None:
    """CoordinatesRefused where an answer holds a box or a point, and it is not said what its numbers count."""
    answers = (*(turn.text for turn in record.turns if turn.role == "assistant"), *record.reference)
    if record.images and not record.coordinates and (found := next(filter(None, map(PLACES.search, answers)), None)):
        raise CoordinatesRefused(
            f"'{record.place}' answers with what looks like a box or a point, {found[0]}, which images of another size would make wrong; "
            'set coordinates of its data source: "pixels" of the image\'s file, "relative" to its sides, or "none" for other numbers'
        )


def check_relative(record: Record) -> None:
    """DataError for a number that is no share of an image's side."""
    if wrong := next((value for value in numbers_of(record) if not 0 <= value <= 1000), None):
        raise DataError(
            f"record '{record.id}' holds {wrong:g} in a box or point, and coordinates are \"relative\": from 0 to 1, or to 1000; "
            "correct it"
        )


def check_inside(record: Record, size: Size) -> None:
    """DataError for a box or a point in pixels that lies outside its image."""
    for text in texts_of(record):
        left = IN_PIXELS.sub("", text)
        if odd := LISTS.search(left):
            raise DataError(
                f"record '{record.id}' holds {odd[0]}, whose numbers are no pairs of pixels; write them as [x1, y1, x2, y2]"
            )
    for match in places_of(record, IN_PIXELS):
        for number, bound in zip(re.findall(NUMBER, match), cycle(size)):
            if not 0 <= float(number) <= bound:
                raise DataError(
                    f"record '{record.id}' holds {match}, which lies outside its image of {size[0]} x {size[1]} pixels; correct it, or "
                    "what coordinates says of its data source"
                )


def moved(text: str, size: Size, seen: Size) -> str:
    """A text whose boxes and points lie in an image of size `seen` where they lay in one of `size`, in whole pixels."""

    def place(match: re.Match[str]) -> str:
        scales = cycle((seen[0] / size[0], seen[1] / size[1]))
        return re.sub(NUMBER, lambda number: str(math.floor(float(number[0]) * next(scales) + 0.5)), match[0])

    return IN_PIXELS.sub(place, text)


def texts_of(record: Record) -> Iterator[str]:
    """The texts of a record: its turns, and the accepted answers."""
    yield from (turn.text for turn in record.turns)
    yield from record.reference


def places_of(record: Record, form: re.Pattern[str] = PLACES) -> Iterator[str]:
    """The boxes and points of a record, as they are written."""
    return (match[0] for text in texts_of(record) for match in form.finditer(text))


def numbers_of(record: Record) -> Iterator[float]:
    """The numbers of its boxes and points."""
    return (float(number) for place in places_of(record) for number in re.findall(NUMBER, place))
