"""The demo's base, and the recipe that it is made by."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

from graftwork import Run
from graftwork.build import compose
from graftwork.contracts import Lookup, Record, collate
from graftwork_easy_vqa import EasyVqaSource, EasyVqaSourceSettings
from graftwork_registry import Catalog

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def base() -> Path:
    """Its folder, as it is installed."""
    found = find_spec("graftwork_demo")
    assert found and found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "base"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The recipe, with one step of each kind on 40 images."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "tiny-vlm")
    module = import_module("make_base")
    for name in ("PIECES_STEPS", "IMAGES_STEPS", "ASKING_STEPS"):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(module, "EasyVqaSourceSettings", partial(EasyVqaSourceSettings, pictures=40))
    yield module
    for name in ("make_base", "folder"):
        del sys.modules[name]


def asked(split: str, words: tuple[str, ...], count: int) -> list[Record]:
    """The first yes/no questions of a split with one of the words."""
    source = EasyVqaSource(EasyVqaSourceSettings(kind="yes-no", split=split))  # type: ignore[arg-type]
    found = (record for record in source.records() if any(word in record.question for word in words))
    return [next(found) for _ in range(count)]


@pytest.mark.parametrize("words", [("circle", "rectangle", "triangle"), ("red", "teal", "gray")])
def test_the_base_tells_shapes_as_well_as_colours(base: Path, words: tuple[str, ...]) -> None:
    lookup: Lookup = Catalog.discover()
    plan = Run(model={"use": "hf-vlm", "weights": str(base)}).plan(lookup)
    assembly = compose.build(plan, lookup, device="cpu")
    encoded = [assembly.processor.encode(record) for record in asked("test", words, 48)]
    batch = collate(encoded, pad_id=assembly.processor.pad_id)
    first = (batch.labels >= 0).int().argmax(1)
    rows = torch.arange(len(encoded))
    with torch.no_grad():
        said = assembly.model.logits(assembly.model(batch)[rows, first - 1]).argmax(1)
    assert (said == batch.labels[rows, first]).float().mean() > 0.9


def test_the_base_is_small_enough_to_ship(base: Path) -> None:
    assert sum(file.stat().st_size for file in base.iterdir()) < 8e6


def test_the_recipe_makes_what_ships_but_for_its_numbers(
    recipe: ModuleType, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_base.py", str(tmp_path / "made")])
    recipe.main()
    made = {file.name: file for file in (tmp_path / "made").iterdir()}
    assert made.keys() == {file.name for file in base.iterdir()}
    tensors = []
    for file in (made.pop("model.safetensors"), base / "model.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors.append({name: opened.get_slice(name).get_shape() for name in opened.keys()})  # noqa: SIM118
    assert tensors[0] == tensors[1]
    told = {"chat_template.jinja", "preprocessor_config.json", "processor_config.json"}
    assert all(made[name].read_bytes() == (base / name).read_bytes() for name in told)


def test_pieces_hold_the_shape(recipe: ModuleType) -> None:
    pixels = torch.zeros(3, 3, 64, 64)
    for image, (y, x) in zip(pixels, ((0, 0), (20, 30), (50, 60)), strict=True):
        image[:, y : y + 12, x : x + 4] = 1
    boxes = recipe.shape_boxes(pixels)
    assert boxes.tolist() == [[[0, 11], [0, 3]], [[20, 31], [30, 33]], [[50, 61], [60, 63]]]
    for _ in range(20):
        assert recipe.pieces(pixels, boxes).sum((1, 2, 3)).tolist() == [3 * 12 * 4] * 3


def test_answers_rule_out_what_is_not_in_an_image(recipe: ModuleType) -> None:
    (first, *_) = asked("train", ("is there not a",), 1)
    image = first.images[0]
    records = [
        record for record in EasyVqaSource(EasyVqaSourceSettings(pictures=40)).records() if record.images[0] == image
    ]
    colour, shape = (next(r.turns[-1].text for r in records if r.group == group) for group in ("colour", "shape"))
    left = recipe.possible([record for record in records if record.group == "yes/no"], [image])
    assert left[0, recipe.COLOURS.index(colour), recipe.SHAPES.index(shape)] and not left.all()
