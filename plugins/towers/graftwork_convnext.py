"""The vision tower `openclip-convnext`: the trunk of OpenCLIP's ConvNeXt (Liu et al. 2022, arXiv:2201.03545)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.contracts import (
    OF_TRANSFORMERS,
    BuildContext,
    NoSettings,
    PixelSettings,
    TowerOutput,
    VisionTower,
    hookimpl,
    refuse_quantized,
    refuse_unknown_settings,
)
from graftwork.errors import WeightsError
from graftwork.weights import read_json, shapes

if TYPE_CHECKING:
    from torch import Tensor, nn

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PUBLISHED: Mapping[str, dict[str, Any]] = {
    "convnext_base": {"hidden_sizes": [128, 256, 512, 1024], "depths": [3, 3, 27, 3], "patch_size": 4},
    "convnext_large": {"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3], "patch_size": 4},
    "convnext_xxlarge": {"hidden_sizes": [384, 768, 1536, 3072], "depths": [3, 4, 30, 3], "patch_size": 4},
}
"""The sizes of timm's models, for folders without weights."""
OWN_SETTINGS = (
    *("hidden_sizes", "depths", "patch_size", "norm_eps", "drop_path_rate", "image_size", "image_mean", "image_std"),
    *("architecture", "num_classes", "num_features", "global_pool", "num_stages", "stage_names"),
    "pretrained_cfg",
)
"""What a config.json says of a ConvNeXt that is followed, or that is of its head."""
OF_VISION = (
    *("timm_model_name", "image_size", "timm_drop_path"),
    *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop"),
)
"""The same of OpenCLIP's `vision_cfg`: the trunk, and the head that is not built."""
PREPROCESSING = {"interpolation": "bicubic", "resize_mode": "shortest", "mode": "RGB", "fill_color": 0}
"""How images become pixels here, which is what OpenCLIP does by default."""
NAMES = (
    ("stem.0.", "embeddings.patch_embeddings."),
    ("stem.1.", "embeddings.layernorm."),
    ("stages.{}.downsample.", "stages.{}.downsampling_layer."),
    ("stages.{}.blocks.{}.conv_dw.", "stages.{}.layers.{}.dwconv."),
    ("stages.{}.blocks.{}.norm.", "stages.{}.layers.{}.layernorm."),
    ("stages.{}.blocks.{}.mlp.fc", "stages.{}.layers.{}.pwconv"),
    ("stages.{}.blocks.{}.gamma", "stages.{}.layers.{}.layer_scale_parameter"),
)
"""How names begin in timm, and in transformers."""
HEAD = ("visual.trunk.head.", "visual.trunk.norm_pre.", "visual.head.", "head.", "norm_pre.")
OTHER_HALF = (
    *("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale"),
    *("logit_bias", "attn_mask", "text."),
)
"""How names begin in an OpenCLIP folder of what comes after the stages, and of what reads text."""
SWAPPED = tuple((new, old) for old, new in NAMES)


