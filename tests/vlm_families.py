"""Families of vision-language models as tiny folders: what distinguishes each of them from the others."""

from __future__ import annotations

from pathlib import Path

from vlm_folders import CHATML, PARTS, Family, write_family
from vlm_grids import GRIDS
from vlm_newer import NEWER
from vlm_tiles import TILES

__all__ = ["CHATML", "FAMILIES", "PARTS", "UNREAD", "write"]

FAMILIES: dict[str, Family] = {**TILES, **GRIDS, **NEWER}
LAST = ("model.vision_tower.encoder.layers.1",)
UNREAD: dict[str, tuple[str, ...]] = {
    "llava": LAST,
    "llava_next": LAST,
    "llava_next_video": LAST,
    "granite4_vision": ("*.attention.attention", *(f"model.spatial_projectors.{number}" for number in (1, 2, 3))),
    "gemma3": ("connector",),
    "ovis2": ("connector",),
    "granite_docling": ("model.vision_model.connector.fine",),
    "mistral_large4": ("*.indexer",),
    "video_llava": ("model.image_tower.encoder.layers.1", "model.video_tower"),
}
"""What LoRA on vision and connector cannot teach: layers after the one that is read, what chooses tokens, what is added to layers that the language
model lacks, attention to one token, projectors for tiles that small images have not, a video's encoder, and
connectors without a linear layer."""


def write(name: str, folder: Path) -> Path:
    """Write a family's folder (see `write_family`)."""
    return write_family(FAMILIES[name], folder)
