"""The source of images alone: what it finds in a folder, in which order, and what it says about the rest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from graftwork.config.settings import parse
from graftwork.conformance import examine
from graftwork.contracts import BadRecord, Choice, Image, ModelSpec, Plan, Record, Turn
from graftwork.data.pipeline import read_records
from graftwork.errors import DataError, NothingLeft
from graftwork_images import Images

PLAN: Any = Plan(ModelSpec(Choice("model", "m", "m", "m", "0")))


def source(path: Path | None, **settings: Any) -> Images:
    table = settings | ({"path": str(path)} if path else {})
    return Images(parse(Images.Settings, table, where="images", folder=None))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images at several depths, one of them without an ending, and hidden files."""
    made = tmp_path / "photos"
    for name in ("b.png", "a/2.JPG", "a/10.webp", "ä/deep/er.png"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).touch()
    PILImage.new("RGB", (2, 2)).save(made / "c", "PNG")
    (made / ".DS_Store").touch(), (made / ".git").mkdir(), (made / ".git" / "x.png").touch()
    return made


def test_images_are_found_at_any_depth_in_the_order_of_their_names_and_not_opened(folder: Path) -> None:
    records = list(source(folder).records())
    assert [record.id for record in records] == ["a/10.webp", "a/2.JPG", "b.png", "c", "ä/deep/er.png"]
    path = folder / "a" / "10.webp"
    assert records[0] == Record("a/10.webp", (Turn("user", "<image>"),), (Image(path),), where=str(path))
    assert source(folder).files() is None, "what lies in a folder may change without any file"


def test_a_question_a_group_and_a_limit_may_be_set(folder: Path) -> None:
    one, two = source(folder, question="What is it?", group="photo", limit=2).records()
    assert isinstance(one, Record) and one.turns == (Turn("user", "<image>\nWhat is it?"),)
    assert isinstance(two, Record) and two.group == "photo"


def test_what_is_no_image_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir(), (tmp_path / "outside" / "x.png").touch()
    (folder / "notes.txt").write_text("Hello")
    (folder / "z-link.png").symlink_to(tmp_path / "outside" / "x.png")
    (folder / "z-link").symlink_to(tmp_path / "outside")
    (folder / "z-nowhere.png").symlink_to(tmp_path / "nothing.png")
    (folder / "z-within.png").symlink_to(folder / "b.png")
    os.mkfifo(folder / "z-pipe")
    items = list(source(folder).records())
    bad = {Path(item.where).name: item.why for item in items if isinstance(item, BadRecord)}
    assert bad["notes.txt"] == "it is no image that is read, by its name and its first bytes; remove it, or convert it"
    assert bad["z-link"] == "it is a link to a folder, which is not followed; name that folder in a source of its own"
    assert "by a link, outside of the image folder; copy it there" in bad["z-link.png"]
    assert "there is a link of that name that leads to no file" in bad["z-nowhere.png"]
    assert "there is no image" in bad["z-pipe"]
    assert [item.id for item in items if isinstance(item, Record)][-1] == "ä/deep/er.png"
    assert "z-within.png" in [item.id for item in items]


def test_a_name_that_is_no_text_is_said(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).touch()
    *_, bad = source(folder).records()
    assert isinstance(bad, BadRecord) and bad.why == "image holds a lone surrogate, which is not text"


def test_only_a_folder_of_images_is_recognised(folder: Path, tmp_path: Path) -> None:
    assert not Images.recognises(folder), "one of its files has no name of an image"
    (folder / "c").unlink()
    assert Images.recognises(folder)
    assert not Images.recognises(folder / "b.png") and not Images.recognises(tmp_path / "none")
    (folder / "labels.json").touch()
    assert not Images.recognises(folder)
    (tmp_path / "empty").mkdir()
    assert not Images.recognises(tmp_path / "empty")


def test_faulty_settings_are_objected_to(folder: Path) -> None:
    assert list(source(folder).validate(PLAN)) == []
    assert list(source(None).validate(PLAN)) == ["'path' is not set"]
    assert list(source(folder / "x").validate(PLAN)) == [f"'path' is '{folder / 'x'}', which does not exist"]
    assert list(source(folder / "b.png", question="<image>?").validate(PLAN)) == [
        f"'path' is '{folder / 'b.png'}', a file; name the folder of the images",
        "'question' has '<image>', and the image is put in front of it; remove it",
    ]
    with pytest.raises(DataError, match="is no folder; name the folder of the images"):
        list(source(folder / "b.png").records())


def test_it_goes_through_the_pipeline_and_passes_the_kit(folder: Path) -> None:
    result = read_records([source(folder)], [], seed=0, strict=True)
    assert [record.id for record in result.records] == [record.id for record in source(folder).records()]
    outcomes = list(examine(Images, settings={"path": str(folder)}))
    assert not [outcome for outcome in outcomes if outcome.state == "failed"]
    (folder / "empty").mkdir()
    with pytest.raises(NothingLeft):
        read_records([source(folder / "empty")], [], seed=0, strict=False)
