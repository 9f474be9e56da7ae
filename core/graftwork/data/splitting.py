"""A share of the records for validation, such that no image is on both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from graftwork.contracts.records import Image, Record
from graftwork.data.store import Array, hash64


def held_out(records: Iterable[Record], share: float, seed: int, name_of: Callable[[Image], str]) -> Array:
    """Which of the records are kept for validation, bool.

    Records that show the same image, by `name_of`, or that are connected by others which do, stay together. Which side such a
    group comes to depends on the seed and on its images alone, so that it stays there when records are added elsewhere.
    """
    import numpy

    parents: dict[int, int] = {}

    def root(image: int) -> int:
        while (parent := parents.setdefault(image, image)) != image:
            parents[image] = parents[parent]
            image = parent
        return image

    firsts = []
    for record in records:
        images = [hash64(name_of(image)) for image in record.images] or [hash64("no image", record.id)]
        firsts.append(images[0])
        for image in images:
            # The smaller hash is the root, so that it does not depend on the order of the records.
            low, high = sorted((root(images[0]), root(image)))
            parents[high] = low
    drawn = numpy.array([hash64(seed, root(image)) for image in firsts], dtype=numpy.int64)
    return drawn.astype(float) / 2.0**64 + 0.5 < share
