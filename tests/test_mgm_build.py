"""What an MGM is built as: its map, its modes and its variants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mgm_folders import GOLDEN, QUESTION, TOWER_FOLDERS, config_folder, published, small
from torch import nn
from torch.nn import functional

from graftwork.build.values import parameters_on_meta
from graftwork.contracts import Batch, BuildContext, Component, Record, Turn, collate
from graftwork.weights import open_weights
from graftwork_convnext import OpenClipConvNext
from graftwork_hf_vision.clip import Clip, ClipSettings
from graftwork_mgm import MgmGemma, MgmSettings
from graftwork_mgm.model import KEY_BIASES


def random_features(grid: int = 1, overview: bool = False, images: int = 2) -> dict[str, list[torch.Tensor]]:
    """Maps as the small towers give them."""
    views = grid**2 + overview
    sides = [32 * grid, 16 * grid, 8 * grid, 4 * grid]
    high = [torch.randn(images, width, side, side) for width, side in zip((8, 16, 32, 64), sides, strict=True)]
    return {"low": [torch.randn(images * views, 32, 4, 4)], "high": high}


def mined_one_by_one(model: Any, low: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    """Tokens of one view, from its low map `[width, 4, 4]` and fine map `[width, rows, columns]`, patch by patch."""
    step = fine.shape[-1] // 4
    tokens = []
    for row in range(4):
        for column in range(4):
            patch = low[:, row, column]
            window = fine[:, row * step : (row + 1) * step, column * step : (column + 1) * step].flatten(1).T
            query = model.vlm_uni_query_projector(patch)
            scores = model.vlm_uni_aux_projector(window) @ query / 32**0.5
            tokens.append(patch + scores.softmax(0) @ model.vlm_uni_val_projector(window))
    return torch.stack(tokens)


def test_every_parameter_lies_in_exactly_one_role() -> None:
    structure = small(GOLDEN / "full").structure
    assert set(structure.roles) == set(MgmGemma.roles) - {"language.head"}  # which is the embeddings here
    modules = [module for modules in structure.roles.values() for module in modules]
    for name, _ in structure.model.named_parameters():
        assert sum(name.startswith(f"{module}.") for module in modules) == 1, name


def test_the_map_names_modules_that_exist() -> None:
    structure = small(GOLDEN / "full").structure
    assert {name: len(blocks) for name, blocks in structure.blocks.items()} == {
        "language": 2,
        "mining": 1,
        "vision.low": 3,
        "vision.high": 11,  # five layers, and six that shrink the map between stages
    }
    for modules in (*structure.roles.values(), *structure.blocks.values(), *structure.attention_modules.values()):
        for module in modules:
            structure.model.get_submodule(module)


def test_the_names_are_those_of_published_weights_outside_the_towers() -> None:
    names = {name for name in small(GOLDEN / "full").model.state_dict() if "vision_tower" not in name}
    assert names == {name for name in open_weights(GOLDEN / "full") if "vision_tower" not in name}


def test_its_one_site_is_the_language_model() -> None:
    model = small(GOLDEN / "full")
    (language,) = model.architecture.sites(model.config, model.outputs)
    assert (language.name, language.head_dim, language.heads, language.kv_heads) == ("language", 16, 4, 1)


def test_mining_is_what_a_loop_over_patches_computes() -> None:
    model = small(GOLDEN / "full").model
    features = random_features()
    fine = [
        functional.interpolate(each, size=(32, 32), mode="bilinear", align_corners=False) for each in features["high"]
    ]
    with torch.no_grad():
        tokens = model.image_tokens(features)
        for image in range(2):
            low, high = features["low"][0][image], torch.cat([each[image] for each in fine])
            torch.testing.assert_close(
                tokens[image], model.model.mm_projector(mined_one_by_one(model.model, low, high))
            )


@pytest.mark.parametrize("overview", [False, True])
def test_every_tile_mines_its_own_part_of_the_fine_map(overview: bool) -> None:
    model = small(GOLDEN / "full", image_grid=2, image_global=overview, image_size_aux=256).model
    features = random_features(2, overview)
    fine = torch.cat(
        [
            functional.interpolate(each, size=(64, 64), mode="bilinear", align_corners=False)
            for each in features["high"]
        ],
        1,
    )
    half = functional.interpolate(fine, scale_factor=0.5, mode="bilinear", align_corners=False)
    views = 4 + overview
    with torch.no_grad():
        tokens = model.image_tokens(features)
        assert tokens.shape == (2, views * 16, 64)
        for image in range(2):
            corners = [fine[image, :, y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)]
            maps = [half[image], *corners] if overview else corners
            lows = features["low"][0][image * views : (image + 1) * views]
            mined = [mined_one_by_one(model.model, low, high) for low, high in zip(lows, maps, strict=True)]
            torch.testing.assert_close(tokens[image], model.model.mm_projector(torch.cat(mined)))


def test_a_tiled_model_reads_what_its_processor_encodes() -> None:
    model = small(GOLDEN / "full", image_grid=2, image_global=True, image_size_aux=256)
    batch = collate([model.processor.encode(QUESTION)] * 2, pad_id=0)
    with torch.no_grad():
        assert model.model(batch).shape == (2, batch.input_ids.shape[1], 64)


def test_without_a_high_part_tokens_are_the_low_patches_connected() -> None:
    model = small(GOLDEN / "full", high=False).model
    assert not [name for name in model.state_dict() if "vlm_uni" in name]
    low = torch.randn(2, 32, 4, 4)
    with torch.no_grad():
        wanted = model.model.mm_projector(low.flatten(2).transpose(1, 2))
        torch.testing.assert_close(model.image_tokens({"low": [low]}), wanted)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("linear", ["weight", "bias"]),
        ("mlp2x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("mlp3x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
    ],
)
def test_a_connector_has_the_published_names(kind: str, names: list[str]) -> None:
    model = small(GOLDEN / "full", projector_type=kind).model
    assert list(model.model.mm_projector.state_dict()) == names


def test_only_a_trained_tower_trains() -> None:
    model = small(GOLDEN / "full").model
    model.requires_grad_(False).train()
    low, high = model.tower("low"), model.tower("high")
    assert model.training and model.model.layers[0].training
    assert not any(module.training for tower in (low, high) for module in tower.modules())
    pixels = {"low": torch.randn(1, 3, 56, 56), "high": torch.randn(1, 3, 128, 128)}
    assert not any(each.requires_grad for maps in model.maps(pixels).values() for each in maps)
    next(high.parameters()).requires_grad_(True)
    model.train()
    features = model.maps(pixels)
    assert high.training and not low.training
    assert features["high"][0].requires_grad and not features["low"][0].requires_grad
    assert not model.eval().tower("high").training


def test_gradients_reach_connector_mining_and_language_through_frozen_towers() -> None:
    model = small(GOLDEN / "full")
    for tower in ("low", "high"):
        model.model.tower(tower).requires_grad_(False)
    batch = collate([model.processor.encode(QUESTION)], pad_id=0)
    model.model.logits(model.model(batch)).square().mean().backward()
    for name, parameter in model.model.named_parameters():
        expected = "vision_tower" not in name and name not in model.structure.without_effect
        assert (parameter.grad is not None and bool(parameter.grad.any())) == expected, name


@pytest.mark.parametrize("grid", [1, 2])
def test_mining_that_projects_no_pixel_has_the_values_and_gradients_of_one_that_projects_all(grid: int) -> None:
    found = []
    for plain in (True, False):
        torch.manual_seed(5)
        model = small(GOLDEN / "full", image_grid=grid, image_size_aux=128 * grid).model
        features = random_features(grid, False)
        projectors = [getattr(model.model, f"vlm_uni_{name}_projector") for name in ("query", "aux", "val")]
        for parameter in nn.ModuleList(projectors).parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        if not plain:  # a hook makes a module be called, whatever it does
            projectors[1][1].register_forward_hook(lambda module, given, output: output)
        for each in (leaves := [*features["low"], *features["high"]]):
            each.requires_grad_(True)
        tokens = model.image_tokens(features)
        tokens.square().sum().backward()
        trained = {name: each.grad for name, each in model.named_parameters() if "_projector" in name}
        ignored = {name: trained.pop(name) for name in KEY_BIASES}
        assert all(each is None for each in ignored.values()) == plain
        found.append({"tokens": tokens.detach(), **trained, **{str(n): each.grad for n, each in enumerate(leaves)}})
    for name, value in found[0].items():
        assert (value - found[1][name]).norm() <= 1e-5 * value.norm(), name
    assert not found[0]["tokens"].equal(found[1]["tokens"]), "one of them was computed otherwise"


def test_an_adapter_on_minings_projections_counts() -> None:
    model = small(GOLDEN / "full").model
    features = random_features()
    before = model.image_tokens(features)
    model.model.vlm_uni_aux_projector[1].register_forward_hook(lambda module, given, output: 3 * output)
    assert (model.image_tokens(features) - before).norm() > 1e-3 * before.norm()


def test_at_the_published_size_every_part_has_the_published_number_of_parameters(tmp_path: Path) -> None:
    gemma = {"vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18}
    gemma |= {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "image_size_aux": 768}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    timm = {"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_large"}}}
    for name, content in (
        ("low/config.json", vision | {"image_size": 336, "patch_size": 14}),
        ("high/open_clip_config.json", timm),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content))
    architecture = MgmGemma(MgmSettings())
    config = architecture.configuration(config_folder(tmp_path, **gemma))
    parts = {"low": Clip(ClipSettings()), "high": OpenClipConvNext(Component.Settings())}
    described = {part: (tower, tower.configuration(tmp_path / part)) for part, tower in parts.items()}
    outputs = architecture.describe_towers(config, described)
    assert (outputs["low"].grids, outputs["high"].grids[0]) == (((24, 24),), (192, 192))
    with parameters_on_meta():
        towers = {part: tower.build(described[part][1], BuildContext()) for part, tower in parts.items()}
        structure = architecture.build(config, towers, outputs, BuildContext())

    def count(role: str) -> int:
        return sum(
            p.numel() for name in structure.roles[role] for p in structure.model.get_submodule(name).parameters()
        )

    assert count("connector") == 6_295_552 and count("mining") == 6_963_456
    assert sum(count(role) for role in structure.roles if role.startswith("language.")) == 2_506_172_416
    assert count("vision.low") == 303_507_456


def test_positions_count_real_tokens_from_zero() -> None:
    model = small(GOLDEN / "full")
    given: list[torch.Tensor] = []
    model.model.model.register_forward_pre_hook(lambda *call: given.append(call[2]["position_ids"]), with_kwargs=True)
    short, long = (Record("r", (Turn("user", text),)) for text in ("hi", "Name two colors."))
    batch = collate([model.processor.encode(record) for record in (short, long)], pad_id=0, side="left")
    with torch.no_grad():
        model.model(batch)
    assert [row[mask].tolist() for row, mask in zip(given[0], batch.attention_mask, strict=True)] == [
        list(range(int(mask.sum()))) for mask in batch.attention_mask
    ]
    assert given[0].min() == 0


def test_a_step_can_be_rehearsed_on_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = small(GOLDEN / "full")
    batch = collate([real.processor.encode(QUESTION)], pad_id=0)
    with FakeTensorMode() as mode:
        towers = {part: tower.build(real.tower_configs[part], BuildContext()) for part, tower in real.towers.items()}
        model: Any = real.architecture.build(real.config, towers, real.outputs, BuildContext()).model
        fake = Batch(
            *(mode.from_tensor(each) for each in (batch.input_ids, batch.attention_mask)),
            *(mode.from_tensor(each) for each in (batch.image_token_mask, batch.labels)),
            pixels={part: mode.from_tensor(pixels) for part, pixels in batch.pixels.items()},
        )
        logits = model.logits(model(fake))
        logits.sum().backward()
    assert logits.shape == (*batch.input_ids.shape, 640)
    assert model.model.mm_projector[0].weight.grad is not None


def test_features_that_were_seen_before_save_looking_again() -> None:
    model = published()
    batch = collate([model.processor.encode(QUESTION)], pad_id=0)
    with torch.no_grad():
        features = model.model.encode_images(batch.pixels)
        wanted = model.model(batch)
        batch.pixels = {}
        assert torch.equal(model.model(batch, features), wanted)


def test_it_computes_in_bf16_around_trained_fp32_modules() -> None:
    model = published()
    batch = collate([model.processor.encode(QUESTION)], pad_id=0)
    with torch.no_grad():
        wanted = model.model.logits(model.model(batch))
    connector = model.model.model.mm_projector.state_dict()
    for parameter in model.model.parameters():
        parameter.data = parameter.data.bfloat16()
    for name, parameter in model.model.model.mm_projector.named_parameters():
        parameter.data = connector[name]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.model.logits(model.model(batch))
    logits.float().sum().backward()
    assert (logits - wanted).abs().mean() < 0.1


def test_gelu_is_the_exact_one_where_the_folder_says_gelu() -> None:
    act = small(GOLDEN / "full").model.model.layers[0].mlp.act_fn
    x = torch.linspace(-3, 3, 50)
    assert torch.equal(act(x), functional.gelu(x))


def test_the_card_is_read_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, graftwork_mgm, graftwork_hf_vision.clip, graftwork_convnext; assert not {'torch', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_towers_built_with_the_sites_implementation_use_it() -> None:
    clip = Clip(ClipSettings())
    module = clip.build(clip.configuration(TOWER_FOLDERS["low"]), BuildContext(attn_implementation="sdpa"))
    assert module.vision_model.config._attn_implementation == "sdpa"
