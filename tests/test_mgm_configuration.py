"""The folders that an MGM is read from, what is refused, and the folder that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mgm_folders import GOLDEN, QUESTION, TOWER_FOLDERS, config_folder, small

from graftwork.build import compose
from graftwork.contracts import (
    Assembly,
    Choice,
    Component,
    DictLookup,
    ModelSpec,
    Plan,
    RunContext,
    TrainSettings,
    WeightsRef,
    collate,
)
from graftwork.errors import WeightsError
from graftwork.weights import open_weights
from graftwork_convnext import OpenClipConvNext
from graftwork_hf_vision.clip import Clip, ClipSettings
from graftwork_mgm import MgmGemma, MgmSettings

LOOKUP = DictLookup(MgmGemma, Clip, OpenClipConvNext)


def test_a_plain_folder_leaves_the_rest_to_settings() -> None:
    config = MgmGemma(MgmSettings(image_size_aux=96)).configuration(GOLDEN / "base")
    assert {key: config[key] for key in config if key != "language"} == {
        "select_layer": None,
        "image_size_aux": 96,
        "projector_type": "mlp2x_gelu",
        "aspect_ratio": "pad",
        "image_grid": 1,
        "image_global": False,
        "template": "gemma",
    }


def test_an_mgm_folder_says_what_settings_leave_open(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, mm_projector_type=None, image_aspect_ratio=None, image_grid=2, image_global=True)
    assert not MgmGemma(MgmSettings(image_grid=1)).configuration(folder)["image_global"]
    config = MgmGemma(MgmSettings(image_grid=3)).configuration(folder)
    assert (config["projector_type"], config["aspect_ratio"], config["image_size_aux"]) == ("linear", "square", 128)
    assert (config["image_grid"], config["image_global"], config["select_layer"]) == (3, True, -2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "llama"}, "holds a 'llama' model, and 'mgm-gemma' reads 'gemma' or 'mgm_gemma'; name another"),
        ({"hidden_size": None}, "lacks hidden_size; fetch the folder again"),
        ({"mm_projector_type": "resampler"}, "projector_type 'resampler' is not known; use 'mlp2x_gelu'"),
        ({"image_aspect_ratio": "anyres"}, "aspect_ratio 'anyres' is not known; use 'pad' or 'square'"),
        ({"mm_use_im_start_end": True}, "sets mm_use_im_start_end to 'True', and 'mgm-gemma' has only 'False'"),
        ({"mm_vision_select_feature": "cls_patch"}, "and 'mgm-gemma' has only 'patch'; name another folder"),
    ],
)
def test_a_folder_that_is_another_model_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(WeightsError) as refused:
        MgmGemma(MgmSettings()).configuration(config_folder(tmp_path, **changes))
    assert sentence in str(refused.value)


@pytest.mark.parametrize("published", ["linear", "identity", "mlp2x_gelu", "mlp3x_gelu"])
def test_every_published_connector_is_taken_from_a_folder(tmp_path: Path, published: str) -> None:
    folder = config_folder(tmp_path, mm_projector_type=published)
    assert MgmGemma(MgmSettings()).configuration(folder)["projector_type"] == published


def test_towers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    clip, convnext = Clip(ClipSettings()), OpenClipConvNext(Component.Settings())
    low, high = clip.configuration(TOWER_FOLDERS["low"]), convnext.configuration(TOWER_FOLDERS["high"])
    architecture = MgmGemma(MgmSettings())
    config = architecture.configuration(GOLDEN / "full")

    def refusal(towers: Any, **changes: Any) -> str:
        with pytest.raises(WeightsError) as refused:
            architecture.describe_towers({**config, **changes}, towers)
        return str(refused.value)

    both = {"low": (clip, low), "high": (convnext, high)}
    assert "part 'low' takes a tower with one map, and 'openclip-convnext' gives 4" in refusal(
        {"low": (convnext, high)}
    )
    other = Clip(ClipSettings(select_layer=-1))
    assert "trained with select_layer -2 of part 'low', and the run has -1; set it to -2" in refusal(
        {"low": (other, low)}
    )
    assert "'identity' cannot join widths 32 and 64" in refusal(both, projector_type="identity")
    assert "has 24 rows, which 16 rows of patches do not divide" in refusal(both, image_size_aux=96, image_grid=4)


def plan(weights: Path | None, config: Path, *, towers: bool) -> Plan:
    """A plan for the small model, whose parts have weights of their own or none."""

    def choice(component: Component[Any], folder: Path | None, described: Any) -> Choice:
        ref = WeightsRef(str(folder), str(folder)) if folder else None
        settings = dict(vars(component.settings))
        names = {"kind": component.kind, "name": component.name, "plugin": "mgm", "distribution": "graftwork"}
        where = str(folder) if folder else None
        return Choice(**names, version="0", settings=settings, weights=ref, config=described, folder=where)

    architecture, clip, convnext = MgmGemma(MgmSettings()), Clip(ClipSettings()), OpenClipConvNext(Component.Settings())
    parts = {"low": clip, "high": convnext}
    folders = {part: TOWER_FOLDERS[part] if towers else None for part in parts}
    described = {part: dict(tower.configuration(TOWER_FOLDERS[part])) for part, tower in parts.items()}
    model = choice(architecture, weights, dict(architecture.configuration(config)))
    model_spec = ModelSpec(model, {part: choice(parts[part], folders[part], described[part]) for part in parts})
    return Plan(model_spec, RunContext(train=TrainSettings(precision="fp32")))


def logits(assembly: Assembly) -> torch.Tensor:
    """What an assembly makes of a question."""
    batch = collate([assembly.processor.encode(QUESTION)], pad_id=0)
    assembly.model.eval()
    with torch.no_grad():
        result: torch.Tensor = assembly.model.logits(assembly.model(batch))
    return result


def test_what_is_written_reads_back_as_the_same_model(tmp_path: Path) -> None:
    base = compose.build(plan(GOLDEN / "full", GOLDEN / "full", towers=True), LOOKUP, device="cpu")
    base.architecture.write(base, tmp_path)
    again = compose.build(plan(tmp_path, tmp_path, towers=False), LOOKUP, device="cpu")
    assert again.adaptation.newly_initialised == ()
    assert torch.equal(logits(again), logits(base))
    for part, tower in base.towers.items():
        assert tower.configuration(tmp_path / part) == base.plan.model_spec.parts[part].config
    config = dict(base.plan.model_spec.model.config or {})
    assert config.pop("high_from") == "its folder"  # and what was written holds it itself
    assert again.plan.model_spec.model.config == config


def test_what_is_written_has_the_published_names_and_keys(tmp_path: Path) -> None:
    base = compose.build(plan(GOLDEN / "full", GOLDEN / "full", towers=True), LOOKUP, device="cpu")
    base.architecture.write(base, tmp_path)
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(names) == set(open_weights(tmp_path)) == set(open_weights(GOLDEN / "full"))
    assert set(names.values()) == {"model.safetensors"}
    written, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path, GOLDEN / "full"))
    same = set(theirs) - {"mm_vision_tower", "mm_vision_tower_aux", "torch_dtype", "tokenizer_model_max_length"}
    unread = {"_name_or_path", "transformers_version", "image_grid_pinpoints", "mm_projector_lr", "tune_mm_mlp_adapter"}
    unread |= {"freeze_mm_mlp_adapter", "optimize_vision_tower", "optimize_vision_tower_aux"}
    assert {key: written[key] for key in same - unread} == {key: theirs[key] for key in same - unread}
    assert (written["mm_vision_tower"], written["mm_vision_tower_aux"]) == ("low", "high")


def test_a_plain_language_model_starts_with_a_fresh_connector_and_mining() -> None:
    assembly = compose.build(plan(GOLDEN / "base", GOLDEN / "base", towers=True), LOOKUP, device="cpu")
    assert assembly.adaptation.newly_initialised == ("connector", "mining")
    assert not [name for name, parameter in assembly.model.named_parameters() if parameter.is_meta]
    bound = 64**-0.5  # of torch's own initialisation
    assert 0.5 * bound < assembly.model.model.mm_projector[2].weight.abs().max() <= bound


def test_a_folder_of_configurations_alone_builds_a_random_model(tmp_path: Path) -> None:
    config = config_folder(tmp_path, "base", image_size_aux=64)
    model = small(config, tokenizer=GOLDEN / "base")
    batch = collate([model.processor.encode(QUESTION)], pad_id=0)
    with torch.no_grad():
        scores = model.model.logits(model.model(batch))
    assert scores.isfinite().all() and scores.std() < 10


def test_copies_of_tied_and_computed_tensors_stay_to_be_compared(tmp_path: Path) -> None:
    architecture = MgmGemma(MgmSettings())
    copies = {"lm_head.weight": torch.ones, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones}
    assert architecture.tensors(copies, {}) == copies  # type: ignore[arg-type]
    assert copies.keys() <= small(GOLDEN / "full").structure.tied_weights.keys()


def test_tensors_of_a_part_that_the_run_leaves_empty_stay_to_be_noticed() -> None:
    towers = {"low": Clip(ClipSettings())}
    names = MgmGemma(MgmSettings()).tensors(open_weights(GOLDEN / "full"), towers)
    model = small(GOLDEN / "full", high=False).model
    extra = set(names) - set(model.state_dict())
    assert extra and all(name.startswith(("model.vision_tower_aux.", "model.vlm_uni_")) for name in extra)
