"""The vision tower `hf-vision`: any image encoder that transformers builds, its patch features or its pyramid of stages as maps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graftwork.contracts import (
    OF_TRANSFORMERS,
    AttentionSite,
    BuildContext,
    PixelSettings,
    TowerOutput,
    VisionTower,
    hookimpl,
    setting,
)
from graftwork.errors import WeightsError
from graftwork_hf_vision.pixels import pixels_in

if TYPE_CHECKING:
    from torch import nn

    from graftwork_hf_vision.encoder import Names

ENCODER = "encoder"
"""Where a configuration of this tower holds transformers' own."""


@dataclass(frozen=True)
class HfVisionSettings:
    """Which of the encoder's states are the output, and how large images are."""

    select_layer: int | None = setting(
        None,
        "The hidden state to use, such as -2 for that before the last layer; by default the encoder's output, and of an encoder "
        "that goes coarser by stages the last state of each resolution",
    )
    image_size: int | None = setting(
        None, "The side of the images in pixels; by default what the folder says", minimum=1
    )


class HfVision(VisionTower[Any]):
    """Any image encoder of transformers: a map of its patches without class tokens, or a map for each of its resolutions"""

    name = "hf-vision"
    Settings: ClassVar[type] = HfVisionSettings

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.names: Names | None = None
        """Of the tensors of what was built last."""

    def configuration(self, folder: Path | None) -> Mapping[str, Any]:
        """transformers' configuration of the encoder, its pixels, and what was seen of an encoder of this kind without weights.

        Reads a folder of an image encoder, one of a larger model with a `vision_config`, and one that a model was written to.
        """
        from graftwork_hf_vision.encoder import observed

        whole, layer = super().configuration(folder), self.settings.select_layer
        assert folder is not None
        if ENCODER in whole:
            encoder, pixels = (
                whole[ENCODER],
                {key: whole[key] for key in ("image_size", "image_mean", "image_std", "resample")},
            )
            layer = whole["select_layer"] if layer is None else layer
        else:
            encoder = encoder_in(folder, whole)
            pixels = pixels_in(folder, encoder)
        if (size := self.settings.image_size or pixels["image_size"]) is None:
            raise WeightsError(f"'{folder}' does not say how large images are; set image_size")
        return {
            ENCODER: encoder,
            **pixels,
            "image_size": size,
            "select_layer": layer,
            **observed(encoder, size, layer),
        }

    def example(self, folder: Path) -> None:
        """A SigLIP of three layers for images of 32 pixels."""
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        files = {
            "config.json": {"model_type": "siglip_vision_model", **sizes, "image_size": 32, "patch_size": 8},
            "preprocessor_config.json": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 32},
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")

    def expanded(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """A configuration as this tower reads it; for a name on it that keeps another."""
        return config

    def describe(self, config: Mapping[str, Any], size: int | None = None) -> TowerOutput:
        """The maps that the encoder computes on tensors without content; WeightsError where it takes no images of that size."""
        from graftwork_hf_vision.encoder import shapes_of_maps

        config = self.expanded(config)
        size = size or config["image_size"]
        shapes = shapes_of_maps(json.dumps(config), size)
        pixels = PixelSettings(size, tuple(config["image_mean"]), tuple(config["image_std"]), config["resample"])
        return TowerOutput(
            tuple(width for width, _, _ in shapes), tuple((rows, cols) for _, rows, cols in shapes), pixels
        )

    def sites(self, config: Mapping[str, Any]) -> Sequence[AttentionSite]:
        """Self-attention; transformers' own where it is more than that, or otherwise in each layer."""
        if (seen := self.expanded(config)["attention"]) is None:
            return []
        heads = seen["heads"]
        return [
            AttentionSite(
                "vision",
                seen["head_dim"],
                heads,
                heads,
                False,
                False,
                seen["dropout"],
                own=seen["own"],
                why_own=seen["why"],
            )
        ]

    def build(self, config: Mapping[str, Any], context: BuildContext) -> nn.Module:
        """A module with transformers' own at `vision_model`; layers that are not needed are not computed."""
        from graftwork_hf_vision.encoder import Names, Tower

        tower = Tower(self.expanded(config), context.attn_implementation)
        self.names = Names(tower.vision_model)
        return tower

    def module_name(self, name: str) -> str | None:
        """From the names of the encoder's own folder and of larger models around it, old and new, once it was built."""
        found = self.names.built(name) if self.names else None
        return f"vision_model.{found}" if found else None

    def unused(self, name: str) -> str:
        """What lies beside the encoder: the other half of a CLIP, or a head. None of it is, where nothing was built."""
        beside = self.names is not None and self.names.are_beside(name)
        return "what the folder holds besides its image encoder" if beside else ""


def encoder_in(folder: Path, whole: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' configuration of the image encoder in a folder, as plain JSON with all that it leaves to its defaults."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError) as error:
        own = " without code of its own, which is never run" * ("auto_map" in whole)
        raise WeightsError(
            f"transformers {transformers.__version__} cannot read the configuration of a '{whole.get('model_type')}' in '{folder}'{own} "
            f"({str(error).splitlines()[0][:120]}); install a transformers that knows it, or name another folder"
        ) from None
    table = json.loads(getattr(config, "vision_config", config).to_json_string(use_diff=False))
    return {key: value for key, value in table.items() if key == "model_type" or key not in OF_TRANSFORMERS}


@hookimpl
def vision_towers() -> list[type[VisionTower[Any]]]:
    """The tower of this plugin."""
    return [HfVision]
