"""The source `webdataset`: samples in tar archives, whole and damaged."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from format_files import FRAMES, GOOD, PNG, asked, messages, read, refused

from graftwork.contracts import BadRecord, Image, Record
from graftwork.data import image_digest
from graftwork_webdataset import Webdataset


def archive(path: Path, members: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def link(kind: bytes, name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


TALK = json.dumps(messages("<image>Q", "A")).encode()


def test_samples_are_read_from_their_place_in_the_archive(tmp_path: Path) -> None:
    members = {
        "a/1.jpg": PNG,
        "a/1.json": json.dumps(messages("<image>Q", "A")).encode(),
        "a/2.json": json.dumps({"question": "Q", "answers": ["b", "a", "a"], "id": 7}).encode(),
        "a/2.left.png": PNG,
        "a/2.right.png": PNG,
        "a/3.json": json.dumps(asked({"type": "image", "image": "3.jpg"}, "Q")).encode(),
        "a/3.jpg": PNG,
        "a/4.txt": b"A shape.\n",
        "a/4.png": PNG,
    }
    path = archive(tmp_path / "x.tar", members)
    records = read(Webdataset, path, question="Describe it.")
    assert all(isinstance(record, Record) for record in records), records
    assert [record.id for record in records] == ["a/1", "7", "a/3", "a/4"]
    assert [record.turns[0].text for record in records] == [
        "<image>Q",
        "<image>\n<image>\nQ",
        "<image>\nQ",
        "<image>\nDescribe it.",
    ]  # type: ignore[union-attr]
    assert (records[1].turns[1].text, records[1].reference) == ("a", ("a", "b"))  # type: ignore[union-attr]
    for record in records:
        for image in record.images:  # type: ignore[union-attr]
            assert image.path == path and image_digest(image) == image_digest(Image(data=PNG))
    assert records[0].where == f"{path}:a/1 (sample 1)"


BAD_MEMBERS: list[tuple[dict[str, bytes | tarfile.TarInfo], str]] = [
    ({"../x.json": TALK}, "its name leads out of the archive; it is not read"),
    ({"/x.json": TALK}, "its name leads out of the archive; it is not read"),
    ({"x.jpg": link(tarfile.SYMTYPE, "x.jpg")}, "it is a link, and only files are read"),
    ({"x.jpg": link(tarfile.LNKTYPE, "x.jpg")}, "it is a link, and only files are read"),
    ({"x.jpg": link(tarfile.CHRTYPE, "x.jpg")}, "it is a device or a pipe, and only files are read"),
    (
        {"x.json": b"{"},
        "member 'x.json' is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
    ),
    ({"x.json": b"[]"}, "member 'x.json' is a list, not an object"),
    ({"x.json": b"\xff"}, "member 'x.json' is not UTF-8 text"),
    ({"x.json": b"{}"}, "sample 'x' has neither a conversation in .json nor an answer in .txt"),
    ({"x.jpg": PNG}, "sample 'x' has neither a conversation in .json nor an answer in .txt"),
    ({"x.txt": b"A", "x.jpg": PNG}, "member 'x.txt' answers no question; set 'question' to what it answers"),
    ({"x.mp4": b"", "x.txt": b"A"}, f"member 'x.mp4' is a video, and videos are not read; {FRAMES}"),
    (
        {"x.json": TALK},
        "turns with '<image>' in the conversation: 1, images of the record: 0; they must be equal",
    ),
    (
        {"x.json": json.dumps(messages("<image>", "A", image="y.png")).encode(), "x.png": PNG},
        "sample 'x' has no image 'y.png'; it has png",
    ),
    ({"x.json": json.dumps({"question": 1}).encode()}, "'question' is a number, not a text"),
    ({"x.json": json.dumps({"question": "Q"}).encode()}, "an answer is null, not a text"),
    ({"x.json": json.dumps({"question": "Q", "answers": []}).encode()}, "there is a question without an answer"),
]


@pytest.mark.parametrize(("members", "why"), BAD_MEMBERS)
def test_a_bad_member_costs_only_its_sample(tmp_path: Path, members: dict[str, Any], why: str) -> None:
    path = archive(
        tmp_path / "x.tar", {"a.json": json.dumps(GOOD).encode(), **members, "z.json": json.dumps(GOOD).encode()}
    )
    items = read(Webdataset, path)
    assert [item.id for item in items if isinstance(item, Record)] == ["a", "z"]
    [bad] = [item for item in items if isinstance(item, BadRecord)]
    assert bad.why == why
    assert bad.where.startswith(f"{path}:")


def test_an_archive_that_is_cut_off_gives_what_it_still_has(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.tar", {f"{n}.json": json.dumps(messages("Q", "A" * 600)).encode() for n in range(3)})
    whole = path.read_bytes()
    size = whole.index(b"1.json")  # Where the second member begins.
    for end, count, why in [
        (size + 64, 1, "there is no member, and no mark of the end"),
        (size + 700, 1, "member '1.json' is not whole"),
        (2 * size, 2, "the mark of the end is missing"),
    ]:
        path.write_bytes(whole[:end])
        *records, bad = read(Webdataset, path)
        assert [record.id for record in records if isinstance(record, Record)] == ["0", "1"][:count]
        place = f"{path}:{size * count}"
        assert bad == BadRecord(place, f"from this byte on the archive cannot be read ({why}); is it cut off?")
    path.write_bytes(whole[:size] + b"x" * 512 + whole[size + 512 :])
    items = read(Webdataset, path)
    assert [type(item) for item in items] == [Record, BadRecord]
    assert items[1].why.startswith("from this byte on the archive cannot be read (")  # type: ignore[union-attr]


def test_what_is_no_archive_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz"):
        pass
    assert refused(read, Webdataset, path) == (
        f"'{path}' does not end in .tar; a compressed archive is not read, as images are read in their place: "
        "uncompress it, such as by 'gunzip'"
    )
    assert refused(read, Webdataset, path.rename(tmp_path / "x.tar")).startswith(
        f"'{tmp_path / 'x.tar'}' is not a tar archive ("
    )
    (tmp_path / "empty").mkdir()
    assert (
        refused(read, Webdataset, tmp_path / "empty")
        == f"the folder '{tmp_path / 'empty'}' has no file that ends in .tar; correct 'path'"
    )
    assert (
        refused(read, Webdataset, tmp_path / "none")
        == f"'path' is '{tmp_path / 'none'}', which does not exist; set it to where the data is"
    )


def test_a_folder_of_archives_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in "ba":
        archive(tmp_path / f"{name}.tar", {f"{name}.json": json.dumps(GOOD).encode()})
    assert [record.id for record in read(Webdataset, tmp_path)] == ["a", "b"]
