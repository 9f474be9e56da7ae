"""Opening pictures safely: any common file becomes RGB pixels or one DataError, and nothing of PIL's state changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING

from graftwork.contracts.records import Picture
from graftwork.errors import DataError

if TYPE_CHECKING:
    from PIL import Image as PIL

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What is opened, whatever the file's name ends in; JPEG includes MPO. No format that starts other programs."""

MAX_PIXELS = 50_000_000
MAX_BYTES = 512 * 2**20


def load(picture: Picture, *, max_pixels: int = MAX_PIXELS) -> PIL.Image:
    """The decoded picture in mode RGB.

    The first frame of an animation; transparency over white; 16-bit grey scaled to 8 bits. An EXIF orientation is not
    applied, as LLaVA applies none. Raises DataError when the file is missing, is no picture, is
    damaged, or has more than `max_pixels` pixels, which is known before anything is decoded.
    """
    with _opened(picture, max_pixels) as image:
        return _rgb(image, picture)


def probe(picture: Picture, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height in pixels, from the header alone; DataError as `load`, but damaged pixels are not noticed."""
    with _opened(picture, max_pixels) as image:
        return image.size


def digest(picture: Picture, *, max_pixels: int = MAX_PIXELS) -> str:
    """The SHA-256 of size and RGB pixels, equal for equal pictures whatever their files; raises DataError as `load`."""
    image = load(picture, max_pixels=max_pixels)
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


@contextmanager
def _opened(picture: Picture, max_pixels: int) -> Iterator[PIL.Image]:
    """The picture with its header read; every failure inside the block becomes a DataError."""
    from PIL import Image, UnidentifiedImageError

    too_large = f"'{picture}' is larger than the {max_pixels / 1e6:g} megapixels that are opened; scale it down"
    try:
        with _stream(picture) as stream, Image.open(stream, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise DataError(too_large)
            yield image
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(too_large) from None
    except UnidentifiedImageError:
        raise DataError(f"'{picture}' is not a picture in one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # PIL's decoders raise whatever a damaged file makes them trip over.
        raise DataError(f"'{picture}' cannot be read ({error}); replace it or leave it out") from error


def _stream(picture: Picture) -> IO[bytes]:
    if picture.path is None:
        if picture.data is None:
            raise DataError("a picture has neither a path nor data; give it one of them")
        return BytesIO(picture.data)
    path = Path(picture.path)
    if not path.is_file():  # Opening a named pipe would wait for ever.
        what = "does not exist" if not path.exists() else "is a folder" if path.is_dir() else "is not a regular file"
        raise DataError(f"the picture '{path}' {what}")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"the picture '{path}' has more than {MAX_BYTES // 2**20} MiB; write it as a smaller file")
    return path.open("rb")


def _rgb(image: PIL.Image, picture: Picture) -> PIL.Image:
    from PIL import Image

    if image.mode.startswith("I;16"):
        # PIL would clip to 255. 65535 = 255 x 257, and half a level rounds to the nearest.
        return image.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(f"'{picture}' has 32-bit levels, whose range is unknown; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
