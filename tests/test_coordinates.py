"""A box in pixels lies where it lay in the image that a model gets, or its record is refused; nothing passes that nobody said."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage
from PIL import ImageDraw
from tiny_vlm import Quiz
from vlm_families import write

import graftwork
from graftwork.build import compose
from graftwork.config.resolve import resolve
from graftwork.config.runfile import parse_run
from graftwork.contracts import DictLookup, Image, Plan, Record, Turn
from graftwork.contracts.coordinates import InView, moved
from graftwork.data.training_data import load_training_data
from graftwork.errors import CoordinatesRefused, DataError, RunFileError
from graftwork.evaluate.evaluation import evaluate
from graftwork_hf_vlm import HfVlm, HfVlmSettings
from graftwork_llava_json import LlavaJson
from graftwork_torch_attention import Sdpa

LOOKUP = DictLookup(HfVlm, Sdpa, LlavaJson)
SIZE = (300, 200)
BOX = (60, 50, 240, 150)


@pytest.fixture(scope="module")
def processor_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def made(name: str, **settings: Any) -> Any:
        model, folder = HfVlm(HfVlmSettings(**settings)), write(name, tmp_path_factory.mktemp(name))
        return InView(model.processor(model.configuration(folder), folder, {}))

    return made


def drawn(size: tuple[int, int] = SIZE) -> Image:
    """A black image with a white rectangle where BOX says."""
    image, file = PILImage.new("RGB", size), io.BytesIO()
    ImageDraw.Draw(image).rectangle((BOX[0], BOX[1], BOX[2] - 1, BOX[3] - 1), fill="white")
    image.save(file, "PNG")
    return Image(data=file.getvalue())


def record(answer: str, coordinates: str = "", *images: Image) -> Record:
    asked = "<image>" * max(len(images), 1) + "\nWhere is it?"
    turns = (Turn("user", asked), Turn("assistant", answer))
    return Record("box", turns, images or (drawn(),), coordinates=coordinates)


def answered(processor: Any, each: Record) -> str:
    """The labelled tokens as text."""
    return str(processor.decode([label for label in processor.encode(each).labels if label >= 0]))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"bbox_2d": [10, 20, 30, 41], "label": "2 cats"}', '{"bbox_2d": [20, 10, 60, 21], "label": "2 cats"}'),
        ('[{"point_2d": [10, 20]}]', '[{"point_2d": [20, 10]}]'),
        ("<|box_start|>(10,20),(30,40)<|box_end|>", "<|box_start|>(20,10),(60,20)<|box_end|>"),
        ("<box>(10, 20), (30, 40)</box> of 12", "<box>(20, 10), (60, 20)</box> of 12"),
        ("<box>[[10, 20, 30, 40]]</box>", "<box>[[20, 10, 60, 20]]</box>"),
        ('<point x="10.2" y="20.4" alt="5 cats">5 cats</point>', '<point x="20" y="10" alt="5 cats">5 cats</point>'),
        ('<points x1="10" y1="20" x2="30" y2="40">', '<points x1="20" y1="10" x2="60" y2="20">'),
        ("At [10.5, 20, 30, 40].", "At [21, 10, 60, 20]."),
        ("[[10, 20], [30, 40], [50, 60]]", "[[20, 10], [60, 20], [100, 30]]"),
        ("3 of 4 at (10, 20) or [30, 40]", "3 of 4 at (20, 10) or [60, 20]"),
        ('{"x": 10, "y": 20}, <point>30 40</point>', '{"x": 20, "y": 10}, <point>60 20</point>'),
        ("[10, 20, 30, 40, 50, 60]", "[20, 10, 60, 20, 100, 30]"),
    ],
)
def test_boxes_and_points_are_known_by_how_they_are_written(text: str, wanted: str) -> None:
    assert moved(text, (100, 100), (200, 50)) == wanted


@pytest.mark.parametrize("settings", [{}, {"max_pixels": 6000}, {"min_pixels": 90000, "max_pixels": 120000}])
def test_a_box_is_where_its_rectangle_is_in_the_pixels_that_the_model_gets(
    settings: dict[str, Any], processor_of: Any
) -> None:
    processor, patch, merged = processor_of("qwen2_5_vl", **settings), 14, 2
    encoded = processor.encode(record("[60, 50, 240, 150]", "pixels"))
    _, rows, columns = encoded.pixels["image_grid_thw"][0].tolist()
    flat = encoded.pixels["pixel_values"].view(rows // merged, columns // merged, merged, merged, 3, 2, patch, patch)
    grey = flat[:, :, :, :, 0, 0].permute(0, 2, 4, 1, 3, 5).reshape(rows * patch, columns * patch)
    white = grey > (grey.max() + grey.min()) / 2
    found = [*torch.where(white.any(0))[0][[0, -1]].tolist(), *torch.where(white.any(1))[0][[0, -1]].tolist()]
    left, top, right, bottom = json.loads(answered(processor, record("[60, 50, 240, 150]", "pixels")))
    assert max(abs(a - b) for a, b in zip((left, right - 1, top, bottom - 1), found, strict=True)) <= 1
    assert (left, top, right, bottom) != BOX


def test_what_is_relative_or_none_stays_as_it_is(processor_of: Any) -> None:
    processor = processor_of("qwen2_5_vl")
    for coordinates in ("relative", "none"):
        assert answered(processor, record("[60, 50, 240, 150]", coordinates)) == "[60, 50, 240, 150]"
    assert answered(processor, record("It is at 60, 50.")) == "It is at 60, 50."


@pytest.mark.parametrize(
    ("each", "error", "said"),
    [
        (record("[60, 50, 240, 150, 0.9]", "pixels"), DataError, "holds [60, 50, 240, 150, 0.9], whose numbers are no pairs"),
        (record("[60, 50, 240, 150]"), CoordinatesRefused, "answers with what looks like a box or a point, [60, 50, 240, 150]"),
        (record("[60, 50, 301, 150]", "pixels"), DataError, "lies outside its image of 300 x 200 pixels"),
        (record("[60, -5, 240, 150]", "pixels"), DataError, "lies outside its image"),
        (record("[60, 50, 1240, 150]", "relative"), DataError, "holds 1240 in a box or point, and coordinates are \"relative\""),
        (record("[1, 2, 3, 4]", "feet"), DataError, "has the coordinates 'feet'"),
        (record("[1, 2, 3, 4]", "pixels", drawn(), drawn((90, 200))), DataError, "its 2 images differ in size; split it"),
    ],
)  # fmt: skip
def test_a_box_that_cannot_be_right_is_refused(
    each: Record, error: type[DataError], said: str, processor_of: Any
) -> None:
    processor = processor_of("qwen2_5_vl")
    for use in (processor.encode, processor.length):
        with pytest.raises(error, match=re.escape(said)):
            use(each)
    if error is DataError:
        (found,) = processor.lengths([each])
        assert said in str(found)


@pytest.mark.parametrize("name", ["llava", "llava_next", "idefics3"])
def test_pixels_are_refused_where_the_model_gets_no_whole_image(name: str, processor_of: Any) -> None:
    with pytest.raises(CoordinatesRefused, match=r"crops images, pads them or cuts them into tiles"):
        processor_of(name).encode(record("[60, 50, 240, 150]", "pixels"))


def test_an_image_that_is_squeezed_squeezes_its_boxes(processor_of: Any) -> None:
    assert answered(processor_of("gemma3"), record("[60, 50, 240, 150]", "pixels")) == "[11, 14, 45, 42]"


# Runs -----------------------------------------------------------------------------------------------------------------


def plan_of(tmp_path: Path, answers: list[str], **source: Any) -> Plan:
    (tmp_path / "image.png").write_bytes(drawn().data or b"")
    rows = [
        {
            "id": str(number),
            "image": "image.png",
            "conversations": [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": answer}],
        }
        for number, answer in enumerate(answers)
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    table = {
        "model": {"use": "hf-vlm", "weights": str(write("qwen2_5_vl", tmp_path / "model"))},
        "attention": {"prefer": ["sdpa"]},
        "train": {"precision": "fp32"},
        "data": {"source": [{"use": "llava-json", "path": "train.json", **source}]},
    }
    return resolve(parse_run(table, tmp_path), LOOKUP)


ANSWERS = ["[60, 50, 240, 150]", "[60, 50, 640, 150]", "a rectangle"]


def test_a_source_says_what_its_numbers_count(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ANSWERS, coordinates="pixels")
    assert plan == Plan.from_json(json.loads(json.dumps(plan.to_json())))
    processor = compose.build_shape(plan, LOOKUP).processor
    data = load_training_data(plan, LOOKUP, processor)
    assert len(data.records) == 2 and len(data.bad) == 1 and "outside its image" in data.bad[0]
    assert answered(processor, data.records[0]) == "[22, 21, 90, 63]"
    assert data.lengths.tolist() == [len(processor.encode(each).input_ids) for each in data.records]


def test_a_run_whose_source_does_not_say_it_is_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ["a rectangle", *ANSWERS])
    with pytest.raises(
        CoordinatesRefused, match=r"train.json.* looks like a box .* set coordinates of its data source"
    ):
        load_training_data(plan, LOOKUP, compose.build_shape(plan, LOOKUP).processor)
    with pytest.raises(RunFileError) as caught:
        plan_of(tmp_path, ANSWERS, coordinates="inches")
    assert "data.source.0.coordinates" in caught.value.details[0]


def test_references_of_an_evaluation_lie_in_the_image_that_the_model_gets(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ANSWERS)
    assembly = compose.build(plan, LOOKUP, device="cpu")
    asked = Turn("user", "<image>\nWhat is in [60, 50, 240, 150]?")
    boxed = Record("boxed", (asked,), (drawn(),), reference=("[60, 50, 240, 150]",), coordinates="pixels")
    quiz = Quiz(
        boxed, replace(boxed, id="unsaid", coordinates=""), replace(boxed, id="far", reference=("[1, 2, 3, 999]",))
    )
    found = evaluate(assembly, quiz, out=tmp_path, hashes={}, variants=("base",))
    assert [one.record.reference for one in found.answered] == [("[22, 21, 90, 63]",)]
    assert found.answered[0].record.question == "<image>\nWhat is in [22, 21, 90, 63]?"
    assert [one.id for one in found.bad] == ["unsaid", "far"]
    again = evaluate(assembly, quiz, out=tmp_path, hashes={}, variants=("base",))
    assert again.answered == found.answered


def test_a_check_of_the_data_finds_it_without_a_model(tmp_path: Path) -> None:
    plan_of(tmp_path, ANSWERS)
    source = {"use": "llava-json", "path": str(tmp_path / "train.json")}
    for coordinates, count in (({}, 2), ({"coordinates": "pixels"}, 1), ({"coordinates": "relative"}, 0)):
        tables = {"data": {"source": [source | coordinates]}}
        report = graftwork.check_data(tables, out=tmp_path / "page", lookup=LOOKUP).report
        assert report.facts.misplaced == count
        assert any("boxes or points" in finding.what for finding in report.findings) == bool(count)
