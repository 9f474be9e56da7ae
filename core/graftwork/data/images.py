"""Opening images safely: any common file becomes RGB pixels or one DataError, and nothing of PIL's state changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING

from graftwork.contracts.records import Image
from graftwork.errors import DataError

if TYPE_CHECKING:
    from PIL import Image as PILImage


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What is opened, whatever the file's name ends in, beside AVIF where Pillow reads it; JPEG includes MPO. No format that starts
other programs."""

MAX_PIXELS = 50_000_000
MAX_BYTES = 512 * 2**20
OTHERS = {
    b"version https://git-lfs": "it is a git-lfs pointer; fetch the file itself with 'git lfs pull'",
    b"<!doctype html": "it is a web page; download the image again",
    b"<html": "it is a web page; download the image again",
    b"<svg": "it is an SVG drawing; save it as a PNG",
    b"%pdf": "it is a PDF; save its page as a PNG",
    b"ftypheic": "it is a HEIC image; convert it to JPEG",
    b"ftypheix": "it is a HEIC image; convert it to JPEG",
    b"ftypmp42": "it is a video; save a frame of it as an image",
    b"ftypisom": "it is a video; save a frame of it as an image",
}
"""What files often are instead, by how they begin in lower case; an ISO container after the four bytes of its length."""
WIDELY_READ = ("GIF", "JPEG", "PNG", "WEBP")
PLAIN_MODES = ("1", "L", "P", "RGB")
ORIENTATION = 0x0112
"""The tag of EXIF that says how an image is to be turned; 1 where it is upright."""


def load_image(image: Image, *, max_pixels: int = MAX_PIXELS) -> PILImage.Image:
    """The decoded image in mode RGB.

    The first frame of an animation; transparency over white; 16-bit grey scaled to 8 bits. An EXIF orientation is not
    applied, as LLaVA applies none. Raises DataError when the file is missing, is no image, is
    damaged, or has more than `max_pixels` pixels, which is known before anything is decoded.
    """
    with _opened(image, max_pixels) as opened:
        return _rgb(opened, image)


def image_size(image: Image, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height in pixels, from the header alone; DataError as `load_image`, but damaged pixels are not noticed."""
    with _opened(image, max_pixels) as opened:
        return opened.size


def image_digest(image: Image, *, max_pixels: int = MAX_PIXELS) -> str:
    """The SHA-256 of size and RGB pixels, equal for equal images whatever their files; raises DataError as `load_image`."""
    decoded = load_image(image, max_pixels=max_pixels)
    return hashlib.sha256(repr(decoded.size).encode() + decoded.tobytes()).hexdigest()


def shown_as(image: Image, *, max_pixels: int = MAX_PIXELS) -> tuple[str, bytes]:
    """The media type and the encoded bytes that show to others what `load_image` shows; raises DataError as it does.

    They are the file's own where every reader sees the same in it: one frame in one of `WIDELY_READ`, upright, without
    transparency, in one of `PLAIN_MODES`; else a PNG.
    """
    from PIL import Image as PILImage

    with _opened(image, max_pixels) as opened:
        decoded = _rgb(opened, image)  # Also where its own bytes are taken: it may be damaged.
        as_it_is = opened.format in WIDELY_READ and opened.mode in PLAIN_MODES and not opened.has_transparency_data
        if as_it_is and getattr(opened, "n_frames", 1) == 1 and _is_upright(opened):
            return PILImage.MIME[opened.format or ""], read_bytes(image)
    encoded = BytesIO()
    decoded.save(encoded, "PNG")
    return "image/png", encoded.getvalue()


def _is_upright(opened: PILImage.Image) -> bool:
    try:
        return bool(opened.getexif().get(ORIENTATION, 1) == 1)
    except Exception:  # Damaged metadata raises anything.
        return False


@contextmanager
def _opened(image: Image, max_pixels: int) -> Iterator[PILImage.Image]:
    """The image with its header read; every failure inside the block becomes a DataError."""
    from PIL import Image as PILImage
    from PIL import UnidentifiedImageError

    too_large = f"'{image}' is larger than the {max_pixels / 1e6:g} megapixels that are opened; scale it down"
    try:
        with _stream(image) as stream, PILImage.open(stream, formats=readable_formats()) as opened:
            if opened.width * opened.height > max_pixels:
                raise DataError(too_large)
            yield opened
    except DataError:
        raise
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning):
        raise DataError(too_large) from None
    except UnidentifiedImageError:
        what = _instead(image)
        raise DataError(
            f"'{image}' is not an image in one of the formats {', '.join(readable_formats())}{what}"
        ) from None
    except Exception as error:  # PIL's decoders raise errors of any type on a damaged file.
        if "MAX_TEXT_" in str(error):
            why = "holds far more text than pixels need, such as a workflow; save it without its metadata"
            raise DataError(f"'{image}' {why}") from error
        raise DataError(f"'{image}' cannot be read ({error}); replace it or leave it out") from error


def readable_formats() -> tuple[str, ...]:
    """The formats that are opened with this Pillow."""
    try:
        from PIL import AvifImagePlugin
    except ImportError:  # Pillow before 11.3
        return FORMATS
    return (*FORMATS, "AVIF") if AvifImagePlugin.SUPPORTED else FORMATS


def _instead(image: Image) -> str:
    """What a file is that is no image, as a clause, where that can be told."""
    with _stream(image) as stream:
        start = stream.read(64).lower().lstrip()
    if not start:
        return ": it is empty"
    if start[4:12] == b"ftypavif" and "AVIF" not in readable_formats():
        return ": it is an AVIF image, which Pillow reads from version 11.3 on; upgrade it, or convert the image"
    # An ISO container begins with four bytes of length.
    starts = (
        (begins, what) for begins, what in OTHERS.items() if start[4 * (begins[:4] == b"ftyp") :].startswith(begins)
    )
    return next((f": {what}" for _, what in starts), "")


def _stream(image: Image) -> IO[bytes]:
    if image.path is None:
        if image.data is None:
            raise DataError("an image has neither a path nor data; give it one of them")
        return BytesIO(image.data)
    path = Path(image.path)
    if not path.is_file():  # Opening a named pipe would wait for ever.
        what = "does not exist" if not path.exists() else "is a folder" if path.is_dir() else "is not a regular file"
        raise DataError(f"the image '{path}' {what}")
    size = image.span[1] if image.span else path.stat().st_size
    if size > MAX_BYTES:
        raise DataError(f"the image '{image}' has more than {MAX_BYTES // 2**20} MiB; write it as a smaller file")
    return BytesIO(read_bytes(image)) if image.span else path.open("rb")


def read_bytes(image: Image) -> bytes:
    """The encoded bytes of an image; OSError where its file cannot be read."""
    if image.path is None:
        return image.data or b""
    with image.path.open("rb") as file:
        if image.span is None:
            return file.read()
        file.seek(image.span[0])
        return file.read(image.span[1])


def _rgb(opened: PILImage.Image, image: Image) -> PILImage.Image:
    from PIL import Image as PILImage

    if opened.mode.startswith("I;16"):
        # PIL would clip to 255. 65535 = 255 x 257, and half a level rounds to the nearest.
        return opened.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L").convert("RGB")
    if opened.mode in ("I", "F"):
        raise DataError(f"'{image}' has 32-bit levels, whose range is unknown; convert it to 8 or 16 bits")
    if opened.has_transparency_data:
        white = PILImage.new("RGBA", opened.size, "white")
        return PILImage.alpha_composite(white, opened.convert("RGBA")).convert("RGB")
    return opened.convert("RGB")
