"""A share of the records for validation, such that no image is on both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from graftwork.contracts.records import Image, Record
from graftwork.data.digest import image_hash
from graftwork.data.store import Array, StoredImage, hash64


def held_out(
    records: Iterable[Record], share: float, seed: int, content_of: Callable[[Image], str] | None = None
) -> Array:
    """Which of the records are kept for validation, bool.

    Records without images that were made of the same ones, and those that show images of the same name, or by `content_of` of the same content, or that are connected by others which do, stay
    together. Which side such a group comes to depends on the seed and on the names of its images alone, so that it stays there
    when records are added or the data is moved.
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
        images = [key for image in record.images for key in _keys(image, content_of)]
        made_of = record.meta.get("of") or ([] if images else [record.id])
        images += [_name("no image", each) for each in made_of]
        firsts.append(images[0])
        for image in images:
            # The smallest hash is the root, so that it does not depend on the order of the records.
            low, high = sorted((root(images[0]), root(image)))
            parents[high] = low
    drawn = numpy.array([hash64(seed, root(image)) for image in firsts], dtype=numpy.int64)
    return drawn.astype(float) / 2.0**64 + 0.5 < share


def _keys(image: Image, content_of: Callable[[Image], str] | None) -> Iterator[int]:
    """By what an image is the same as others: its name, as far as that stays when a folder is moved, and its content."""
    if image.path and not isinstance(image, StoredImage):
        yield _name(*image.path.parts[-2:], image.span)
    if content_of or not image.path or isinstance(image, StoredImage):
        yield hash64("content", (content_of or image_hash())(image)) & MASK


def _name(*parts: object) -> int:
    # Negative, and so below every content: a name, where there is one, is what decides.
    return -1 - (hash64(*parts) & MASK)


MASK = (1 << 63) - 1
