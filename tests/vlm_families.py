"""Families of vision-language models as tiny folders: what distinguishes each of them from the others."""

from __future__ import annotations

from pathlib import Path

from vlm_folders import CHATML, PARTS, Family, write_family
from vlm_grids import GRIDS
from vlm_newer import NEWER
from vlm_tiles import TILES

__all__ = ["CHATML", "FAMILIES", "PARTS", "write"]

FAMILIES: dict[str, Family] = {**TILES, **GRIDS, **NEWER}


def write(name: str, folder: Path) -> Path:
    """Write a family's folder (see `write_family`)."""
    return write_family(FAMILIES[name], folder)
