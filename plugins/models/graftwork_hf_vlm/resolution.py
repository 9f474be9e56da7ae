"""How large images get: the settings of a run, as transformers' image processors are told them."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import numpy
from PIL import Image as PILImage

from graftwork.errors import CoordinatesRefused, PlanRefused, WeightsError
from graftwork.weights import read_json
from graftwork_hf_vlm import HfVlmSettings
from graftwork_hf_vlm.loading import load_images

PROCESSOR, IMAGES = "processor_config.json", "preprocessor_config.json"
PINPOINTS = "image_grid_pinpoints"
"""The sizes in tiles that an image may get; known to the model's configuration too."""
TILE_COUNTS = {"max_patches": "crop_to_patches", "pan_and_scan_max_num_crops": "do_pan_and_scan"}
"""What image processors call the most tiles of an image, and what has to be on for it to count."""
LARGEST_TRIED = 4096
"""The edge in pixels of the largest blank image on which a setting is tried, so that a huge one costs no minutes."""
CUTS = ("do_center_crop", "do_pad", "do_image_splitting", PINPOINTS, *TILE_COUNTS.values())
"""What makes of an image something else than the whole of it."""
EDGES = ("shortest_edge", "longest_edge")


def wanted_of(settings: HfVlmSettings) -> dict[str, int]:
    """The settings that say how large images get, as far as they are set."""
    named = {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels, "max_tiles": settings.max_tiles}
    return {name: value for name, value in named.items() if value is not None}


def told(processor: Any, settings: HfVlmSettings, config: Any) -> dict[str, Any]:
    """What an image processor's file has to say so that it follows the settings; PlanRefused where it cannot follow one.

    `processor` is transformers' whole processor, as its folder has it.
    """
    if not (wanted := wanted_of(settings)):
        return {}
    images, fixed = processor.image_processor, call_settings(processor)
    said = {**images.to_dict(), **fixed}
    ways: dict[str, dict[str, Any]] = {**pixels_told(images, said, wanted), **tiles_told(said, wanted, config)}
    ways = {name: way for name, way in ways.items() if not fixed.keys() & way.keys()}
    if lost := [name for name in wanted if name not in ways]:
        can = " and ".join(sorted(ways)) or "nothing"
        raise PlanRefused(
            f"{type(images).__name__}, the image processor of this model, cannot follow {' and '.join(lost)}: of the size of images "
            f"it can change {can}; remove {'it' if len(lost) == 1 else 'them'} from [model]"
        )
    changes: dict[str, Any] = {}
    for name in wanted:
        changes |= ways[name]
    return changes


def pixels_told(images: Any, said: Mapping[str, Any], wanted: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """What says how many pixels an image has at least and at most; the setting to what a file says for it."""
    size = dict(said.get("size") or {})
    if "max_soft_tokens" in said:
        token = (said["patch_size"] * said["pooling_kernel_size"]) ** 2
        return {"max_pixels": {"max_soft_tokens": wanted.get("max_pixels", 0) // token}}
    if "merge_size" in said and size.keys() >= {*EDGES}:
        # Image processors of patches that are merged count pixels under these names, some those of each repeated frame.
        frames = said["temporal_patch_size"] if "temporal_factor" in inspect.signature(images.resize).parameters else 1
        bounds = [
            wanted[name] * frames if name in wanted else size[edge]
            for name, edge in zip(("min_pixels", "max_pixels"), EDGES, strict=True)
        ]
        if bounds[0] > bounds[1]:
            raise PlanRefused(
                f"min_pixels is {bounds[0] // frames} and max_pixels {bounds[1] // frames}, where the run or else the model's folder sets "
                "them; set both, the smaller one first"
            )
        edges = {"size": dict(zip(EDGES, bounds, strict=True))}
        old = {"min_pixels": bounds[0], "max_pixels": bounds[1]}
        known = {name: old[name] for name in old if name in images.valid_kwargs.__annotations__}
        return {"min_pixels": edges | known, "max_pixels": edges | known}
    if size.keys() == {"longest_edge"} and "max_image_size" not in said:
        patch = said.get("patch_size") or 1  # edges are rounded up to it
        patch = patch if isinstance(patch, int) else max(dict(patch).values())
        return {"max_pixels": {"size": {"longest_edge": isqrt(wanted.get("max_pixels", 0)) // patch * patch}}}
    return {}


def tiles_told(said: Mapping[str, Any], wanted: Mapping[str, int], config: Any) -> dict[str, dict[str, Any]]:
    """What says how many tiles an image has at most, besides the whole of it in one."""
    most = wanted.get("max_tiles", 1)
    if said.get(PINPOINTS):
        return {"max_tiles": {PINPOINTS: getattr(config, PINPOINTS, None)}}
    if said.get("do_image_splitting") and "max_image_size" in said:
        return {"max_tiles": {"size": {"longest_edge": isqrt(most) * said["max_image_size"]["longest_edge"]}}}
    for count, switch in TILE_COUNTS.items():
        if said.get(switch) and said.get(count):
            return {"max_tiles": {count: most}}
    return {}


def fitting(pinpoints: list[list[int]], tile: int, max_tiles: int) -> list[list[int]]:
    """The sizes of at most so many tiles; WeightsError where there are none."""
    found = [size for size in pinpoints if size[0] // tile * (size[1] // tile) <= max_tiles]
    if not found:
        fewest = min(height // tile * (width // tile) for height, width in pinpoints)
        raise WeightsError(
            f"max_tiles is {max_tiles}, and this model cuts an image into {fewest} tiles at least; set no less"
        )
    return found


def call_settings(processor: Any) -> dict[str, Any]:
    """What transformers' processor tells its image processor at each call, whatever the latter's file says."""
    found: dict[str, Any] = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs)[
        "images_kwargs"
    ]
    return found


def configure(processor: Any, folder: Path, changes: Mapping[str, Any], settings: HfVlmSettings) -> None:
    """Give the processor the image processor that its file and the changes make; PlanRefused unless blank images show that it follows the settings."""
    try:
        processor.image_processor = images = load_images(folder, **changes)
    except ValueError as error:
        raise PlanRefused(
            f"{' and '.join(wanted_of(settings))} come to {changes} here, which the image processor of this model refuses ({error}); set "
            "another value"
        ) from None
    for name, value in wanted_of(settings).items():
        width = height = min(isqrt(value) * 5 // 4 + 1, LARGEST_TRIED)
        least, most = 0, float(value)
        if name == "min_pixels":
            width = height = max(isqrt(value) // 2, 1)
            least, most = value, math.inf
        elif name == "max_tiles":
            height = tile_of(images.to_dict())
            width, most = min(value + 2, 32) * height, (value + 1) * height**2
        if not least <= (found := pixels_of(processor, width, height)) <= most:
            raise PlanRefused(
                f"model.{name} = {value} cannot be followed: {type(images).__name__} makes {found} pixels of an image of {width} x {height} "
                "then; set another value, or remove it"
            )


def tile_of(said: Mapping[str, Any]) -> int:
    """The edge of the tiles that an image processor cuts."""
    return int(max(dict(said.get("max_image_size") or said["size"]).values()))


def pixels_of(processor: Any, width: int, height: int) -> int:
    """How many pixels the model gets of an image, in all of its tiles."""
    made = blank(processor, (width, height))
    frames = getattr(processor.image_processor, "temporal_patch_size", 1)
    return int(numpy.asarray(made["pixel_values"]).size) // (3 * frames)


def resized(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """The width and height to which an image of this size is resized as a whole; CoordinatesRefused where it is none such."""
    images = processor.image_processor
    said = {**images.to_dict(), **call_settings(processor)}
    made = blank(processor, size)
    if "image_grid_thw" in made and isinstance(patch := said.get("patch_size"), int):
        _, rows, columns = numpy.asarray(made["image_grid_thw"])[0].tolist()
        return columns * patch, rows * patch
    tiles, *_, height, width = (1, *numpy.asarray(made["pixel_values"]).shape)[-4:]
    bounds = said.get("size") or {}
    whole = tiles == 1 and (bounds.get("height"), bounds.get("width")) == (height, width)
    if whole and not any(map(said.get, CUTS)):
        return width, height
    raise CoordinatesRefused(
        f"{type(images).__name__}, the image processor of this model, crops images, pads them or cuts them into tiles, so a box or point in "
        'pixels has no place in what the model gets; write them as shares of the sides, and set coordinates = "relative"'
    )


def blank(processor: Any, size: tuple[int, int]) -> Any:
    """What the image processor makes of a blank image of this size."""
    images = processor.image_processor
    known = {
        name: value for name, value in call_settings(processor).items() if name in images.valid_kwargs.__annotations__
    }
    return images([[PILImage.new("RGB", size)]], **{**known, "return_tensors": "pt"})


def write_told(source: Path, changes: Mapping[str, Any], folder: Path) -> list[str]:
    """Write the files of `source` in which transformers reads an image processor, and a model's configuration, with the changes; their
    names."""
    own = read_json(source / PROCESSOR) if (source / PROCESSOR).is_file() else {}
    if "image_processor" in own:
        files = {PROCESSOR: {**own, "image_processor": {**own["image_processor"], **changes}}}
    else:
        files = {IMAGES: {**read_json(source / IMAGES), **changes}}
    if PINPOINTS in changes:
        files["config.json"] = {**read_json(source / "config.json"), PINPOINTS: changes[PINPOINTS]}
    for name, content in files.items():
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return [*files]
