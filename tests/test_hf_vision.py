"""Image encoders of transformers as towers: their states, their names, their pixels, and models of which they are parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import ENCODERS, PLAIN, write, write_pixels
from tiny_runs import COMPONENTS, LORA, plan_of

from graftwork.attention.transformers import ATTN_IMPLEMENTATION, register
from graftwork.checkpoint.learning import read
from graftwork.checkpoint.store import newest, open_checkpoint
from graftwork.config.machine import Machine
from graftwork.conformance import examine
from graftwork.contracts import BuildContext, DictLookup
from graftwork.errors import WeightsError
from graftwork.memory.rehearsal import rehearsing
from graftwork.train.loop import train
from graftwork.weights import open_weights
from graftwork_hf_vision import HfVision, HfVisionSettings

QUICK = ("siglip", "dinov2-registers", "dinov3-convnext", "swin", "beit", "resnet")
FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ENCODERS]
LOOKUP = DictLookup(*COMPONENTS, HfVision)
PREFIX = {"siglip": 0, "clip": 1, "dinov2": 1, "dinov2-registers": 5, "dinov3-vit": 5, "deit": 2, "ijepa": 0}
OWN = {"swin": "masks or keys", "beit": "masks or keys", "swinv2": "no other kernel", "hiera": "no other kernel"}
"""Encoders whose attention no other kernel can compute, and why."""
OFTEN = [("siglip", "convnext"), ("dinov2-registers", "swin")]
"""Low and high parts that are tried in every run of the tests; all others in the long one."""


def tower(layer: int | None = None, size: int | None = None) -> HfVision:
    return HfVision(HfVisionSettings(select_layer=layer, image_size=size))


def filled(tower: HfVision, folder: Path) -> Any:
    """A tower with its folder's weights, all of them, in evaluation mode."""
    register()
    module = tower.build(tower.configuration(folder), BuildContext(ATTN_IMPLEMENTATION))
    weights = open_weights(folder)
    assert all(tower.module_name(name) or tower.unused(name) for name in weights)
    module.load_state_dict({found: t() for name, t in weights.items() if (found := tower.module_name(name))})
    return module.eval()


def flat(state: torch.Tensor) -> torch.Tensor:
    """Any state as `[images, places, width]`."""
    return state.flatten(2).transpose(1, 2) if state.dim() == 4 else state


@pytest.mark.parametrize("name", FAMILIES)
def test_its_maps_are_the_hidden_states_of_transformers(name: str, tmp_path: Path) -> None:
    model = write(name, tmp_path)
    for layer in (None, -2, -1, 0, 1):
        own = tower(layer)
        config = own.configuration(tmp_path)
        assert json.loads(json.dumps(config)) == config
        output = own.describe(config)
        pixels = torch.randn(2, 3, output.pixels.size, output.pixels.size)
        with torch.no_grad():
            maps, whole = filled(own, tmp_path)(pixels), model(pixels, output_hidden_states=True)
        assert [each.shape[1:] for each in maps] == [
            (width, *grid) for width, grid in zip(output.widths, output.grids, strict=True)
        ]
        states = config["states"]
        wanted = [whole.last_hidden_state] if states is None else [whole.hidden_states[index] for index in states]
        for found, state in zip(maps, wanted, strict=True):
            assert (flat(found) - flat(state)[:, -flat(found).shape[1] :]).abs().max() < 1e-6
        assert layer is None or states == [range(len(whole.hidden_states))[layer]]
    assert config["prefix"] == PREFIX.get(name, config["prefix"])
    sites = own.sites(config)
    if name in OWN:
        assert OWN[name] in sites[0].why_own


