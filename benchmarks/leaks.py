"""Leaks planted among photographs: which kinds are found, and how many false ones are.

    python benchmarks/leaks.py FOLDER_OF_PHOTOGRAPHS > benchmarks/leaks.md

The photographs, and their tiles, are test sets; what is made of each is planted into training data. Needs `easy-vqa`; scikit-image's `skimage/data` serves as the folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image as PILImage
from PIL import ImageEnhance, ImageOps, UnidentifiedImageError

from graftwork import Image, Record, Turn
from graftwork.data import LeakFinder, look_at_images
from graftwork_easy_vqa import EasyVqa, EasyVqaSettings, EasyVqaSource, EasyVqaSourceSettings

TILE = 224
LEAST_SIDE = 100
LEAST_SPREAD = 12.0
"""Tiles of which the grey levels spread less are no photographs of anything."""
Picture = PILImage.Image


def encoded(picture: Picture, kind: str = "PNG", **options: int) -> bytes:
    """The bytes of an image file."""
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def cropped(picture: Picture, share: float) -> Picture:
    """The middle, without a share of each side's length."""
    width, height = picture.size
    return picture.crop(
        (
            int(width * share / 2),
            int(height * share / 2),
            width - int(width * share / 2),
            height - int(height * share / 2),
        )
    )


def scaled(picture: Picture, times: float) -> Picture:
    """The image at another size."""
    return picture.resize((round(picture.width * times), round(picture.height * times)), PILImage.Resampling.LANCZOS)


PLANTED: dict[str, Callable[[Picture], bytes]] = {
    "the same bytes under another name": encoded,
    "the same pixels in another format": lambda p: encoded(p, "BMP"),
    "scaled to a half": lambda p: encoded(scaled(p, 0.5)),
    "scaled to three quarters": lambda p: encoded(scaled(p, 0.75)),
    "scaled to double": lambda p: encoded(scaled(p, 2.0)),
    "JPEG, quality 75": lambda p: encoded(p, "JPEG", quality=75),
    "JPEG, quality 20": lambda p: encoded(p, "JPEG", quality=20),
    "a half, JPEG quality 20": lambda p: encoded(scaled(p, 0.5), "JPEG", quality=20),
    "a tenth brighter": lambda p: encoded(ImageEnhance.Brightness(p).enhance(1.1)),
    "grey": lambda p: encoded(ImageOps.grayscale(p)),
    "cropped by 2 %": lambda p: encoded(cropped(p, 0.02)),
    "cropped by 5 %": lambda p: encoded(cropped(p, 0.05)),
    "cropped by 10 %": lambda p: encoded(cropped(p, 0.1)),
    "mirrored": lambda p: encoded(ImageOps.mirror(p)),
    "turned by a quarter": lambda p: encoded(p.transpose(PILImage.Transpose.ROTATE_90)),
}


def photographs(folder: Path) -> Iterator[tuple[str, Picture]]:
    """The names and the pixels of all images in a folder that are larger than a stamp, each once."""
    seen = set()
    for path in sorted(folder.iterdir()):
        try:
            picture = PILImage.open(path).convert("RGB")
        except (UnidentifiedImageError, OSError):
            continue
        if min(picture.size) >= LEAST_SIDE and picture.tobytes() not in seen:
            seen.add(picture.tobytes())
            yield path.stem, picture


def tiles_of(picture: Picture) -> Iterator[Picture]:
    """The tiles of a photograph, but for those that show nothing."""
    for top in range(0, picture.height - TILE + 1, TILE):
        for left in range(0, picture.width - TILE + 1, TILE):
            tile = picture.crop((left, top, left + TILE, top + TILE))
            grey = [*ImageOps.grayscale(tile.resize((32, 32))).tobytes()]
            mean = sum(grey) / len(grey)
            if (sum((level - mean) ** 2 for level in grey) / len(grey)) ** 0.5 >= LEAST_SPREAD:
                yield tile


def record(id: str, data: bytes) -> Record:
    """A record about an image."""
    turns = (Turn("user", "<image>\nWhat is to be seen?"), Turn("assistant", "A thing."))
    return Record(id, turns, (Image(data=data),))


def leaks(test: Sequence[Picture], training: Iterable[bytes]) -> int:
    """How many of the training images leak from a test set."""
    finder = LeakFinder()
    finder.add("photographs", [record(f"test/{n}", encoded(picture)) for n, picture in enumerate(test)])
    records = (record(f"training/{n}", data) for n, data in enumerate(training))
    return sum(finder.leak(*seen) is not None for seen in look_at_images(records))


def of_easy_vqa() -> tuple[int, int]:
    """How many of easy-VQA's training records leak from its own test split, and how many there are."""
    finder = LeakFinder()
    finder.add("easy-vqa", EasyVqa(EasyVqaSettings()).records())
    found = [
        finder.leak(*seen) is not None for seen in look_at_images(EasyVqaSource(EasyVqaSourceSettings()).records())
    ]
    return sum(found), len(found)


def main(folder: Path) -> None:
    """Print the table."""
    whole = [picture for _, picture in photographs(folder)]
    tiles = [tile for picture in whole for tile in tiles_of(picture)]
    print("# Leaks: what is found of what was planted\n")
    print(
        "Made by `python benchmarks/leaks.py FOLDER`, here with the photographs of scikit-image's `skimage/data`. A test set is"
    )
    print(
        f"their images as they are, and another one their {len(tiles)} tiles of {TILE} x {TILE} pixels; the training data holds what is"
    )
    print("made of each. Found is what `graftwork data check --against` and the operator `leaks` call a leak.\n")
    print(f"| in the training data | of {len(whole)} images | of {len(tiles)} tiles |\n| --- | --- | --- |")
    for kind, make in PLANTED.items():
        cells = [f"{(n := leaks(test, map(make, test)))} ({n / len(test):.0%})" for test in (whole, tiles)]
        print(f"| {kind} | {' | '.join(cells)} |")
    false = [leaks(test[::2], map(encoded, test[1::2])) for test in (whole, tiles)]
    found, records = of_easy_vqa()
    print("\nFalse ones, where a test set is every second one and the training data holds the others:")
    print(
        f"{false[0]} of {len(whole[1::2])} images and {false[1]} of {len(tiles[1::2])} tiles; and {found} of easy-VQA's {records:,}"
    )
    print("training records against its own test split.\n")
    print("A mirrored or turned image is another one to this rule, and a cut one often is.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
