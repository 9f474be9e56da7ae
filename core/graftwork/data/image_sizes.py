"""How large the images of records are, from their headers alone."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from graftwork.contracts.records import Image, Record
from graftwork.data.images import image_size
from graftwork.data.measuring import chunks
from graftwork.data.store import Array, hash64
from graftwork.errors import DataError

Size = tuple[int, int]
"""Width and height in pixels."""
UNKNOWN: Size = (0, 0)
"""Of an image whose header cannot be read."""
READERS = 8
"""Threads that read headers, most of whose time goes into waiting for files."""


@dataclass(frozen=True)
class ImageSizes:
    """The sizes of the images of each record of a data set."""

    counts: Array
    """How many images each record has, int32."""
    sizes: Array
    """Those of all records, one after another: int32 `[images, 2]`."""

    def of_records(self) -> list[tuple[Size, ...]]:
        """The sizes of each record's images, in order."""
        flat = iter([*map(tuple, self.sizes.tolist())])
        return [tuple(next(flat) for _ in range(count)) for count in self.counts.tolist()]

    def save(self, folder: Path) -> None:
        """Write everything into a folder."""
        import numpy

        numpy.savez(folder / "image-sizes.npz", counts=self.counts, sizes=self.sizes)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        import numpy

        with (folder / "image-sizes.npz").open("rb") as file, numpy.load(file) as arrays:
            return cls(arrays["counts"], arrays["sizes"])


def sizes_of(records: Sequence[Record]) -> ImageSizes:
    """Read the header of every image of records, each once; none is decoded."""
    import numpy

    known, counts, sizes = dict[int, Size](), array("i"), array("i")
    with ThreadPoolExecutor(READERS) as pool:
        for chunk in chunks(records):
            named = [[(hash64(image.key), image) for image in record.images] for record in chunk]
            new = {key: image for each in named for key, image in each if key not in known}
            known.update(zip(new, pool.map(_size_of, new.values()), strict=True))
            for each in named:
                counts.append(len(each))
                for key, _ in each:
                    sizes.extend(known[key])
    return ImageSizes(numpy.array(counts, dtype=numpy.int32), numpy.array(sizes, dtype=numpy.int32).reshape(-1, 2))


def _size_of(image: Image) -> Size:
    try:
        return image_size(image)
    except DataError:
        return UNKNOWN