def test_an_encoder_that_goes_coarser_gives_the_last_state_of_each_resolution(tmp_path: Path) -> None:
    for name in ("dinov3-convnext", "swin"):
        write(name, tmp_path)
        output = tower().describe(tower().configuration(tmp_path))
        sides = [64 // step for step in ((4, 8, 16, 32) if name == "dinov3-convnext" else (4, 8, 16))]
        assert (output.grids, output.pixels.size) == (tuple((side, side) for side in sides), 64)
        assert len(tower(-1).describe(tower(-1).configuration(tmp_path)).widths) == 1


def test_layers_after_the_selected_one_are_not_computed(tmp_path: Path) -> None:
    write("dinov2", tmp_path)
    module, ran = filled(tower(-2), tmp_path), list[int]()
    for number, layer in enumerate(module.vision_model.encoder.layer.children()):
        layer.register_forward_hook(lambda *call, number=number: ran.append(number))
    module(torch.randn(1, 3, 32, 32))
    assert ran == [0, 1] and len(list(module.vision_model.encoder.layer.children())) == 3


def test_images_of_another_size_are_taken_where_positions_can_be_interpolated(tmp_path: Path) -> None:
    write("siglip", tmp_path)
    own = tower()
    config = own.configuration(tmp_path)
    assert own.describe(config, 64).grids == ((8, 8),)
    with torch.no_grad():
        assert filled(own, tmp_path)(torch.randn(1, 3, 64, 64))[0].shape == (1, 32, 8, 8)
    assert tower(size=64).configuration(tmp_path)["image_size"] == 64
    write("aimv2", tmp_path)
    with pytest.raises(WeightsError, match=r"'aimv2_vision_model' cannot encode a square image of 64 pixels \("):
        tower().describe(tower().configuration(tmp_path), 64)


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("PixtralVisionConfig", {}, r"'pixtral' cannot encode a square image of 32 pixels \(it joins several images"),
        (
            "Siglip2VisionConfig",
            {"num_patches": 16},
            r"'siglip2_vision_model' cannot encode a square image of 32 pixels \(",
        ),
        ("BertConfig", {}, r"'bert' cannot encode a square image"),
        ("Qwen2VLVisionConfig", {}, "transformers builds no encoder from the configuration of a 'qwen2_vl_vision'"),
    ],
)
def test_what_does_not_encode_images_alone_is_refused(kind: str, changes: Any, sentence: str, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, kind, None) or transformers.models.qwen2_vl.Qwen2VLVisionConfig
    config(**{**PLAIN, **changes}).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=sentence):
        tower().configuration(write_pixels(tmp_path))


def test_a_layer_that_the_encoder_lacks_and_a_folder_of_other_code_are_refused(tmp_path: Path) -> None:
    write("vit", tmp_path)
    with pytest.raises(WeightsError, match="select_layer is 4, and the encoder has 3 layers; name one of them"):
        tower(4).configuration(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "my-vit", "auto_map": {"AutoModel": "m.M"}}))
    with pytest.raises(WeightsError, match=r"'my-vit' .* without code of its own, which is never run"):
        tower().configuration(tmp_path)


def test_the_encoder_of_a_model_of_images_and_text_is_read(tmp_path: Path) -> None:
    import transformers

    words = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    config = transformers.SiglipConfig(text_config=words, vision_config=PLAIN)
    model = transformers.SiglipModel(config).eval()
    model.save_pretrained(tmp_path)
    module, pixels = filled(tower(), write_pixels(tmp_path)), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = model.vision_model(pixels).last_hidden_state
        torch.testing.assert_close(module(pixels)[0].flatten(2).mT, wanted, atol=1e-6, rtol=0)
    own = tower()
    own.build(own.configuration(tmp_path), BuildContext())
    assert own.module_name("text_model.encoder.layers.0.mlp.fc1.weight") is None
    assert "besides its image encoder" in own.unused("text_model.encoder.layers.0.mlp.fc1.weight")
    assert own.unused("vision_model.encoder.layers.9.mlp.fc1.weight") == ""  # so that it is refused


