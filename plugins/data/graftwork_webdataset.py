"""A data source: WebDataset's tar archives, whose samples are members of one name with different endings.

Images are not copied out of an archive: they are spans of it.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from graftwork.contracts import BadRecord, DataSource, Image, Record, hookimpl, setting
from graftwork.data import (
    NO_VIDEOS,
    ImageFolder,
    encoded_bytes,
    extension_of,
    files_at,
    first_records,
    missing_files,
    plain_text,
    read_example,
    to_messages,
    type_name,
)
from graftwork.errors import DataError

IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "bin", "img")
VIDEOS = ("mp4", "avi", "mkv", "mov", "webm", "mpg", "mpeg", "gifv")
LARGEST_TEXT = 64 * 2**20
"""A text of more bytes is none of a record."""
BLOCK = 512
"""Tar's unit, in bytes; an archive ends in two of zeros."""


@dataclass(frozen=True)
class WebdatasetSettings:
    """Where the archives are."""

    path: Path | None = setting(None, "The archive (.tar), or a folder of them")
    question: str = setting("", "What is asked of images whose only text is an answer, in a .txt member")
    limit: int | None = setting(None, "Read only so many records, from the first", minimum=1)
    group: str = setting("", "The group under which these records are counted")


class Webdataset(DataSource[WebdatasetSettings]):
    """WebDataset's tar archives of images and JSON"""

    name = "webdataset"
    Settings = WebdatasetSettings

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By the end of its name, or of those of the files in it."""
        return path.suffix == ".tar" or any(path.glob("*.tar"))

    def validate(self, plan: object) -> Iterable[str]:
        return missing_files(self.settings, "path")

    def records(self) -> Iterator[Record | BadRecord]:
        """The records of each archive in turn."""
        return first_records((item for file in self.files() for item in self._of(file)), self.settings.limit)

    def files(self) -> Sequence[Path]:
        """The archive, or those of the folder. Images lie in them too."""
        return files_at(self.settings, ".tar")

    @classmethod
    def write(cls, records: Iterable[Record], folder: Path) -> Path:
        """One archive; each sample is a JSON member and a member for each image."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "records.tar"
        with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as archive:
            for number, record in enumerate(records):
                images = [encoded_bytes(image) for image in record.images]
                names = [f"{place}.{extension_of(data)}" for place, data in enumerate(images)]
                text = json.dumps(to_messages(record, names), ensure_ascii=False).encode()
                for name, data in [("json", text), *zip(names, images, strict=True)]:
                    member = tarfile.TarInfo(f"{number:09d}.{name}")  # Its time, owner and mode are always the same.
                    member.size = len(data)
                    archive.addfile(member, BytesIO(data))
        return file

    def _of(self, file: Path) -> Iterator[Record | BadRecord]:
        with _opened(file) as opened:
            for number, item in enumerate(_samples(file, opened), start=1):
                if isinstance(item, BadRecord):
                    yield item
                    continue
                where = f"{file}:{item.key} (sample {number})"
                try:
                    record = self._record(item, file, opened, where)
                except DataError as error:
                    yield BadRecord(where, error.sentence)
                else:
                    yield record

    def _record(self, sample: Sample, file: Path, opened: BinaryIO, where: str) -> Record:
        """The record of a sample; DataError says why there is none."""
        for name in sample.members:
            if name.rpartition(".")[2] in VIDEOS:
                raise DataError(f"member '{sample.key}.{name}' is a video, and {NO_VIDEOS}")
        texts = {name: _text(opened, sample, name) for name in ("json", "txt") if name in sample.members}
        content = _object(texts["json"], sample) if "json" in texts else {}
        if not {"messages", "conversations", "question"} & content.keys():
            if "txt" not in texts:
                raise DataError(f"sample '{sample.key}' has neither a conversation in .json nor an answer in .txt")
            if not self.settings.question:
                raise DataError(f"member '{sample.key}.txt' answers no question; set 'question' to what it answers")
            content = {"id": sample.key, "question": self.settings.question, "answer": texts["txt"].strip()}
        images = {
            name: Image(file, span=span) for name, span in sample.members.items() if name.rpartition(".")[2] in IMAGES
        }
        if content.get("image") is None and content.get("images") is None and not _has_parts(content):
            content["images"] = list(images)
        if content.get("id") is None:
            content["id"] = sample.key
        return read_example(content, Members(sample.key, images), where=where, group=self.settings.group)


@hookimpl
def data_sources() -> list[type[DataSource[Any]]]:
    return [Webdataset]


