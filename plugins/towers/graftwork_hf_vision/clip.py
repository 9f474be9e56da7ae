"""The vision tower `clip`: `hf-vision` on the image encoder of CLIP (Radford et al. 2021, arXiv:2103.00020), as MGM uses it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.contracts import (
    OF_TRANSFORMERS,
    TowerOutput,
    VisionTower,
    hookimpl,
    refuse_unknown_settings,
    setting,
)
from graftwork.errors import WeightsError
from graftwork.weights import read_json
from graftwork_hf_vision import ENCODER, HfVision
from graftwork_hf_vision.pixels import BICUBIC

DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 1.0,
}
"""What a CLIP configuration means where it is silent."""
OTHER_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
"""How names begin of what a whole CLIP has besides its image encoder."""
WITHOUT_EFFECT = frozenset(
    {
        *(
            "projection_dim",
            "logit_scale_init_value",
            "vision_config",
            "vision_config_dict",
            "text_config",
            "text_config_dict",
        ),
        *("tie_word_embeddings", "initializer_factor", "dropout"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    }
)
"""Keys that say nothing of the image encoder: of the other half, and of what joins them."""
OF_PIXELS = (
    *("image_mean", "image_std", "image_processor_type", "feature_extractor_type", "processor_class"),
    *("_valid_processor_keys", "data_format", "use_square_size"),
)
PREPROCESSING = {
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    "resample": BICUBIC,
    "rescale_factor": 1 / 255,
}
"""How images become pixels here, whatever a preprocessor_config.json says: bicubically, to numbers from 0 to 1."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipSettings:
    """Which of the encoder's states are the output."""

    select_layer: int = setting(
        -2, "The hidden state to use: -1 is the last layer's, -2 the one before it, 0 the input"
    )


class Clip(HfVision):
    """CLIP's image encoder: one map of patch features, without the class token"""

    name = "clip"
    Settings = ClipSettings

    def configuration(self, folder: Path | None) -> Mapping[str, Any]:
        """The encoder's sizes and the pixels' mean and deviation, from a CLIP or CLIP-vision folder."""
        whole = super(HfVision, self).configuration(folder)
        assert folder is not None
        if whole.get("model_type", "clip") not in ("clip", "clip_vision_model"):
            raise WeightsError(f"'{folder}' holds a '{whole['model_type']}', and 'clip' reads CLIP; name a CLIP folder")
        # As transformers reads it: the older of the two nested tables counts where there are both.
        half = whole.get("vision_config") or ({} if "vision_config" in whole else whole)
        vision = {**half, **(whole.get("vision_config_dict") or {})}
        known = {*DEFAULTS, *WITHOUT_EFFECT, *OF_TRANSFORMERS, "image_mean", "image_std"}
        for table in (whole, vision):
            refuse_unknown_settings(folder / "config.json", table, known, self.name)
        config = {key: vision.get(key, default) for key, default in DEFAULTS.items()}
        if not 0 <= self._depth(config) <= config["num_hidden_layers"]:
            raise WeightsError(
                f"select_layer is {self.settings.select_layer}, and the encoder in '{folder}' has "
                f"{config['num_hidden_layers']} layers; name one of them"
            )
        file = folder / "preprocessor_config.json"
        pixels = read_json(file) if file.is_file() else {}
        same = [key for key in ("size", "crop_size") if _sides(pixels.get(key)) <= {config["image_size"]}]
        refuse_unknown_settings(file, pixels, {*OF_PIXELS, *same}, self.name, lambda: PREPROCESSING)
        return {
            **config,
            "image_mean": pixels.get("image_mean", vision.get("image_mean", list(MEAN))),
            "image_std": pixels.get("image_std", vision.get("image_std", list(STD))),
        }

    def example(self, folder: Path) -> None:
        """An encoder of three layers for images of 32 pixels."""
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = {"model_type": "clip_vision_model", **sizes, "image_size": 32, "patch_size": 8}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    def describe(self, config: Mapping[str, Any], size: int | None = None) -> TowerOutput:
        """One map; only of images of the trained size, as upstream of MGM has it."""
        trained = config["image_size"]
        if size not in (None, trained):
            raise WeightsError(f"this CLIP takes images of {trained} pixels, not {size}; use another tower or size")
        return super().describe(config)

    def expanded(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The same as `hf-vision` writes it."""
        heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
        return {
            ENCODER: {"model_type": "clip_vision_model", **{key: config[key] for key in DEFAULTS}},
            **{key: config[key] for key in ("image_size", "image_mean", "image_std")},
            "resample": BICUBIC,
            "prefix": 1,
            "states": [self._depth(config)],
            "layers": "encoder.layers",
            "count": layers,
            "attention": {
                "heads": heads,
                "head_dim": config["hidden_size"] // heads,
                "dropout": config["attention_dropout"],
                "own": "",
                "why": "",
            },
        }

    def module_name(self, name: str) -> str | None:
        """From the names of CLIP and CLIP-vision folders, old and new, and of towers inside a larger model."""
        name = name.removeprefix("vision_tower.").removeprefix("vision_model.")
        known = name.startswith(("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm."))
        return f"vision_model.{name}" if known else None

    def unused(self, name: str) -> str:
        """The other half of CLIP."""
        return "the text encoder of CLIP" if name.startswith(OTHER_HALF) else ""

    def _depth(self, config: Mapping[str, Any]) -> int:
        """How many layers the selected state has passed."""
        layer: int = self.settings.select_layer
        return layer if layer >= 0 else config["num_hidden_layers"] + 1 + layer


def _sides(size: Any) -> set[int]:
    """The lengths in a size, which is a number or a table of some."""
    return set(size.values()) if isinstance(size, Mapping) else {size} - {None}


@hookimpl
def vision_towers() -> list[type[VisionTower[Any]]]:
    """The tower of this plugin."""
    return [Clip]