@pytest.mark.parametrize(
    ("changes", "mean", "std", "size", "resample"),
    [
        ({}, 0.5, 0.25, 32, 2),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, 0.5, 0.5, 32, 2),
        ({"do_normalize": False, "image_mean": None}, 0.0, 1.0, 32, 2),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, 0.5, 0.2, 32, 2),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 24, "width": 24}, "resample": None}, 0.5, 0.25, 24, 3),
        ({"size": {"height": 16, "width": 16}, "do_resize": False}, 0.5, 0.25, 32, 2),
    ],
)
def test_pixels_are_those_of_the_folder(
    changes: dict[str, Any], mean: float, std: float, size: int, resample: int, tmp_path: Path
) -> None:
    write("siglip", tmp_path)
    pixels = tower().describe(tower().configuration(write_pixels(tmp_path, **changes))).pixels
    assert (pixels.size, pixels.resample) == (size, resample)
    assert pixels.mean == pytest.approx([mean] * 3) and pixels.std == pytest.approx([std] * 3)


def test_a_folder_that_does_not_say_how_images_become_pixels_is_refused(tmp_path: Path) -> None:
    write("siglip", tmp_path)
    write_pixels(tmp_path, image_std=None)
    with pytest.raises(WeightsError, match="lacks image_std, so it is not known how pixels are normalised"):
        tower().configuration(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match=r"has no preprocessor_config.json, so it is not known how images become"):
        tower().configuration(tmp_path)
    write("resnet", tmp_path)
    with pytest.raises(WeightsError, match="does not say how large images are; set image_size"):
        tower().configuration(write_pixels(tmp_path, size=None))


@pytest.mark.parametrize("name", ["siglip", "swin", "convnext", "beit"])
def test_the_kit_finds_nothing_wrong(name: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    failed = [outcome for outcome in examine(HfVision, config=tmp_path) if outcome.state == "failed"]
    assert not failed


SIZES = {"aimv2": 32, "hiera": 64}
"""Encoders that take images of one size, and which."""
WITHOUT_LINEAR = ("resnet", "regnet", "poolformer")
"""Encoders of convolutions alone, into which LoRA has nothing to put."""
UNREAD = dict.fromkeys(("siglip", "aimv2"), ("*.vision_model.head",))
"""Modules that pool an image to one vector, which no map is read from."""


def rehearse_train_and_open(low: str, high: str, folder: Path) -> Any:
    """Rehearse, train, save and open an MGM with towers of these kinds, which both learn; returns its checkpoint."""
    parts: dict[str, dict[str, Any]] = {"low": {"select_layer": -1}, "high": {}}
    for part, name in (("low", low), ("high", high)):
        (folder / part).mkdir()
        write(name, folder / part)
        parts[part] |= {"use": "hf-vision", "config": str(folder / part)}
    changes = {
        "peft": {"use": "full", "on": ["vision"]}
        if low in WITHOUT_LINEAR
        else LORA | {"on": ["vision", "language.attention"]},
        "model.parts": parts,
        "model.image_size_aux": SIZES.get(high, 128),
        "train.steps": 2,
        "train.micro_batch_size": 2,
        "train.allow_unreached": [*UNREAD.get(low, UNREAD.get(high, ()))],
    }
    plan = plan_of(None, folder, changes, LOOKUP)
    with rehearsing(plan, LOOKUP, Machine(), device="cpu") as rehearsed:
        assert rehearsed.take(2).footprint.peak > 0
    train(plan, LOOKUP, folder / "out", device="cpu")
    learned: Any = read(newest(folder / "out"))
    assert {"vision.low", "vision.high"} <= {each.role for each in learned.modules if each.steps and each.moved}
    return open_checkpoint(newest(folder / "out"), LOOKUP, device="cpu")


@pytest.mark.parametrize(("low", "high"), OFTEN)
def test_an_mgm_of_such_towers_rehearses_trains_saves_and_opens(low: str, high: str, tmp_path: Path) -> None:
    rehearse_train_and_open(low, high, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_is_a_low_and_a_high_part(name: str, tmp_path: Path) -> None:
    rehearse_train_and_open(name, name, tmp_path)