@dataclass
class Sample:
    """The members of an archive that have one name, by their endings, each with its first byte and how many it has."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


class Members(ImageFolder):
    """The images of one sample, by their names or by the endings of these."""

    def __init__(self, key: str, images: Mapping[str, Image]) -> None:
        super().__init__(Path())
        self.key, self.images = key, images

    def named(self, name: str) -> Image:
        """The image of that name; DataError when the sample has none."""
        ending = Path(name).name.removeprefix(f"{Path(self.key).name}.").lower()
        if ending not in self.images:
            has = ", ".join(self.images) or "none"
            raise DataError(f"sample '{self.key}' has no image '{plain_text('image', name)}'; it has {has}")
        return self.images[ending]


def _opened(file: Path) -> BinaryIO:
    if not file.name.endswith(".tar"):
        raise DataError(
            f"'{file}' does not end in .tar; a compressed archive is not read, as images are read in their place: "
            "uncompress it, such as by 'gunzip'"
        )
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"'{file}' cannot be read ({error.strerror}); correct the path") from None


def _samples(file: Path, opened: BinaryIO) -> Iterator[Sample | BadRecord]:
    """The samples of an archive in order; a BadRecord for each member that is none of a sample, and where the archive is damaged."""
    size = opened.seek(0, 2)
    opened.seek(0)
    sample: Sample | None = None
    try:
        archive = tarfile.open(fileobj=opened, mode="r:")  # noqa: SIM115  # The file is the caller's.
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"'{file}' is not a tar archive ({error}); is it compressed, or cut off?") from None
    while True:
        try:
            member = archive.next()
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            damage, offset = str(error), archive.offset
            break
        archive.members = []  # type: ignore[attr-defined]  # It would remember every member.
        if member is None:
            damage, offset = _end(opened, archive.offset), archive.offset
            break
        if member.isreg() and member.offset_data + member.size > size:
            damage, offset = f"member {member.name!r} is not whole", member.offset
            break
        if why := _refused(member):
            yield BadRecord(f"{file}:{member.name!r}", why)
        elif not member.isdir():
            key, ending = _parted(member.name)
            if sample is None or sample.key != key:
                if sample:
                    yield sample
                sample = Sample(key)
            if ending in sample.members:
                yield BadRecord(
                    f"{file}:{member.name!r}", "its sample has a member of that ending already; it is not read"
                )
            else:
                sample.members[ending] = (member.offset_data, member.size)
    if sample:
        yield sample
    if damage:
        yield BadRecord(f"{file}:{offset}", f"from this byte on the archive cannot be read ({damage}); is it cut off?")


def _parted(name: str) -> tuple[str, str]:
    """What a member's name says of its sample, and of what it is of that: before and behind the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _end(opened: BinaryIO, offset: int) -> str:
    """What is wrong with the end of an archive, which tarfile passes over in silence; empty where it ends as it should."""
    opened.seek(offset)
    block = opened.read(BLOCK)
    if block == bytes(BLOCK):
        return ""
    return "there is no member, and no mark of the end" if block else "the mark of the end is missing"


def _refused(member: tarfile.TarInfo) -> str:
    """Why a member is not read, as a clause; empty where it is."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leads out of the archive; it is not read"
    if not (member.isreg() or member.isdir()) or member.issparse():
        kinds = {"a link": member.issym() or member.islnk(), "a sparse file": member.issparse()}
        what = next((kind for kind, found in kinds.items() if found), "a device or a pipe")
        return f"it is {what}, and only files are read"
    try:
        plain_text("its name", member.name)
    except DataError as error:
        return error.sentence
    return ""


def _text(opened: BinaryIO, sample: Sample, name: str) -> str:
    start, size = sample.members[name]
    if size > LARGEST_TEXT:
        raise DataError(f"member '{sample.key}.{name}' is larger than {LARGEST_TEXT // 2**20} MiB")
    opened.seek(start)
    try:
        return opened.read(size).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"member '{sample.key}.{name}' is not UTF-8 text") from None


def _object(text: str, sample: Sample) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"member '{sample.key}.json' is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"member '{sample.key}.json' is {type_name(content)}, not an object")
    return content


def _has_parts(content: Mapping[str, Any]) -> bool:
    """Whether images are named where they stand, as parts of a message."""
    messages = content.get("messages")
    parts = [
        part
        for message in (messages if isinstance(messages, list) else ())
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
    ]
    return any(isinstance(part, dict) and {"image", "image_url", "path", "url"} & part.keys() for part in parts)
