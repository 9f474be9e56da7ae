"""Images that records name or hold: found below a folder or decoded from text, and written into a folder by their hash."""

from __future__ import annotations

import base64
import hashlib
import os
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graftwork.contracts.records import Image
from graftwork.data.datafiles import is_file, path_below
from graftwork.data.images import read_bytes
from graftwork.data.texts import plain_text, type_name
from graftwork.errors import DataError, NoImage

NO_VIDEOS = "videos are not read; save frames of them as images, such as by 'ffmpeg -i x.mp4 -vf fps=1 frames/%04d.jpg', and give these"
NO_SOUND = "sound is not read; write down what it says, or leave such records out"
BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
"""How images begin in base64: PNG, JPEG, GIF, WEBP, TIFF."""
MAX_FOLDERS = 10_000
"""Of so many folders at most it is kept whether links lead out of them."""


class ImageFolder:
    """The images that records refer to: by a path below a folder, or as the bytes themselves; without a folder these alone."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        # Strings, as a Path for each of a million images takes minutes.
        self._start = os.path.join(path or "", "")  # noqa: PTH118
        self._root = os.path.join(os.path.realpath(path or ""), "")  # noqa: PTH118
        self._names: dict[Path, dict[str, str]] = {}
        self._inside: dict[str, bool] = {}
        """By a folder of images: whether it lies below this one once links are followed."""

    def image(self, given: Any) -> Image:
        """The image of a path, a data URI, base64 text, bytes, or an object of `bytes`, `path` or `url`; DataError says why there is none."""
        if isinstance(given, str):
            if given.startswith("data:"):
                return Image(data=_of_data_uri(given))
            if given.startswith(BASE64) and len(given) > 60 and (data := _of_base64(given)) is not None:
                return Image(data=data)
            return self.named(given.removeprefix("file://"))
        if isinstance(given, bytes | bytearray | memoryview):
            return _of_bytes(bytes(given))
        if isinstance(given, Mapping):
            return self._of_object(given)
        raise DataError(f"'image' is {type_name(given)}, not a path")

    def named(self, name: str) -> Image:
        """The image of that path; DataError says why there is none."""
        if self.path is None:
            what = f"the image '{plain_text('image', name)}' is a name, and it is not known in which folder"
            raise DataError(f"{what}; set 'image_folder'")
        if found := self._at_once(name):
            return Image(found)
        if not name.strip():
            raise DataError("'image' is empty; name the file, or leave it out of a record about text only")
        if "://" in name:
            raise DataError(f"the image '{plain_text('image', name)}' is an address, not a path; download it")
        path = path_below(self.path, plain_text("image", name))
        if path is None:
            raise DataError(f"the image path '{name}' leads out of the image folder; make it relative to that")
        for each in (path, *(self.path / other for other in _also_known_as(name))):
            if is_file(each):
                if self._leads_out(str(each)):
                    what = f"the image '{each}' is '{os.path.realpath(each)}' by a link, outside of the image folder"
                    raise DataError(f"{what}; copy it there, or set 'image_folder' to a folder that holds both")
                return Image(each)
        raise NoImage(path, self._hint(path))

    def _at_once(self, name: str) -> Path | None:
        """The path of a plain name at which there is a file."""
        if not name.isascii() or name.startswith("/") or ".." in name or "://" in name or not name.strip():
            return None
        path = self._start + name
        try:
            is_file = stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116
        except (OSError, ValueError):
            return None
        return Path(path) if is_file and not self._leads_out(path) else None

    def _leads_out(self, path: str) -> bool:
        """Whether a file is outside of the folder once links are followed, which is done once for all files of a folder."""
        parent = os.path.dirname(path)  # noqa: PTH120
        if (inside := self._inside.get(parent)) is None:
            if len(self._inside) >= MAX_FOLDERS:
                self._inside.clear()
            inside = self._inside[parent] = os.path.join(os.path.realpath(parent), "").startswith(self._root)  # noqa: PTH118
        if not os.path.islink(path):  # noqa: PTH114
            return not inside
        return not os.path.realpath(path).startswith(self._root)

    def _of_object(self, given: Mapping[str, Any]) -> Image:
        content = given.get("bytes")
        if isinstance(content, str):
            if (data := _of_base64(content)) is None:
                raise DataError("'bytes' of an image is a text that is not base64")
            return _of_bytes(data)
        if content is not None:
            if not isinstance(content, bytes | bytearray | memoryview):
                raise DataError(f"'bytes' of an image is {type_name(content)}, not bytes")
            return _of_bytes(bytes(content))
        for key in ("path", "url"):
            if given.get(key) is not None:
                return self.image(given[key])
        raise DataError("an image is an object without 'bytes', 'path' or 'url'")

    def _hint(self, path: Path) -> str:
        """What to do about a path at which there is no image."""
        if "\\" in path.name and is_file(other := Path(str(path).replace("\\", "/"))):
            return f"with '/' for '\\' it is '{other}'"
        try:
            if path.is_dir():
                return "that is a folder; name a file in it"
            if path.parent not in self._names:
                self._names[path.parent] = {_folded(each.name): each.name for each in path.parent.iterdir()}
        except (OSError, ValueError):
            return "check 'image_folder'"
        found = self._names[path.parent].get(_folded(path.name))
        if found == path.name:
            return "there is a link of that name that leads to no file"
        if found:
            return f"there is '{found}', whose name has other capitals or another Unicode form; use that"
        return "check 'image_folder'"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _also_known_as(name: str) -> Iterator[str]:
    """Where else upstream looks for an image: OCR-VQA's may be PNG, and Visual Genome's two folders may be one."""
    if "ocr" in name and name.endswith(".jpg"):
        yield f"{name.removesuffix('.jpg')}.png"
    if "VG_100K" in name:
        yield name.replace("VG_100K_2", "images").replace("VG_100K", "images")


def _of_bytes(data: bytes) -> Image:
    if not data:
        raise DataError("an image has no bytes; leave it out of a record about text only")
    return Image(data=data)


def _of_data_uri(uri: str) -> bytes:
    head, comma, content = uri.partition(",")
    if head.startswith("data:video/"):
        raise DataError(NO_VIDEOS)
    if not comma or not head.endswith(";base64"):
        raise DataError(
            f"an image is the data URI '{plain_text('image', head[:40])}…', and only those in base64 are read"
        )
    if not (data := _of_base64(content)):
        raise DataError("an image is a data URI whose content is not base64; is it cut off?")
    return data


def _of_base64(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None


# Writing --------------------------------------------------------------------------------------------------------------


class ImageFiles:
    """Writes images into a folder, each content once, as `images/ab/<sha256>.<ext>`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def name_of(self, image: Image) -> str:
        """The path of an image below the folder, in which it then is; DataError when it cannot be read, or is no image."""
        data = encoded_bytes(image)
        if (extension := extension_of(data)) == "bin":
            what = f"'{image}' begins like no image that is read, and is not copied"
            raise DataError(f"{what}; leave it out, as the operator 'drop-broken-images' does")
        digest = hashlib.sha256(data).hexdigest()
        name = f"images/{digest[:2]}/{digest}.{extension}"
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return name


def encoded_bytes(image: Image) -> bytes:
    """The encoded bytes of an image; DataError when it cannot be read, or has none."""
    try:
        data = read_bytes(image)
    except (OSError, ValueError) as error:
        raise DataError(f"the image '{image}' cannot be read ({error}); replace it or leave it out") from None
    if not data:
        raise DataError(f"the image '{image}' is empty; replace it or leave it out")
    return data


def extension_of(data: bytes) -> str:
    """What the name of an image file ends in, by its first bytes; `bin` where they are of no image that is known."""
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for start, name in STARTS.items() if data.startswith(start)), "bin")


STARTS: Mapping[bytes, str] = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpg",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"II+\0": "tiff",
    b"MM\0+": "tiff",
}
