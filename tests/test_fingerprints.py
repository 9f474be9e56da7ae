"""Fingerprints: the same image is found again in another form, and no other one is taken for it."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pictures import about, encoded, picture
from PIL import Image as PILImage
from PIL import ImageDraw, ImageOps

from graftwork.contracts import Image, Record, Turn
from graftwork.data import MAX_DIFFERENCE, Fingerprint, NearImages, look_at_images
from graftwork.data.fingerprints import fingerprint
from graftwork.data.store import RecordStore, RecordWriter
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


def textured(seed: int) -> PILImage.Image:
    """An image as photographs are: no colour covers much of it."""
    numbers = np.random.default_rng(seed)
    light = numbers.integers(20, 236, (7, 7, 1)) + numbers.integers(-20, 20, (7, 7, 3))
    small = PILImage.fromarray(light.clip(0, 255).astype(np.uint8))
    return small.resize((112, 112), PILImage.Resampling.BICUBIC)


def as_jpeg(image: PILImage.Image, quality: int) -> Image:
    stream = BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image(data=stream.getvalue())


def test_photographs_may_differ_more_than_drawings() -> None:
    near, photographs = NearImages(), [textured(seed) for seed in range(12)]
    for number, photograph in enumerate(photographs):
        near.add(fingerprint(as_jpeg(photograph, 95)), number)
    compressed = [fingerprint(as_jpeg(photograph, 20)) for photograph in photographs]
    assert not any(found.is_flat for found in compressed)
    matches = [near.nearest(found) for found in compressed]
    assert [match.number for match in matches if match] == [*range(12)]
    assert any(match.difference > MAX_DIFFERENCE for match in matches if match)
    assert [near.nearest(fingerprint(as_jpeg(textured(seed), 95))) for seed in range(100, 112)] == [None] * 12


def test_a_drawing_is_flat() -> None:
    drawing = PILImage.new("RGB", (64, 64), "white")
    drawing.paste("red", (20, 20, 50, 50))
    assert fingerprint(as_jpeg(drawing, 95)).is_flat


def test_images_that_came_as_bytes_are_not_one_because_they_are_as_long(tmp_path: Path) -> None:
    images = []
    for colour in ("red", "green", "blue"):
        stream = BytesIO()
        PILImage.new("RGB", (8, 8), colour).save(stream, "BMP")
        images.append(Image(data=stream.getvalue()))
    with RecordWriter(tmp_path / "records", tmp_path) as to:
        for number, image in enumerate(images):
            to.add(Record(str(number), (Turn("user", "<image>\n?"), Turn("assistant", "!")), (image,)))
        to.finish()
    store = RecordStore(tmp_path / "records", tmp_path)
    assert len({record.images[0].key for record in store}) == 3
    assert [look.number for _, looks in look_at_images(store) for look in looks] == [0, 1, 2]
