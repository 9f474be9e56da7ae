"""timm's encoders as towers, where timm can be imported; and what is said where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import COMPONENTS, LORA, plan_of

from graftwork.checkpoint.store import newest, open_checkpoint
from graftwork.config.machine import Machine
from graftwork.conformance import examine
from graftwork.contracts import BuildContext, DictLookup, Requires, importing, missing_packages
from graftwork.errors import WeightsError
from graftwork.memory.rehearsal import rehearsing
from graftwork.train.loop import train
from graftwork.weights import open_weights
from graftwork_timm import Timm, TimmSettings

WHY_NOT = missing_packages(Timm.requires)
WITH_TIMM = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
ENCODERS: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (64, {}),
    "convnext_tiny": (64, {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}),
    "vit_tiny_patch16_224": (32, {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}),
    "vit_small_patch14_reg4_dinov2": (
        28,
        {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 2},
    ),
    "swin_tiny_patch4_window7_224": (
        64,
        {"img_size": 64, "window_size": 4, "embed_dim": 8, "depths": [1, 2, 1], "num_heads": [1, 2, 2]},
    ),
}
"""timm's name, the side of the images, and what is small in it."""


def written(name: str, folder: Path) -> Any:
    """Write a folder as the hub has them; returns timm's model, in evaluation mode."""
    import timm

    size, arguments = ENCODERS[name]
    model = timm.create_model(name, pretrained=False, num_classes=9, **arguments).eval()
    save_file(model.state_dict(), folder / "model.safetensors")
    said = {"input_size": [3, size, size], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
    said["classifier"] = model.pretrained_cfg["classifier"]
    config = {"architecture": name, "num_classes": 9, "model_args": arguments, "pretrained_cfg": said}
    (folder / "config.json").write_text(json.dumps(config))
    return model


@WITH_TIMM
@pytest.mark.parametrize("name", ENCODERS)
def test_its_maps_are_the_states_of_timm(name: str, tmp_path: Path) -> None:
    model, size = written(name, tmp_path), ENCODERS[name][0]
    pixels = torch.randn(2, 3, size, size)
    for layer in (None, -2, -1, 0):
        tower = Timm(TimmSettings(select_layer=layer))
        config = tower.configuration(tmp_path)
        assert json.loads(json.dumps(config)) == config
        output, module = tower.describe(config), tower.build(config, BuildContext()).eval()
        weights = open_weights(tmp_path)
        module.load_state_dict({found: t() for key, t in weights.items() if (found := tower.module_name(key))})
        assert all(tower.module_name(key) or tower.unused(key) == "the classifier of the encoder" for key in weights)
        states = config["states"]
        with torch.no_grad():
            maps = module(pixels)
            every = model.forward_intermediates(pixels, intermediates_only=True)
            last = model.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)
        wanted = last if states is None else [every[index] for index in states]
        assert all(torch.equal(a, b) for a, b in zip(maps, wanted, strict=True))
        assert [each.shape[1:] for each in maps] == [
            (width, *grid) for width, grid in zip(output.widths, output.grids, strict=True)
        ]
    assert (output.pixels.resample, output.pixels.mean) == (2, (0.5,) * 3)
    assert not [outcome for outcome in examine(Timm, config=tmp_path) if outcome.state == "failed"]


@WITH_TIMM
def test_an_mgm_of_such_towers_rehearses_trains_saves_and_opens(tmp_path: Path) -> None:
    lookup, parts = DictLookup(*COMPONENTS, Timm), {}
    for part, name in (("low", "vit_tiny_patch16_224"), ("high", "convnext_tiny")):
        (tmp_path / part).mkdir()
        written(name, tmp_path / part)
        parts[part] = {"use": "timm", "config": str(tmp_path / part)}
    changes = {"peft": LORA | {"on": ["vision", "language.attention"]}, "model.parts": parts, "train.steps": 2}
    changes["train.allow_unreached"] = ["vision"]  # some towers have a head that is not read
    plan = plan_of(None, tmp_path, changes, lookup)
    with rehearsing(plan, lookup, Machine(), device="cpu") as rehearsed:
        assert rehearsed.take(2).footprint.peak > 0
    train(plan, lookup, tmp_path / "out", device="cpu")
    opened = open_checkpoint(newest(tmp_path / "out"), lookup, device="cpu")
    learned = {name for name, tensor in opened.assembly.state_to_save().items() if "lora_B" in name and tensor.any()}
    assert any("vision_tower." in name for name in learned) and any("vision_tower_aux." in name for name in learned)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "vit"}, "names no architecture of timm; name a folder of timm, or use 'hf-vision'"),
        ({"architecture": "resnet18", "pretrained_cfg": {"mean": [0.5] * 3}}, "lacks input_size and std"),
    ],
)
def test_a_folder_of_something_else_is_refused(config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=sentence):
        Timm(TimmSettings()).configuration(tmp_path)


def test_a_package_that_is_there_and_does_not_import_is_tried_once(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "broken_here.py").write_text(
        "import pathlib\nwith pathlib.Path(__file__).with_suffix('.log').open('a') as log: log.write('x')\n"
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    requires = Requires(("pluggy>=1",), module="broken_here", advice="install the one that fits")
    for _ in range(2):
        importing.import_failure.cache_clear()
        assert missing_packages(requires) == (
            "'broken_here' is installed and cannot be imported (RuntimeError: operator torchvision::nms does not exist): install the "
            "one that fits"
        )
    assert (tmp_path / "broken_here.log").read_text() == "x"
    importing.import_failure.cache_clear()
    assert missing_packages(Requires(("pluggy>=1",), module="json")) == ""
    monkeypatch.setattr(importing, "subprocess", None)  # nothing is tried where a package is missing
    assert "needs no-such-package" in missing_packages(Requires(("no-such-package",), module="never_tried"))
