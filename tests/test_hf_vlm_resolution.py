"""How large images get is said in the run file, holds in the checkpoint, and goes out with the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_runs import Shapes
from vlm_families import write

from graftwork.build.outline import outline
from graftwork.checkpoint.ancestry import beginning
from graftwork.checkpoint.merging import export, merge
from graftwork.checkpoint.store import open_checkpoint
from graftwork.config.machine import Machine
from graftwork.config.resolve import resolve
from graftwork.config.runfile import parse_run
from graftwork.conformance import specimens
from graftwork.contracts import DictLookup, Record, Turn
from graftwork.data import load_image
from graftwork.errors import CheckpointError, PlanRefused
from graftwork.train.loop import train
from graftwork_hf_vlm import HfVlm, HfVlmSettings
from graftwork_hf_vlm.resolution import pixels_of
from graftwork_lora import Lora
from graftwork_torch_attention import Sdpa

LOOKUP = DictLookup(HfVlm, Sdpa, Lora, Shapes)
LARGE = Record("large", (Turn("user", "<image>\nWhat?"),), (specimens.image("red", (300, 200)),))
FOLLOWED = [
    ("qwen2_5_vl", {"max_pixels": 6000}, 0, 6000),
    ("qwen2_5_vl", {"min_pixels": 30000, "max_pixels": 40000}, 30000, 40000),
    ("llava_next", {"max_tiles": 2}, 2 * 56**2, 3 * 56**2),
    ("idefics3", {"max_tiles": 1}, 64**2, 64**2),
    ("internvl", {"max_tiles": 2}, 2 * 56**2, 3 * 56**2),
    ("ovis2", {"max_tiles": 2}, 2 * 56**2, 3 * 56**2),
    ("glm4v", {"min_pixels": 30000, "max_pixels": 40000}, 30000, 40000),
    ("mistral3", {"max_pixels": 6400}, 3136, 6400),
]
"""A family, settings, and the least and the most pixels that an image of 300 x 200 has then."""


def processor_of(folder: Path, settings: dict[str, Any]) -> Any:
    model = HfVlm(HfVlmSettings(**settings))
    return model.processor(model.configuration(folder), folder, {})


def table_of(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "model": {"use": "hf-vlm", "weights": str(folder), **settings},
        "attention": {"prefer": ["sdpa"]},
        "train": {"precision": "fp32", "steps": 1, "batch_size": 2, "learning_rate": 1e-2, "max_length": 512},
        "peft": {"use": "lora", "on": ["language.attention"], "rank": 4},
        "data": {"source": [{"use": "shapes", "count": 4}]},
    }


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # transformers' GLM-4V, in numpy 2
@pytest.mark.parametrize(("name", "settings", "least", "most"), FOLLOWED)
def test_a_setting_is_followed_and_written_so_that_transformers_makes_the_same_pixels(
    name: str, settings: dict[str, Any], least: int, most: int, tmp_path: Path
) -> None:
    folder = write(name, tmp_path / "base")
    processor = processor_of(folder, settings)
    assert least <= pixels_of(processor.hf, 300, 200) <= most
    assert pixels_of(processor.hf, 300, 200) != pixels_of(processor_of(folder, {}).hf, 300, 200)
    (tmp_path / "saved").mkdir()
    processor.save(tmp_path / "saved")
    plain = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    found = plain([[load_image(LARGE.images[0])]], return_tensors="pt")
    assert torch.equal(found["pixel_values"], processor.encode(LARGE).pixels["pixel_values"])
    again = processor_of(tmp_path / "saved", {})
    assert again.encode(LARGE).input_ids.tolist() == processor.encode(LARGE).input_ids.tolist()


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (
            "llava",
            {"max_pixels": 9999},
            "CLIPImageProcessorPil, the image processor of this model, cannot follow max_pixels: of the size of images it can change nothing",
        ),
        ("gemma3", {"max_tiles": 2}, "cannot follow max_tiles: of the size of images it can change nothing"),
        (
            "qwen2_5_vl",
            {"max_tiles": 2},
            "cannot follow max_tiles: of the size of images it can change max_pixels and min_pixels",
        ),
        ("qwen2_5_vl", {"min_pixels": 20000}, "min_pixels is 20000 and max_pixels 12544"),
        (
            "qwen2_5_vl",
            {"min_pixels": 1, "max_pixels": 700},
            "max_pixels = 700 cannot be followed: Qwen2VLImageProcessorPil makes 784 pixels",
        ),
        ("idefics3", {"min_pixels": 5000}, "cannot follow min_pixels: of the size of images it can change max_tiles"),
    ],
)
def test_a_setting_that_cannot_be_followed_is_refused_when_the_run_is_planned(
    name: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    plan = resolve(parse_run(table_of(write(name, tmp_path), **settings), Path.cwd()), LOOKUP)
    with pytest.raises(PlanRefused, match=re.escape(said)):
        outline(plan, LOOKUP, Machine())


def test_tiles_that_no_image_could_have_are_refused(tmp_path: Path) -> None:
    run = parse_run(table_of(write("llava_next", tmp_path), max_tiles=1), Path.cwd())
    with pytest.raises(PlanRefused) as caught:
        resolve(run, LOOKUP)
    assert "max_tiles is 1, and this model cuts an image into 2 tiles at least" in caught.value.details[0]


@pytest.mark.parametrize(("name", "settings", "least", "most"), FOLLOWED[1:3])
def test_a_checkpoint_and_what_is_merged_from_it_see_images_as_the_run_did(
    name: str, settings: dict[str, Any], least: int, most: int, tmp_path: Path
) -> None:
    folder = write(name, tmp_path / "base")
    plan = resolve(parse_run(table_of(folder, **settings), Path.cwd()), LOOKUP)
    train(plan, LOOKUP, tmp_path / "out", device="cpu")
    opened = open_checkpoint(tmp_path / "out", LOOKUP, device="cpu", precision="fp32")
    pixels = opened.assembly.processor.encode(LARGE).pixels["pixel_values"]
    assert least <= pixels_of(opened.assembly.processor.hf, 300, 200) <= most  # type: ignore[attr-defined]
    notes = export(opened, "peft", tmp_path / "peft", LOOKUP).notes
    assert notes[-1].startswith("the adapter was trained on images of other sizes than the base's folder says")
    merge(opened, tmp_path / "merged", LOOKUP)
    for written in ("peft", "merged"):
        plain = transformers.AutoImageProcessor.from_pretrained(tmp_path / written, backend="pil")
        assert torch.equal(plain([[load_image(LARGE.images[0])]], return_tensors="pt")["pixel_values"], pixels)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config.get("image_grid_pinpoints") == (plan.model_spec.model.config or {}).get("image_grid_pinpoints")

    others = table_of(folder, **{name: value + 1 for name, value in settings.items()})
    others["peft"] |= {"init_from": str(tmp_path / "out")}
    with pytest.raises(CheckpointError, match=rf"model.{next(iter(settings))} is \d+ there, and \d+ here"):
        beginning(resolve(parse_run(others, Path.cwd()), LOOKUP), LOOKUP)
