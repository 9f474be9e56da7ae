"""Fingerprints: the same image is found again in another form, and no other one is taken for it."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import about, encoded, picture
from PIL import Image as PILImage
from PIL import ImageDraw, ImageOps

from graftwork.contracts import Image
from graftwork.data import Fingerprint, NearImages, look_at_images
from graftwork.data.fingerprints import fingerprint
from graftwork.errors import DataError

ORIGINALS = range(12)


@pytest.fixture(scope="module")
def near() -> NearImages:
    """Twelve images by their numbers."""
    found = NearImages()
    for number in ORIGINALS:
        found.add(fingerprint(encoded(picture(number))), number)
    return found


@pytest.mark.parametrize(
    "again",
    [
        lambda made: encoded(made, "BMP"),
        lambda made: encoded(made.resize((160, 128))),
        lambda made: encoded(made.resize((500, 400))),
        lambda made: encoded(made, "JPEG", quality=20),
    ],
    ids=["another format", "smaller", "larger", "JPEG at quality 20"],
)
def test_an_image_is_found_in_another_form(near: NearImages, again: object) -> None:
    matches = [near.nearest(fingerprint(again(picture(number)))) for number in ORIGINALS]  # type: ignore[operator]
    assert [match.number if match else None for match in matches] == [*ORIGINALS]


def test_other_images_are_not_taken_for_it(near: NearImages) -> None:
    others = [picture(100 + number) for number in ORIGINALS]
    others += [ImageOps.mirror(picture(number)) for number in ORIGINALS]
    assert [near.nearest(fingerprint(encoded(other))) for other in others] == [None] * len(others)


def drawn(x: int, y: int, colour: str) -> Image:
    """A small shape on a plain ground."""
    made = PILImage.new("RGB", (64, 64), "#eef0ff")
    ImageDraw.Draw(made).ellipse((x, y, x + 12, y + 12), fill=colour)
    return encoded(made)


def test_drawings_of_one_shape_are_told_apart() -> None:
    found = NearImages()
    shapes = [(x, y, colour) for x in (4, 40) for y in (4, 40) for colour in ("red", "blue", "teal")]
    for number, shape in enumerate(shapes):
        made = fingerprint(drawn(*shape))
        assert found.nearest(made) is None, shapes[number]
        found.add(made, number)
    assert [found.nearest(fingerprint(drawn(*shape)))[:1] for shape in shapes] == [(n,) for n in range(len(shapes))]  # type: ignore[index]


def test_bands_miss_nothing_that_comparing_all_with_all_finds() -> None:
    generator = np.random.default_rng(3)
    grey = bytes([128]) * (32 * 32 * 3)
    known = [int(bits) for bits in generator.integers(0, 2**63, 50)]
    index = NearImages()
    for number, bits in enumerate(known):
        index.add(Fingerprint(bits, grey, 1, 1, b""), number)
    for number, bits in enumerate(known):
        for flips in range(8):
            places = generator.choice(64, flips, replace=False)
            changed = bits ^ sum(1 << int(place) for place in places)
            match = index.nearest(Fingerprint(changed, grey, 1, 1, b""))
            assert (match is not None and match.number == number) == (flips <= 4)


def test_thumbnails_that_differ_by_more_than_allowed_are_no_match() -> None:
    index = NearImages(max_difference=2.5)
    index.add(Fingerprint(5, bytes([100]) * 3072, 1, 1, b""), 0)
    found = [index.nearest(Fingerprint(5, bytes([level]) * 3072, 1, 1, b"")) for level in (97, 98, 102, 103)]
    assert [match is not None for match in found] == [False, True, True, False]


def test_every_distinct_image_is_looked_at_once_and_in_order() -> None:
    images = [encoded(picture(n, (40, 40))) for n in range(3)]
    broken = Image(data=b"no image")
    records = [about(str(n), images[n % 3] if n % 4 else broken) for n in range(60)]
    records[5] = about("5")
    seen = [*look_at_images(iter(records))]
    assert [record for record, _ in seen] == records
    looks = [look for _, looks in seen for look in looks]
    assert sum(isinstance(look.found, Fingerprint) for look in looks) == 3
    assert sum(isinstance(look.found, DataError) for look in looks) == 1
    numbers = {record.images[0]: looks[0].number for record, looks in seen if looks}
    assert sorted(numbers.values()) == [0, 1, 2, 3]
    assert all(numbers[record.images[0]] == looks[0].number for record, looks in seen if looks)
