"""How images become an encoder's pixels: what its folder says, without transformers' image processor and what that needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftwork.errors import WeightsError
from graftwork.weights import read_json

FILES = ("preprocessor_config.json", "processor_config.json")
BICUBIC = 3
"""As Pillow numbers its filters."""


def pixels_in(folder: Path, encoder: Mapping[str, Any]) -> dict[str, Any]:
    """`image_size`, None where nothing says it, `resample`, and `image_mean` and `image_std` of numbers from 0 to 1; WeightsError where the folder does not say them."""
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise WeightsError(
            f"'{folder}' has no preprocessor_config.json, so it is not known how images become this encoder's pixels; put the one "
            "that was published with it there"
        )
    held = read_json(file)
    said: Mapping[str, Any] = held.get("image_processor", held)
    normalises = said.get("do_normalize", True)
    if normalises and (missing := [key for key in ("image_mean", "image_std") if not said.get(key)]):
        raise WeightsError(
            f"'{file}' lacks {' and '.join(missing)}, so it is not known how pixels are normalised; write the values that this encoder "
            "was trained with there"
        )
    # Of numbers from 0 to 1, whatever range the encoder was trained on.
    scale = 255 * (said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0)
    mean, std = (said["image_mean"], said["image_std"]) if normalises else ([0.0] * 3, [1.0] * 3)
    crops = said.get("do_center_crop", "crop_size" in said) and side(said.get("crop_size"))
    resizes = said.get("do_resize", True) and side(said.get("size"))
    return {
        "image_size": crops or resizes or side(encoder.get("image_size")),
        "image_mean": [value / scale for value in mean],
        "image_std": [value / scale for value in std],
        "resample": said.get("resample", BICUBIC),
    }


def side(size: Any) -> int | None:
    """The side of the square that a size means, however it is written; None where it is none."""
    lengths = [*size.values()] if isinstance(size, Mapping) else size if isinstance(size, list) else [size]
    (length, *others) = [value for value in lengths if value is not None] or [None]
    return length if all(other == length for other in others) else None
