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
"""What is opened, whatever the file's name ends in; JPEG includes MPO. No format that starts other programs."""

MAX_PIXELS = 50_000_000
MAX_BYTES = 512 * 2**20


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


@contextmanager
def _opened(image: Image, max_pixels: int) -> Iterator[PILImage.Image]:
    """The image with its header read; every failure inside the block becomes a DataError."""
    from PIL import Image as PILImage
    from PIL import UnidentifiedImageError

    too_large = f"'{image}' is larger than the {max_pixels / 1e6:g} megapixels that are opened; scale it down"
    try:
        with _stream(image) as stream, PILImage.open(stream, formats=FORMATS) as opened:
            if opened.width * opened.height > max_pixels:
                raise DataError(too_large)
            yield opened
    except DataError:
        raise
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning):
        raise DataError(too_large) from None
    except UnidentifiedImageError:
        raise DataError(f"'{image}' is not an image in one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # PIL's decoders raise errors of any type on a damaged file.
        raise DataError(f"'{image}' cannot be read ({error}); replace it or leave it out") from error


def _stream(image: Image) -> IO[bytes]:
    if image.path is None:
        if image.data is None:
            raise DataError("an image has neither a path nor data; give it one of them")
        return BytesIO(image.data)
    path = Path(image.path)
    if not path.is_file():  # Opening a named pipe would wait for ever.
        what = "does not exist" if not path.exists() else "is a folder" if path.is_dir() else "is not a regular file"
        raise DataError(f"the image '{path}' {what}")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"the image '{path}' has more than {MAX_BYTES // 2**20} MiB; write it as a smaller file")
    return path.open("rb")


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
