"""Which images the records of a rehearsal show: the largest of the data, or the largest that a record may hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO

from graftwork import processes
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.model import Processor
from graftwork.contracts.plan import Plan
from graftwork.contracts.records import Image, Record, Turn
from graftwork.data import reading
from graftwork.data.image_sizes import UNKNOWN, ImageSizes, Size, sizes_of
from graftwork.errors import DataError

SMALL: Size = (64, 64)
UNEQUAL = ((1024, 1024), (2048, 512), (512, 2048))
"""Sizes that all take as many tokens as a small image where a processor gives every image the same."""
SHAPES = {1.0: "a square", 4 / 3: "4 : 3", 3 / 4: "3 : 4", 2.0: "2 : 1", 1 / 2: "1 : 2"}
"""Width to height of the images that are tried, and its name; the first of those that take the most tokens is shown."""
LARGE, LARGEST = 1 << 20, 1 << 24
"""The pixels from which on an image that takes no more tokens than one of a quarter shows that none takes more, and of the largest that is
tried."""
TRIED = 32
"""The records of how many sizes are tried, of those with the most pixels, with the longest short sides, and with the most images."""
MAX_RECORDS = 64
"""How many records of the same sizes are tried whether they fit into `train.max_length`."""


@dataclass(frozen=True)
class Shown:
    """The images of a record that is rehearsed."""

    sizes: tuple[Size, ...] = (SMALL,)
    """Width and height of each, in pixels."""
    what: str = ""
    """What they are, as a noun; empty where all images take the same."""
    shape: str = ""
    """As a noun, of an image that takes the same at every size, since small ones are scaled up; empty of all others."""

    @property
    def size(self) -> str:
        """Of what size they are."""
        if self.shape or not self.what:
            return f"{self.shape} of any size" if self.shape else "any size"
        return ", ".join(f"{width} x {height}" for width, height in self.sizes[:3]) + ", …" * (len(self.sizes) > 3)

    def __str__(self) -> str:
        return f"{self.what} ({self.size})" if self.what else "an image"


AN_IMAGE = Shown()
SMALL_IMAGE = Shown(what="a small image")


def blank_record(sizes: Sequence[Size]) -> Record:
    """A short question about black images of these sizes, and its answer."""
    turns = (Turn("user", "<image>\n" * len(sizes) + "What is this?"), Turn("assistant", "no"))
    return with_blanks(Record("rehearsal", turns), sizes)


def with_blanks(record: Record, sizes: Sequence[Size]) -> Record:
    """The record with black images of these sizes in the place of its own."""
    return replace(record, images=tuple(map(blank, sizes)))


@lru_cache(256)
def blank(size: Size) -> Image:
    """A black image, of a bit a pixel, as a file."""
    from PIL import Image as PILImage

    file = BytesIO()
    PILImage.new("1", size).save(file, "PNG")
    return Image(data=file.getvalue())


def length_of(processor: Processor, sizes: Sequence[Size]) -> float:
    """The tokens of a blank record; infinite where the processor takes no such images."""
    try:
        return processor.length(blank_record(sizes))
    except DataError:
        return math.inf


def takes_all_alike(processor: Processor) -> bool:
    """Whether every image takes as many tokens, whatever its size."""
    small = length_of(processor, [SMALL])
    return all(length_of(processor, [size]) == small for size in UNEQUAL)


def largest_allowed(processor: Processor, max_length: int) -> Shown:
    """The image that takes the most tokens of those that leave a record within `max_length`; one image, as most data has."""
    if takes_all_alike(processor):
        return AN_IMAGE

    def sized(pixels: float, aspect: float) -> Size:
        return max(1, round(math.sqrt(pixels * aspect))), max(1, round(math.sqrt(pixels / aspect)))

    def fits(pixels: float, aspect: float) -> bool:
        return length_of(processor, [sized(pixels, aspect)]) <= max_length

    def grown(aspect: float) -> tuple[float, float, float, bool]:
        """The tokens of the largest image of a shape that was tried and fits, its pixels, its shape, and whether a larger one fits too."""
        pixels, length = float(math.prod(SMALL)), length_of(processor, [sized(math.prod(SMALL), aspect)])
        while pixels < LARGEST:
            larger = length_of(processor, [sized(4 * pixels, aspect)])
            if larger > max_length:
                return length, pixels, aspect, False
            if larger == length and pixels >= LARGE:
                break  # Images have long been scaled down to the same.
            pixels, length = 4 * pixels, larger
        return length, pixels, aspect, True

    length, pixels, aspect, is_full = max(map(grown, SHAPES), key=lambda each: (each[0] <= max_length, each[0]))
    if is_full:
        smaller = last(lambda power: length_of(processor, [sized(pixels / 4**power, aspect)]) == length, range(1, 7))
        shown = Shown((sized(pixels / 4**smaller, aspect),), "an image at the model's full resolution")
        return replace(shown, shape=SHAPES[aspect]) if math.prod(shown.sizes[0]) <= math.prod(SMALL) else shown
    growth = last(lambda step: fits(pixels * 4 ** (step / 32), aspect), range(1, 32))
    return Shown((sized(pixels * 4 ** (growth / 32), aspect),), "the largest image that train.max_length allows")


def last(holds: Callable[[int], bool], numbers: Sequence[int]) -> int:
    """The last of the numbers up to which something holds, found by halving; 0 where it does not hold of the first."""
    low, high = 0, len(numbers)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(numbers[middle - 1]) else (low, middle - 1)
    return numbers[low - 1] if low else 0


def of_data(plan: Plan, lookup: Lookup, processor: Processor) -> Shown | None:
    """The images of the record whose images take the most tokens, of those that are trained on; None where no record has images.

    The data is read as for training, and kept for it; of images only headers are read, and none where all take the same.
    Collective. Raises GraftworkError for data that cannot be read.
    """
    if not plan.run_context.sources:
        return None
    alike = takes_all_alike(processor)

    def looked() -> tuple[reading.Reading, list[tuple[Size, ...]]]:
        read = reading.read(plan, lookup, processor)
        if alike:
            return read, [(SMALL,) * len(record.images) for record in read.result.records]
        return read, read.kept(lambda: sizes_of(read.result.records), ImageSizes.load, "image sizes").of_records()

    read, sizes = processes.first_alone(looked) or looked()
    return largest(read.result.records, sizes, processor, plan, alike)


def largest(
    records: Sequence[Record],
    sizes: Sequence[tuple[Size, ...]],
    processor: Processor,
    plan: Plan,
    alike: bool,
) -> Shown | None:
    """The sizes of the images of the record whose images take the most tokens and that is trained on."""
    settings = plan.run_context.train
    places: dict[tuple[Size, ...], list[int]] = {}
    for place, each in enumerate(sizes):
        if each and UNKNOWN not in each and len(known := places.setdefault(each, [])) < MAX_RECORDS:
            known.append(place)
    lengths = {each: length_of(processor, each) for each in candidates(places)}

    def is_trained_on(place: int) -> bool:
        try:
            return settings.too_long == "cut" or processor.length(records[place]) <= settings.max_length
        except DataError:
            return False

    for each in sorted(lengths, key=lengths.__getitem__, reverse=True):
        if lengths[each] <= settings.max_length and any(map(is_trained_on, places[each])):
            if alike and len(each) == 1:
                return AN_IMAGE
            many = f"the {len(each)} images that a record of the data has"
            return Shown(each, "the largest image of the data" if len(each) == 1 else many)
    return None


def candidates(sizes: Iterable[tuple[Size, ...]]) -> set[tuple[Size, ...]]:
    """The sizes that may take the most tokens: how a processor counts is not known, but more pixels, longer short sides and more images
    do not take fewer."""

    def pixels(each: tuple[Size, ...]) -> int:
        return sum(width * height for width, height in each)

    def short_sides(each: tuple[Size, ...]) -> int:
        return sum(map(min, each))

    every = [*sizes]
    return {
        each
        for key in (pixels, short_sides, len)
        for each in sorted(every, key=lambda each: (key(each), pixels(each)), reverse=True)[:TRIED]
    }
