"""What an image looks like, in a few bytes: near duplicates are found by it, also when scaled or compressed again."""

from __future__ import annotations

import hashlib
import weakref
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NamedTuple

from graftwork.config.machine import cores
from graftwork.contracts.records import Image, Record
from graftwork.data.compact import HashTable
from graftwork.data.images import load_image
from graftwork.data.store import hash64
from graftwork.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 32
"""The side of a thumbnail in pixels."""
BITS = 64
MAX_DISTANCE = 4
MAX_DIFFERENCE = 2.5
"""Near duplicates differ by at most so many of 64 bits, and by at most so many of 255 levels in the mean of their thumbnails.
Either alone finds thousands of pairs in drawings of one shape on a plain ground, where both together find none."""
FLAT = 0.4
"""The share of a thumbnail that has one colour in a drawing. Of easy-VQA's images each has more than 0.65."""
MORE_BITS, MORE_LEVELS = 2.5, 2.0
"""How many times as far apart near duplicates may be where neither is a drawing: photographs that have nothing to do with one another
differ by 16 bits and more, and compressed ones by more than drawings may."""
MAX_BAND_BITS = 11
"""So many bits of a band at most say where its images are kept: an index of a few megabytes, in which lists stay short."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What is known of an image once it was decoded."""

    bits: int
    """The perceptual hash: which of the 64 lowest frequencies are above their median."""
    thumbnail: bytes
    """32 x 32 RGB pixels, by rows."""
    width: int
    height: int
    digest: bytes
    """Of size and pixels: equal for equal images, whatever their files."""

    @property
    def is_flat(self) -> bool:
        """Whether one colour covers so much of it that little else tells it from others."""
        import numpy as np

        levels = (np.frombuffer(self.thumbnail, np.uint8).reshape(-1, 3) // 6).astype(np.int64)
        _, counts = np.unique(levels @ np.array([10_000, 100, 1]), return_counts=True)
        return bool(counts.max() > FLAT * SIDE * SIDE)

    @property
    def brightness(self) -> float:
        """The mean of the thumbnail, 0 to 255."""
        return sum(self.thumbnail) / len(self.thumbnail)


def fingerprint(image: Image) -> Fingerprint:
    """Decode an image and say what it looks like; DataError as `load_image`."""
    import numpy as np
    from PIL.Image import Resampling

    decoded = load_image(image)
    width, height = decoded.size
    digest = hashlib.blake2b(repr(decoded.size).encode() + decoded.tobytes(), digest_size=16).digest()
    thumbnail = decoded.resize((SIDE, SIDE), Resampling.BICUBIC).tobytes()
    pixels = np.frombuffer(thumbnail, np.uint8).reshape(SIDE, SIDE, 3).astype(np.float64)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    waves = _waves()
    # Rounded, so that the frequencies that a plain image lacks are exactly equal.
    low = np.round(waves @ grey @ waves.T, 6).ravel()
    bits = int.from_bytes(np.packbits(low > np.median(low)).tobytes())
    return Fingerprint(bits, thumbnail, width, height, digest)


@cache
def _waves() -> NDArray[Any]:
    """The eight lowest frequencies of a discrete cosine transform, `[8, SIDE]`."""
    import numpy as np

    places = (np.arange(SIDE) + 0.5) * np.pi / SIDE
    waves: NDArray[Any] = np.cos(np.arange(8)[:, None] * places) * np.sqrt(2 / SIDE)
    waves[0] /= np.sqrt(2)
    return waves


class Match(NamedTuple):
    """An image that another one is a near duplicate of."""

    number: int
    """Under which it was added."""
    distance: int
    """In how many of 64 bits they differ."""
    difference: float
    """The mean difference of their thumbnails, in levels."""


class NearImages:
    """Fingerprints among which near duplicates are found without comparing all with all.

    Two are near duplicates by `max_distance` and `max_difference`, or where neither is flat, by `MORE_BITS` and `MORE_LEVELS` times
    as much.
    """

    def __init__(self, max_distance: int = MAX_DISTANCE, max_difference: float = MAX_DIFFERENCE) -> None:
        self._seen = _Seen()
        self._all = _Index(self._seen, max_distance, max_difference)
        self._textured = _Index(self._seen, int(max_distance * MORE_BITS), max_difference * MORE_LEVELS)

    def __len__(self) -> int:
        return len(self._seen.bits)

    def add(self, found: Fingerprint, number: int) -> None:
        """Add a fingerprint under a number by which `nearest` names it."""
        place = self._seen.add(found, number)
        self._all.add(found, place)
        if not found.is_flat:
            self._textured.add(found, place)

    def nearest(self, found: Fingerprint) -> Match | None:
        """The added one that this is a near duplicate of, the nearest by thumbnail and the earliest of equals; None for none."""
        return self._all.nearest(found) or (None if found.is_flat else self._textured.nearest(found))


class _Seen:
    """Fingerprints by their places: 24 bytes each in memory, and the thumbnails in a temporary file."""

    def __init__(self) -> None:
        self.bits, self.brightness, self.numbers = array("Q"), array("d"), array("q")
        self._thumbnails = TemporaryFile()  # noqa: SIM115 - it is open as long as this object lives
        weakref.finalize(self, self._thumbnails.close)

    def add(self, found: Fingerprint, number: int) -> int:
        """Add a fingerprint, and return its place."""
        place = len(self.bits)
        self.bits.append(found.bits)
        self.brightness.append(found.brightness)
        self.numbers.append(number)
        self._thumbnails.seek(place * len(found.thumbnail))
        self._thumbnails.write(found.thumbnail)
        return place

    def difference(self, thumbnail: bytes, place: int) -> float:
        """The mean difference of a thumbnail and the one at a place, in levels."""
        import numpy as np

        self._thumbnails.seek(place * len(thumbnail))
        other = np.frombuffer(self._thumbnails.read(len(thumbnail)), np.uint8).astype(np.int16)
        return float(np.abs(other - np.frombuffer(thumbnail, np.uint8)).mean())


class _Index:
    """The places of fingerprints, found by one rule.

    Of hashes that differ in at most `max_distance` bits, one of `max_distance` + 1 bands is equal, so that only those with an equal
    band, and about the same brightness, are compared. An image takes four bytes a band.
    """

    def __init__(self, seen: _Seen, max_distance: int, max_difference: float) -> None:
        self.seen, self.max_distance, self.max_difference = seen, max_distance, max_difference
        parts = max_distance + 1
        self._bands = [(part * BITS // parts, (part + 1) * BITS // parts) for part in range(parts)]
        self._members: dict[int, array[int]] = {}
        """By a band and the last bits of its value: the places of those that have them."""

    def add(self, found: Fingerprint, place: int) -> None:
        """Add a fingerprint that was seen, by its place."""
        for key in self._keys(found):
            self._members.setdefault(key, array("I")).append(place)

    def nearest(self, found: Fingerprint) -> Match | None:
        """The added one that this is a near duplicate of, the nearest by thumbnail and the earliest of equals; None for none."""
        best: Match | None = None
        for place, distance in sorted(self._candidates(found).items()):
            difference = self.seen.difference(found.thumbnail, place)
            if difference <= self.max_difference and (best is None or difference < best.difference):
                best = Match(self.seen.numbers[place], distance, difference)
        return best

    def _candidates(self, found: Fingerprint) -> dict[int, int]:
        """The places of those whose hash is near, and whose thumbnail may be, with the distance of the hashes."""
        import numpy as np

        brightness, candidates = found.brightness, dict[int, int]()
        for key in self._keys(found):
            if (members := self._members.get(key)) is None:
                continue
            places = np.frombuffer(members, np.uint32)
            # The mean of differences is never less than the difference of means.
            darker = np.abs(np.frombuffer(self.seen.brightness)[places] - brightness)
            places = places[darker <= self.max_difference]
            changed = np.frombuffer(self.seen.bits, np.uint64)[places] ^ np.uint64(found.bits)
            distances = np.unpackbits(changed.view(np.uint8)).reshape(-1, BITS).sum(1)
            near = distances <= self.max_distance
            candidates.update(zip(places[near].tolist(), distances[near].tolist(), strict=True))
        return candidates

    def _keys(self, found: Fingerprint) -> Iterator[int]:
        for band, (start, end) in enumerate(self._bands):
            value = found.bits >> start & (1 << min(end - start, MAX_BAND_BITS)) - 1
            yield band << MAX_BAND_BITS | value


class Look(NamedTuple):
    """One image of a record, as `look_at_images` saw it."""

    number: int
    """Equal for the same file, or the same bytes; counted from 0."""
    found: Fingerprint | DataError | None
    """What it looks like, or why it cannot be opened; None where it was seen before."""


def look_at_images(records: Iterable[Record]) -> Iterator[tuple[Record, tuple[Look, ...]]]:
    """Each record with a look at its images. Every distinct one is decoded once, on all cores, a few ahead of what is asked for."""
    workers = cores()
    numbers = HashTable()
    waiting: deque[tuple[Record, list[tuple[int, Future[Fingerprint | DataError] | None]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for record in records:
            looks: list[tuple[int, Future[Fingerprint | DataError] | None]] = []
            for image in record.images:
                next_number = len(numbers)
                number = numbers.setdefault(hash64(image.key), next_number)
                looks.append((number, pool.submit(_look, image) if number == next_number else None))
            waiting.append((record, looks))
            if len(waiting) > 8 * workers:
                yield _done(*waiting.popleft())
        while waiting:
            yield _done(*waiting.popleft())


def _done(
    record: Record, looks: list[tuple[int, Future[Fingerprint | DataError] | None]]
) -> tuple[Record, tuple[Look, ...]]:
    return record, tuple(Look(number, future.result() if future else None) for number, future in looks)


def _look(image: Image) -> Fingerprint | DataError:
    try:
        return fingerprint(image)
    except DataError as error:
        return error
