"""The vision tower `timm`: any image encoder of timm that gives its intermediate states, from a folder as the hub has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.contracts import (
    BuildContext,
    PixelSettings,
    Requires,
    TowerOutput,
    VisionTower,
    hookimpl,
    setting,
)
from graftwork.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""As timm calls the filters by which images are scaled, and Pillow numbers them."""
EVERY = "every"


@dataclass(frozen=True)
class TimmSettings:
    """Which of the encoder's states are the output, and how large images are."""

    select_layer: int | None = setting(
        None,
        "The intermediate state to use, such as -2; by default the encoder's output, and of one that goes coarser by stages the last "
        "state of each resolution",
    )
    image_size: int | None = setting(
        None, "The side of the images in pixels; by default what the folder says", minimum=1
    )


class Timm(VisionTower[TimmSettings]):
    """Any image encoder of timm: a map of its patches, or a map for each of its resolutions"""

    name = "timm"
    Settings = TimmSettings
    requires = Requires(
        ("timm>=1.0.9,<2", "torchvision"),
        install='"timm>=1.0.9,<2" torchvision, the latter from the index that your torch is from',
        module="timm",
        advice="install the torchvision of the index that your torch is from, such as "
        "pip install torchvision --index-url https://download.pytorch.org/whl/cpu",
    )

    def __init__(self, settings: TimmSettings) -> None:
        super().__init__(settings)
        self.built: frozenset[str] = frozenset()
        """The names of the tensors of what was built last."""
        self.classifier: tuple[str, ...] = ()

    def configuration(self, folder: Path | None) -> Mapping[str, Any]:
        """The model's name in timm and what it is made with, its pixels, and the states that are selected."""
        whole = super().configuration(folder)
        if not (name := whole.get("architecture")):
            raise WeightsError(
                f"the config.json in '{folder}' names no architecture of timm; name a folder of timm, or use 'hf-vision'"
            )
        said = whole.get("pretrained_cfg") or {}
        if missing := [key for key in ("input_size", "mean", "std") if key not in said]:
            raise WeightsError(
                f"the pretrained_cfg in '{folder}' lacks {' and '.join(missing)}, so it is not known how images become pixels; fetch the "
                "folder again"
            )
        classifier = said.get("classifier") or ()
        config = {
            "architecture": name,
            "model_args": whole.get("model_args") or {},
            "pretrained_cfg": {
                "input_size": [3, *[self.settings.image_size or said["input_size"][-1]] * 2],
                "mean": list(said["mean"]),
                "std": list(said["std"]),
                "interpolation": said.get("interpolation", "bicubic"),
                "classifier": [classifier] if isinstance(classifier, str) else list(classifier),
            },
            "select_layer": whole.get("select_layer")
            if self.settings.select_layer is None
            else self.settings.select_layer,
        }
        return {**config, "states": states_of(json.dumps(config))}

    def describe(self, config: Mapping[str, Any], size: int | None = None) -> TowerOutput:
        """The maps that the encoder computes on tensors without content; WeightsError where it takes no images of that size."""
        said = config["pretrained_cfg"]
        size = size or said["input_size"][-1]
        shapes = shapes_of(json.dumps(config), size)
        filtering = FILTERS.get(said["interpolation"], FILTERS["bicubic"])
        pixels = PixelSettings(size, tuple(said["mean"]), tuple(said["std"]), filtering)
        return TowerOutput(tuple(each[0] for each in shapes), tuple((each[1], each[2]) for each in shapes), pixels)

    def build(self, config: Mapping[str, Any], context: BuildContext) -> nn.Module:
        """A module with timm's own, without its classifier, at `model`; its attention is timm's."""
        tower: nn.Module = tower_of(config)
        self.built = frozenset(tower.state_dict())
        self.classifier = tuple(f"{name}." for name in config["pretrained_cfg"]["classifier"])
        return tower

    def module_name(self, name: str) -> str | None:
        """From timm's own names, once it was built."""
        found = f"model.{name.removeprefix('model.')}"
        return found if found in self.built else None

    def unused(self, name: str) -> str:
        """The classifier."""
        return "the classifier of the encoder" if self.classifier and name.startswith(self.classifier) else ""


def tower_of(config: Mapping[str, Any]) -> Any:
    """The encoder as a tower; its `states` are those that it gives: None for its output, and `EVERY` for all."""
    import timm
    import torch

    states = config["states"]

    class TimmTower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            made_with = {**sizing(config["architecture"]), **config["model_args"]}
            self.model = timm.create_model(config["architecture"], pretrained=False, num_classes=0, **made_with)

        def forward(self, pixels: Tensor) -> list[Tensor]:
            maps: list[Tensor] = self.model.forward_intermediates(
                pixels.to(next(self.model.parameters()).dtype),
                indices=1 if states is None else None if states == EVERY else states,
                norm=states is None,
                stop_early=states not in (None, EVERY),
                intermediates_only=True,
            )
            return maps

    return TimmTower()


@lru_cache(256)
def sizing(architecture: str) -> dict[str, bool]:
    """What an encoder is made with so that it takes images of other sizes, where it can."""
    import timm

    try:
        with without_content():
            timm.create_model(architecture, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError:
        return {}
    return {"dynamic_img_size": True}


def without_content() -> Any:
    """Where tensors have a size and no content."""
    import torch

    return torch.device("meta")


def run(config: Mapping[str, Any], size: int) -> list[Any]:
    """The maps of two images without content; WeightsError where the encoder gives none."""
    import torch

    try:
        with without_content(), torch.no_grad():
            maps: list[Any] = tower_of(config).eval()(torch.empty(2, 3, size, size))
            return maps
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
        raise WeightsError(
            f"timm's '{config['architecture']}' gives no maps of a square image of {size} pixels ({reason}); name another encoder or "
            "another size"
        ) from None


@lru_cache(64)
def shapes_of(config: str, size: int) -> tuple[tuple[int, int, int], ...]:
    """Width, rows and columns of each map."""
    return tuple((each.shape[1], each.shape[2], each.shape[3]) for each in run(json.loads(config), size))


@lru_cache(64)
def states_of(config: str) -> list[int] | None:
    """The intermediate states to take: that of a layer, or of each resolution the last where there are several; None for the output."""
    table = json.loads(config)
    size, layer = table["pretrained_cfg"]["input_size"][-1], table["select_layer"]
    sides = [each.shape[-1] for each in run({**table, "states": EVERY}, size)]
    if layer is not None:
        if not -len(sides) <= layer < len(sides):
            raise WeightsError(f"select_layer is {layer}, and the encoder gives {len(sides)} states; name one of them")
        return [layer % len(sides)]
    last = {side: index for index, side in enumerate(sides)}
    return [last[side] for side in sorted(last, reverse=True)] if len(last) > 1 else None


@hookimpl
def vision_towers() -> list[type[VisionTower[Any]]]:
    """The tower of this plugin."""
    return [Timm]