class OpenClipConvNext(VisionTower[NoSettings]):
    """OpenCLIP's ConvNeXt trunk: the maps of its four stages, finest first"""

    name = "openclip-convnext"

    def configuration(self, folder: Path | None) -> Mapping[str, Any]:
        """The sizes, from a config.json that has them, else from the tensors, else from the model's name in timm.

        The folder's own name never matters. Reads the folders of open_clip and those that a model was written to.
        """
        if folder is None:
            return super().configuration(folder)
        explicit, clip = (_json_if_there(folder / name) for name in ("config.json", "open_clip_config.json"))
        vision = clip.get("model_cfg", {}).get("vision_cfg", {})
        self._refuse_unknown(folder, explicit, clip)
        sizes: Mapping[str, Any] | None = explicit
        if "hidden_sizes" not in explicit:
            sizes = sizes_of(shapes(folder)) or PUBLISHED.get(vision.get("timm_model_name"))
        if not sizes:
            raise WeightsError(
                f"'{folder}' does not say what its ConvNeXt is: it has neither a config.json with hidden_sizes, nor tensors "
                "named visual.trunk.*, nor an open_clip_config.json with a known timm_model_name; name another folder"
            )
        pixels = clip.get("preprocess_cfg") or explicit.get("pretrained_cfg") or {}
        widths = list(sizes["hidden_sizes"])
        return {
            "hidden_sizes": widths,
            "depths": list(sizes["depths"]),
            "patch_size": sizes["patch_size"],
            # timm's convnext_xxlarge alone has another epsilon, which no file says.
            "norm_eps": explicit.get("norm_eps", 1e-5 if widths[0] == 384 else 1e-6),
            "drop_path_rate": explicit.get("drop_path_rate", vision.get("timm_drop_path") or 0.0),
            "image_size": explicit.get("image_size", vision.get("image_size", 256)),
            "image_mean": explicit.get("image_mean", pixels.get("mean", list(MEAN))),
            "image_std": explicit.get("image_std", pixels.get("std", list(STD))),
        }

    def _refuse_unknown(self, folder: Path, explicit: Mapping[str, Any], clip: Mapping[str, Any]) -> None:
        """WeightsError for a setting in one of a folder's files that is not followed."""

        def of_transformers() -> Mapping[str, Any]:
            from transformers import ConvNextConfig

            defaults: Mapping[str, Any] = ConvNextConfig().to_dict()
            return defaults

        refuse_quantized(folder / "config.json", explicit)
        refuse_unknown_settings(
            folder / "config.json", explicit, {*OWN_SETTINGS, *OF_TRANSFORMERS}, self.name, of_transformers
        )
        model = clip.get("model_cfg", {})
        for table, understood in (
            (clip, ("model_cfg", "preprocess_cfg")),
            (model, ("embed_dim", "vision_cfg", "text_cfg", "init_logit_scale", "init_logit_bias", "custom_text")),
            (model.get("vision_cfg", {}), OF_VISION),
            (clip.get("preprocess_cfg", {}), ("mean", "std", "size")),
        ):
            refuse_unknown_settings(
                folder / "open_clip_config.json", table, understood, self.name, lambda: PREPROCESSING
            )

    def example(self, folder: Path) -> None:
        """Four stages of one or two blocks for images of 64 pixels."""
        config = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "patch_size": 4, "image_size": 64}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    def describe(self, config: Mapping[str, Any], size: int | None = None) -> TowerOutput:
        """A map for each stage, each half as fine as the one before; the size must be a multiple of the coarsest step."""
        size = size or config["image_size"]
        steps = [config["patch_size"] * 2**stage for stage in range(len(config["depths"]))]
        if size % steps[-1]:
            raise WeightsError(f"this ConvNeXt takes images whose side is a multiple of {steps[-1]} pixels, not {size}")
        pixels = PixelSettings(size, tuple(config["image_mean"]), tuple(config["image_std"]))
        return TowerOutput(tuple(config["hidden_sizes"]), tuple((size // step, size // step) for step in steps), pixels)

    def build(self, config: Mapping[str, Any], context: BuildContext) -> nn.Module:
        """transformers' embeddings and stages of ConvNeXt, without the classifier's normalisation."""
        import torch
        from transformers import ConvNextConfig, ConvNextPreTrainedModel
        from transformers.models.convnext.modeling_convnext import ConvNextEmbeddings, ConvNextStage

        widths, depths = config["hidden_sizes"], config["depths"]
        # transformers' own encoder reads its rates of stochastic depth out of a tensor, which fake tensors do not allow.
        steps = max(sum(depths) - 1, 1)
        rates = [config["drop_path_rate"] * block / steps for block in range(sum(depths))]

        class ConvNextTower(ConvNextPreTrainedModel):  # type: ignore[misc]  # transformers has no types
            def __init__(self) -> None:
                sizes = {key: config[key] for key in ("hidden_sizes", "depths", "patch_size", "image_size")}
                super().__init__(ConvNextConfig(num_stages=len(depths), **sizes))
                self.embeddings = ConvNextEmbeddings(self.config)
                self.stages = torch.nn.ModuleList()
                for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
                    before, stride = (widths[i - 1], 2) if i else (width, 1)
                    own = rates[sum(depths[:i]) :][:depth]
                    stage = ConvNextStage(self.config, before, width, stride=stride, depth=depth, drop_path_rates=own)
                    self.stages.append(stage)
                for module in self.modules():
                    if isinstance(module, torch.nn.LayerNorm):
                        module.eps = config["norm_eps"]  # transformers fixes it at 1e-6.
                self.post_init()

            def forward(self, pixels: Tensor) -> list[Tensor]:
                maps = [self.embeddings(pixels.to(self.embeddings.patch_embeddings.weight.dtype))]
                for stage in self.stages:
                    maps.append(stage(maps[-1]))
                return maps[1:]

        return ConvNextTower()

    def module_name(self, name: str) -> str | None:
        """From the names of open_clip folders, of timm's trunk inside a larger model, and of the module."""
        name = name.removeprefix("visual.trunk.").removeprefix("vision_")
        return rename(name, NAMES) or (name if rename(name, SWAPPED) else None)

    def unused(self, name: str) -> str:
        """The head of the trunk, and the other half of CLIP."""
        if name.startswith(HEAD):
            return "the head of OpenCLIP's image encoder"
        return "the text encoder of OpenCLIP" if name.startswith(OTHER_HALF) else ""

    def published_name(self, name: str) -> str:
        """timm's name in an MGM folder: `vision_stem.*`, `vision_stages.*`."""
        return f"vision_{rename(name, SWAPPED)}"


def _json_if_there(file: Path) -> dict[str, Any]:
    """A JSON file's content; empty when there is no such file."""
    return read_json(file) if file.is_file() else {}


def rename(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    """The name with its beginning replaced by the first pair that matches, where `{}` is a number; None if none does."""
    for old, new in pairs:
        if found := re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), name):
            return new.format(*found.groups()) + name[found.end() :]
    return None


def sizes_of(found: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Widths, depths and patch size, from the names and shapes of open_clip's tensors; None where there is no trunk."""
    trunk = {name.removeprefix("visual.trunk.").removeprefix("vision_"): shape for name, shape in found.items()}
    widths: list[int] = []
    depths: list[int] = []
    while (shape := trunk.get(f"stages.{len(depths)}.blocks.0.conv_dw.weight")) is not None:
        widths.append(shape[0])
        blocks = re.compile(rf"stages\.{len(depths)}\.blocks\.\d+\.conv_dw\.weight")
        depths.append(sum(blocks.fullmatch(name) is not None for name in trunk))
    if not depths or "stem.0.weight" not in trunk:
        return None
    return {"hidden_sizes": widths, "depths": depths, "patch_size": trunk["stem.0.weight"][-1]}


@hookimpl
def vision_towers() -> list[type[VisionTower[Any]]]:
    """The tower of this plugin."""
    return [OpenClipConvNext]
