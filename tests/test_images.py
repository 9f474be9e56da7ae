"""Images: every file becomes RGB pixels or one DataError."""

from __future__ import annotations

import os
import struct
import sys
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from PIL import PngImagePlugin, features

from graftwork.contracts import Image
from graftwork.data import image_digest, image_size, load_image
from graftwork.data.images import MAX_BYTES
from graftwork.errors import DataError


def encode(image: PILImage.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *, depth: int = 8, colour: int = 0, rows: bytes = b"") -> bytes:
    """A PNG written by hand, whose header may promise what its rows do not hold."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def noise(width: int = 40, height: int = 30) -> PILImage.Image:
    return PILImage.frombytes("RGB", (width, height), bytes(index * 7919 % 251 for index in range(width * height * 3)))


def load(data: bytes) -> PILImage.Image:
    return load_image(Image(data=data))


def refusal(image: Image, **options: int) -> str:
    with pytest.raises(DataError) as caught:
        load_image(image, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_plain_image_is_loaded_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "plain.png"
    path.write_bytes(encode(noise()))
    image = load_image(Image(path))
    assert image.mode == "RGB"
    assert image.tobytes() == noise().tobytes() == load(path.read_bytes()).tobytes()


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(encode(noise(), "JPEG"))
    assert load_image(Image(path)).size == (40, 30)


AVIF = pytest.mark.skipif(not features.check_module("avif"), reason="this Pillow has no AVIF")


@pytest.mark.parametrize(
    "format", ["BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP", pytest.param("AVIF", marks=AVIF)]
)
def test_every_promised_format_is_opened(format: str) -> None:
    assert load(encode(noise(), format)).size == (40, 30)


def test_files_that_are_no_images_are_refused_in_words(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("not an image")
    empty = tmp_path / "empty.png"
    empty.touch()
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    assert refusal(Image(tmp_path / "none.png")) == f"the image '{tmp_path / 'none.png'}' does not exist"
    assert refusal(Image(tmp_path)) == f"the image '{tmp_path}' is a folder"
    assert refusal(Image(pipe)) == f"the image '{pipe}' is not a regular file"
    assert refusal(Image(text)).startswith(f"'{text}' is not an image in one of the formats BMP, GIF")
    assert refusal(Image(empty)).startswith(f"'{empty}' is not an image")
    assert "cannot be read" in refusal(Image(tmp_path / ("x" * 5000)))
    assert "neither a path nor data" in refusal(Image())


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "it is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "it is a git-lfs pointer; fetch the file itself with",
        ),
        (b"\n<!DOCTYPE html><html>", "it is a web page; download the image again"),
        (b"<HTML>403 Forbidden", "it is a web page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "it is a HEIC image; convert it to JPEG"),
        (b"%PDF-1.7", "it is a PDF"),
    ],
)
def test_a_file_that_is_something_else_is_called_that(content: bytes, what: str) -> None:
    formats, _, found = refusal(Image(data=content)).partition(": ")
    assert formats.startswith(f"'{len(content)} bytes of image data' is not an image in one of the formats BMP, GIF")
    assert found.startswith(what)


def test_without_avif_in_pillow_an_avif_image_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    avif = b"\0\0\0\x1cftypavif" + b"\0" * 40
    monkeypatch.delattr(PIL, "AvifImagePlugin", raising=False)
    monkeypatch.setitem(sys.modules, "PIL.AvifImagePlugin", None)
    said = refusal(Image(data=avif))
    assert said.endswith(
        "WEBP: it is an AVIF image, which Pillow reads from version 11.3 on; upgrade it, or convert the image"
    )


@AVIF
def test_a_damaged_avif_image_is_not_blamed_on_pillow() -> None:
    whole = encode(noise(200, 200), "AVIF")
    assert "11.3" not in refusal(Image(data=whole[: len(whole) // 2]))
    assert "megapixels" in refusal(Image(data=whole), max_pixels=39_999)


def test_text_that_is_too_long_for_pillow_is_named_as_that() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    assert "holds far more text than pixels need" in refusal(Image(data=encode(noise(), pnginfo=text)))


def test_formats_that_run_other_programs_are_not_opened() -> None:
    assert "is not an image" in refusal(Image(data=encode(noise(), "EPS")))


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    whole = encode(noise(200, 200))
    path.write_bytes(whole[: len(whole) // 2])
    assert refusal(Image(path)).startswith(f"'{path}' cannot be read (")
    assert image_size(Image(path)) == (200, 200)
    jpeg = encode(noise(200, 200), "JPEG")
    assert "cannot be read" in refusal(Image(data=jpeg[: len(jpeg) // 2]))


@pytest.mark.parametrize("side", [8_000, 11_000, 30_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    bomb = Image(data=png(side, side))
    assert "is larger than the 50 megapixels that are opened" in refusal(bomb)
    with pytest.raises(DataError, match="megapixels"):
        image_size(bomb)


def test_the_limit_on_pixels_can_be_set_and_pil_keeps_its_own() -> None:
    before = PILImage.MAX_IMAGE_PIXELS
    image = Image(data=encode(noise()))
    assert load_image(image, max_pixels=1200).size == (40, 30)
    assert "larger than the 0.001199 megapixels" in refusal(image, max_pixels=1199)
    assert before == PILImage.MAX_IMAGE_PIXELS


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.webp"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # Sparse: takes no room on the disk.
    assert "has more than 512 MiB" in refusal(Image(path))


def test_cmyk_becomes_rgb() -> None:
    image = load(encode(PILImage.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = image.getpixel((4, 4))
    assert image.mode == "RGB"
    assert red > 200
    assert green < 60
    assert blue < 60


def test_sixteen_bit_grey_is_scaled_rather_than_clipped() -> None:
    levels = [0, 128, 129, 257, 32768, 65535]
    image = load(png(len(levels), 1, depth=16, rows=b"\0" + struct.pack(">6H", *levels)))
    assert [image.getpixel((x, 0))[0] for x in range(6)] == [0, 0, 1, 1, 128, 255]


def test_images_with_levels_of_unknown_range_are_refused() -> None:
    assert "has 32-bit levels" in refusal(Image(data=encode(PILImage.new("F", (4, 4), 0.5), "TIFF")))


def test_transparency_shows_white() -> None:
    rgba = PILImage.new("RGBA", (2, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (0, 0, 255, 255))
    grey = PILImage.new("LA", (2, 1), (0, 0))
    palette = PILImage.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    blue, white = (0, 0, 255), (255, 255, 255)
    assert list(load(encode(rgba)).get_flattened_data()) == [white, blue]
    assert list(load(encode(palette, transparency=0)).get_flattened_data()) == [white, blue]
    assert list(load(encode(palette)).get_flattened_data()) == [(0, 0, 0), blue]
    assert list(load(encode(grey)).get_flattened_data()) == [white, white]


def test_an_animation_gives_its_first_frame() -> None:
    first, second = PILImage.new("RGB", (4, 4), "red"), PILImage.new("RGB", (4, 4), "blue")
    assert load(encode(first, "GIF", save_all=True, append_images=[second])).getpixel((0, 0)) == (255, 0, 0)


def test_an_exif_orientation_is_not_applied() -> None:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    assert load(encode(noise(), "JPEG", exif=exif)).size == (40, 30)


def test_equal_pixels_have_equal_digests_whatever_the_file() -> None:
    def digest(image: PILImage.Image, format: str) -> str:
        return image_digest(Image(data=encode(image, format)))

    assert digest(noise(), "PNG") == digest(noise(), "BMP")
    assert digest(PILImage.new("RGB", (2, 8)), "PNG") != digest(PILImage.new("RGB", (4, 4)), "PNG")


@settings(deadline=None)
@given(st.binary(max_size=64), st.integers(0, 200), st.sampled_from(["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"]))
def test_damaged_files_end_in_an_image_or_a_data_error(damage: bytes, place: int, format: str) -> None:
    data = encode(noise(8, 8), format)
    with suppress(DataError):
        assert load(data[:place] + damage + data[place + len(damage) :]).mode == "RGB"
