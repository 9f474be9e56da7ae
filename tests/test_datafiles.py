"""Files of data sets: what is missing or malformed is said in a sentence, with its place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from graftwork.contracts import BadRecord, Image, Record, Turn
from graftwork.data.datafiles import (
    find_image,
    make_records,
    member,
    missing_files,
    read_json,
    required,
)
from graftwork.data.imagefolders import ImageFiles, ImageFolder, extension_of
from graftwork.data.jsonfiles import read_json_lines
from graftwork.errors import DataError


@dataclass(frozen=True)
class Paths:
    here: Path | None = None
    there: Path | None = None


def test_a_path_that_is_not_set_or_leads_nowhere_is_objected_to(tmp_path: Path) -> None:
    settings = Paths(there=tmp_path / "gone")
    assert list(missing_files(settings, "here", "there")) == [
        "'here' is not set",
        f"'there' is '{tmp_path / 'gone'}', which does not exist",
    ]
    assert list(missing_files(Paths(here=tmp_path), "here")) == []
    assert required(Paths(here=tmp_path), "here") == tmp_path
    with pytest.raises(DataError, match="'here' is not set; set it"):
        required(settings, "here")


@pytest.mark.parametrize(
    ("content", "what"),
    [(None, "cannot be read"), (b"\xff\xfe", "is not UTF-8"), (b"{", "is not JSON"), (b"[" * 100_000, "is not JSON")],
)
def test_a_json_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes | None, what: str) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        read_json(file)
    assert str(file) in caught.value.sentence


def test_each_line_becomes_a_record_or_says_where_it_is_none(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('\ufeff{"id": "a\u2028b"}\r\n\n{"id": 3}\n[1]\n{"id": \n', encoding="utf-8")

    def make(where: str, content: object) -> Record:
        assert isinstance(content, dict)
        return Record(member(content, "id", str), (Turn("user", "hm"),), where=where)

    good, *bad = make_records(read_json_lines(file), make)
    assert isinstance(good, Record)
    assert (good.id, good.where) == ("a\u2028b", f"{file}:1")
    assert [one.where for one in bad] == [f"{file}:3", f"{file}:4", f"{file}:5"]
    whys = [one.why for one in bad if isinstance(one, BadRecord)]
    assert whys[:2] == ["'id' is missing, or is not a string", "the record is a list, not an object"]
    assert whys[2].startswith("the line is not JSON (")


def test_true_is_no_integer() -> None:
    assert member({"n": 1}, "n", int) == 1
    with pytest.raises(DataError, match="'n' is missing, or is not an integer"):
        member({"n": True}, "n", int)


def test_an_image_lies_within_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").touch()
    assert find_image(tmp_path, "in/a.png") == Image(tmp_path / "in" / "a.png")
    assert find_image(tmp_path, str(tmp_path / "in" / "a.png")) == Image(tmp_path / "in" / "a.png")
    for name in [str(tmp_path / "in" / "a.png"), "../a.png", "in/../../a.png", f"{tmp_path}/out/../in/a.png"]:
        with pytest.raises(DataError, match="does not lie within"):
            find_image(tmp_path / "out", name)
    with pytest.raises(DataError, match="the image's name is empty"):
        find_image(tmp_path, "")
    for name in ["b.png", "in", "x" * 5000, "a\0b"]:
        with pytest.raises(DataError, match="there is no image"):
            find_image(tmp_path, name)


@pytest.mark.parametrize(
    ("start", "extension"),
    [
        (b"\x89PNG\r\n\x1a\n", "png"),
        (b"\xff\xd8\xff\xe0", "jpg"),
        (b"GIF89a", "gif"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "webp"),
        (b"BM", "bmp"),
        (b"II*\0", "tiff"),
        (b"MM\0*", "tiff"),
        (b"II+\0", "tiff"),
        (b"\0\0\0 ftypavif", "avif"),
    ],
)
def test_an_image_is_called_by_its_content(start: bytes, extension: str, tmp_path: Path) -> None:
    assert extension_of(start) == extension
    name = ImageFiles(tmp_path).name_of(Image(data=start))
    assert name.endswith(f".{extension}") and (tmp_path / name).read_bytes() == start


def test_what_is_no_image_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "passwd").write_bytes(b"root:x:0:0")
    assert extension_of(b"root:x:0:0") == "bin"
    for image in (Image(tmp_path / "passwd"), Image(data=b"no image")):
        with pytest.raises(DataError, match="begins like no image that is read, and is not copied; leave it out"):
            ImageFiles(tmp_path / "out").name_of(image)
    assert not (tmp_path / "out").exists()


def test_a_link_that_leads_out_of_the_image_folder_is_refused(tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "out"
    folder.mkdir(), outside.mkdir(), (folder / "real").mkdir()
    (outside / "x.png").touch(), (folder / "real" / "x.png").touch()
    (folder / "c.png").symlink_to(outside / "x.png")
    (folder / "away").symlink_to(outside)
    (folder / "d.png").symlink_to(folder / "real" / "x.png")
    (folder / "near").symlink_to(folder / "real")
    (tmp_path / "link").symlink_to(folder)
    for start in (folder, tmp_path / "link"):
        images = ImageFolder(start)
        for name in ("d.png", "near/x.png", "real/x.png", str(start / "near" / "x.png")):
            assert images.image(name) == Image(start / name)
        for name in ("c.png", "away/x.png", str(start / "c.png")):
            with pytest.raises(DataError, match=r"out/x\.png' by a link, outside of the image folder; copy it there"):
                images.image(name)
    assert ImageFolder(Path("/")).image(str(folder / "c.png")) == Image(folder / "c.png")
    assert ImageFolder(tmp_path).image("in/c.png") == Image(folder / "c.png")


def test_without_an_image_folder_no_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").touch()
    for given in ("x.png", str(tmp_path / "x.png"), {"path": "x.png"}):
        with pytest.raises(
            DataError, match=r"x\.png' is a name, and it is not known in which folder; set 'image_folder'"
        ):
            ImageFolder(None).image(given)
    assert ImageFolder(None).image(b"bytes") == Image(data=b"bytes")
