"""Folders of image encoders as transformers writes them, with random weights of a few thousand numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
PLAIN: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "image_size": 64}
WINDOWS: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [1, 2, 1],
    "num_heads": [1, 2, 2],
    "window_size": 4,
    "image_size": 64,
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip": ("SiglipVisionConfig", PLAIN),
    "clip": ("CLIPVisionConfig", PLAIN),
    "dinov2": ("Dinov2Config", PLAIN),
    "dinov2-registers": ("Dinov2WithRegistersConfig", PLAIN),
    "dinov3-vit": ("DINOv3ViTConfig", {**PLAIN, "num_register_tokens": 4}),
    "dinov3-convnext": ("DINOv3ConvNextConfig", STAGES),
    "convnext": ("ConvNextConfig", STAGES),
    "convnextv2": ("ConvNextV2Config", STAGES),
    "swin": ("SwinConfig", WINDOWS),
    "swinv2": ("Swinv2Config", WINDOWS),
    "vit": ("ViTConfig", PLAIN),
    "deit": ("DeiTConfig", PLAIN),
    "beit": ("BeitConfig", {**PLAIN, "use_relative_position_bias": True}),
    "data2vec": ("Data2VecVisionConfig", PLAIN),
    "ijepa": ("IJepaConfig", PLAIN),
    "mlcd": ("MLCDVisionConfig", PLAIN),
    "aimv2": ("Aimv2VisionConfig", PLAIN),
    "internvl": ("InternVLVisionConfig", {**PLAIN, "image_size": [32, 32], "patch_size": [8, 8]}),
    "vitdet": ("VitDetConfig", {**PLAIN, "pretrain_image_size": 32}),
    "resnet": ("ResNetConfig", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "embedding_size": 8}),
    "regnet": (
        "RegNetConfig",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "embedding_size": 8, "groups_width": 8},
    ),
    "hiera": ("HieraConfig", {"embed_dim": 8, "image_size": [64, 64], "depths": [1] * 4, "num_heads": [1, 1, 2, 2]}),
    "focalnet": ("FocalNetConfig", {"embed_dim": 8, "depths": [1] * 4, "image_size": 64}),
    "segformer": (
        "SegformerConfig",
        {
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1] * 4,
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 8,
        },
    ),
    "poolformer": ("PoolFormerConfig", {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4}),
}
"""By a name of ours: transformers' class of its configuration, and what is small in it."""


def write(name: str, folder: Path) -> Any:
    """Write an encoder's folder, always with the same weights; returns transformers' model, in evaluation mode."""
    import torch
    import transformers

    kind, sizes = ENCODERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(getattr(transformers, kind)(**sizes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    size = sizes.get("image_size", 64)
    write_pixels(folder, size={"height": 32, "width": 32} if size in (32, [32, 32]) else 64)
    return model


def write_pixels(folder: Path, **changes: Any) -> Path:
    """Write a preprocessor_config.json; returns the folder."""
    said = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_resize": True, "size": 32, "resample": 2, **changes}
    said = {key: value for key, value in said.items() if value is not None}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder
