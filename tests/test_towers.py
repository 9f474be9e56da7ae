"""The towers: what they say without weights, what they compute, and the names of their tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mgm_folders import GOLDEN
from safetensors.torch import save_file

from graftwork.build.values import parameters_on_meta
from graftwork.contracts import BuildContext, NoSettings, VisionTower
from graftwork.errors import WeightsError
from graftwork.weights import open_weights
from graftwork_convnext import OpenClipConvNext
from graftwork_hf_vision.clip import Clip, ClipSettings

CLIP, CONVNEXT = Clip(ClipSettings()), OpenClipConvNext(NoSettings())
TOWERS = pytest.mark.parametrize(
    ("tower", "folder"), [(CLIP, GOLDEN / "clip"), (CONVNEXT, GOLDEN / "convnext")], ids=["clip", "openclip-convnext"]
)


def write_json(file: Path, content: Any) -> Path:
    """Write JSON; returns the folder."""
    file.write_text(json.dumps(content))
    return file.parent


def filled(tower: VisionTower[Any], folder: Path) -> Any:
    """A tower with its published weights, in evaluation mode."""
    module = tower.build(tower.configuration(folder), BuildContext())
    named = {tower.module_name(name): tensor() for name, tensor in open_weights(folder).items()}
    module.load_state_dict({name: tensor for name, tensor in named.items() if name})
    return module.eval()


@TOWERS
def test_a_tower_computes_the_maps_that_it_describes(tower: VisionTower[Any], folder: Path) -> None:
    config = tower.configuration(folder)
    output = tower.describe(config)
    with torch.no_grad():
        maps = filled(tower, folder)(torch.randn(2, 3, output.pixels.size, output.pixels.size))
    sizes = [(2, width, *grid) for width, grid in zip(output.widths, output.grids, strict=True)]
    assert [tuple(each.shape) for each in maps] == sizes
    assert all(each.isfinite().all() for each in maps)


@TOWERS
def test_every_tensor_has_a_published_name_that_translates_back(tower: VisionTower[Any], folder: Path) -> None:
    names = list(tower.build(tower.configuration(folder), BuildContext()).state_dict())
    assert [tower.module_name(tower.published_name(name)) for name in names] == names
    assert [tower.module_name(name) for name in names] == names
    assert len({tower.published_name(name) for name in names}) == len(names)


@TOWERS
def test_the_configuration_reads_back_what_it_returned(tower: VisionTower[Any], folder: Path, tmp_path: Path) -> None:
    config = tower.configuration(folder)
    assert tower.configuration(write_json(tmp_path / "config.json", config)) == config


@TOWERS
def test_without_a_folder_a_tower_asks_for_one(tower: VisionTower[Any], folder: Path) -> None:
    with pytest.raises(WeightsError, match=f"'{tower.name}' needs a folder of weights or of configurations"):
        tower.configuration(None)


@pytest.mark.parametrize("layer", [-2, -1, 0, 1])
def test_clip_gives_the_patches_of_the_selected_state_and_computes_no_layer_after_it(layer: int) -> None:
    pixels, tower = torch.randn(2, 3, 56, 56), Clip(ClipSettings(select_layer=layer))
    module, ran = filled(tower, GOLDEN / "clip"), list[int]()
    wanted = filled(Clip(ClipSettings(select_layer=-1)), GOLDEN / "clip").vision_model
    for number, each in enumerate(module.vision_model.encoder.layers.children()):
        each.register_forward_hook(lambda *call, number=number: ran.append(number))
    with torch.no_grad():
        states = wanted(pixels, output_hidden_states=True).hidden_states
        assert torch.equal(module(pixels)[0].flatten(2).transpose(1, 2), states[layer][:, 1:])
    assert ran == list(range(layer % 4)) or layer == 0


def test_clip_reads_the_vision_half_of_a_whole_clip(tmp_path: Path) -> None:
    vision = {"hidden_size": 64, "image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    write_json(tmp_path / "config.json", {"model_type": "clip", "hidden_size": 9, "vision_config": vision})
    write_json(tmp_path / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    output = CLIP.describe(CLIP.configuration(tmp_path))
    assert (output.widths, output.grids, output.pixels.size) == ((64,), ((4, 4),), 32)
    assert (output.pixels.mean, output.pixels.std) == ((0.5,) * 3, (0.25,) * 3)


def test_clip_reads_the_pixels_of_its_configuration_where_no_file_of_their_own_says_otherwise(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    pixels = CLIP.describe(CLIP.configuration(tmp_path)).pixels
    assert (pixels.mean, pixels.std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("prefix", ["", "vision_model.", "vision_tower.vision_model."])
def test_clip_knows_its_tensors_under_every_prefix(prefix: str) -> None:
    assert CLIP.module_name(f"{prefix}pre_layrnorm.weight") == "vision_model.pre_layrnorm.weight"
    assert CLIP.module_name(f"{prefix}embeddings.position_ids") == "vision_model.embeddings.position_ids"


@pytest.mark.parametrize(
    "name", ["text_model.encoder.layers.0.mlp.fc1.weight", "visual_projection.weight", "logit_scale"]
)
def test_clip_leaves_what_is_not_its_image_encoder(name: str) -> None:
    assert CLIP.module_name(name) is None


def test_clip_refuses_what_it_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="this CLIP takes images of 56 pixels, not 64; use another tower or size"):
        CLIP.describe(CLIP.configuration(GOLDEN / "clip"), 64)
    with pytest.raises(
        WeightsError, match=r"select_layer is -5, and the encoder in '.*' has 3 layers; name one of them"
    ):
        Clip(ClipSettings(select_layer=-5)).configuration(GOLDEN / "clip")
    write_json(tmp_path / "config.json", {"model_type": "siglip"})
    with pytest.raises(WeightsError, match="holds a 'siglip', and 'clip' reads CLIP; name a CLIP folder"):
        CLIP.configuration(tmp_path)


def test_clip_says_where_it_attends() -> None:
    (site,) = CLIP.sites(CLIP.configuration(GOLDEN / "clip"))
    assert (site.head_dim, site.heads, site.kv_heads, site.causal, site.padding) == (8, 4, 4, False, False)
    assert CONVNEXT.sites({}) == ()


def test_convnext_learns_its_sizes_from_the_tensors_of_any_folder(tmp_path: Path) -> None:
    config = CONVNEXT.configuration(GOLDEN / "convnext")
    assert (config["hidden_sizes"], config["depths"], config["patch_size"]) == ([8, 16, 32, 64], [1, 1, 2, 1], 4)
    assert (config["image_size"], config["drop_path_rate"], config["norm_eps"]) == (320, 0.1, 1e-6)
    tensors = {name: tensor() for name, tensor in open_weights(GOLDEN / "convnext").items()}
    trunk = {CONVNEXT.published_name(t): value for name, value in tensors.items() if (t := CONVNEXT.module_name(name))}
    assert all(name.startswith(("vision_stem.", "vision_stages.")) for name in trunk)
    save_file(trunk, tmp_path / "model.safetensors")
    assert CONVNEXT.configuration(tmp_path)["depths"] == [1, 1, 2, 1]


def test_convnext_without_weights_goes_by_the_name_in_timm(tmp_path: Path) -> None:
    clip = {"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_xxlarge", "image_size": 256}}}
    config = CONVNEXT.configuration(write_json(tmp_path / "open_clip_config.json", clip))
    assert (config["hidden_sizes"][-1], config["depths"], config["norm_eps"]) == (3072, [3, 4, 30, 3], 1e-5)


def test_convnext_refuses_a_folder_that_does_not_say_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not say what its ConvNeXt is"):
        CONVNEXT.configuration(tmp_path)
    with pytest.raises(WeightsError, match="images whose side is a multiple of 32 pixels, not 100"):
        CONVNEXT.describe(CONVNEXT.configuration(GOLDEN / "convnext"), 100)


def test_convnext_takes_any_size_that_its_strides_divide() -> None:
    output = CONVNEXT.describe(CONVNEXT.configuration(GOLDEN / "convnext"), 64)
    assert (output.grids, output.widths) == (((16, 16), (8, 8), (4, 4), (2, 2)), (8, 16, 32, 64))


def test_convnext_leaves_head_and_text_tower() -> None:
    unused = [name for name in open_weights(GOLDEN / "convnext") if CONVNEXT.module_name(name) is None]
    assert unused and not [name for name in unused if name.startswith(("visual.trunk.stem.", "visual.trunk.stages."))]


def test_convnext_drops_deeper_blocks_more_often_while_it_trains() -> None:
    module = CONVNEXT.build(CONVNEXT.configuration(GOLDEN / "convnext"), BuildContext())
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for stage in module.stages for layer in stage.layers]
    assert rates == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])


def test_convnext_uses_the_epsilon_of_its_configuration() -> None:
    config = {**CONVNEXT.configuration(GOLDEN / "convnext"), "norm_eps": 1e-5}
    epsilons = {m.eps for m in CONVNEXT.build(config, BuildContext()).modules() if isinstance(m, torch.nn.LayerNorm)}
    assert epsilons == {1e-5}


@TOWERS
def test_a_tower_builds_on_meta_and_then_takes_its_weights(tower: VisionTower[Any], folder: Path) -> None:
    with parameters_on_meta():
        module = tower.build(tower.configuration(folder), BuildContext())
    assert all(parameter.is_meta for parameter in module.parameters())
    named = {tower.module_name(name): tensor() for name, tensor in open_weights(folder).items()}
    module.load_state_dict({name: tensor for name, tensor in named.items() if name}, assign=True)
    size = tower.describe(tower.configuration(folder)).pixels.size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, wanted = module.eval()(pixels), filled(tower, folder)(pixels)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
