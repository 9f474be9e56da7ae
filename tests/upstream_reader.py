"""What MGM's own loader makes of a whole folder, step by step as docs/upstream-folders.md describes it: which file each tensor is
taken from, and what stops it. Own lines, without the engine's readers; transformers 4.38 is not installed with this project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from mgm_folders import Small
from safetensors.torch import load_file
from torch import Tensor

from graftwork.contracts import BuildContext, NoSettings
from graftwork_convnext import OpenClipConvNext
from graftwork_hf_vision.clip import Clip, ClipSettings
from graftwork_mgm import MgmGemma, MgmSettings

CLIP, CONVNEXT = "model.vision_tower.vision_tower.", "model.vision_tower_aux."
SHARDS_THAT_ARE_OPENED = ("vlm_uni", "vision_fpn", "vision_stages")
"""A shard is opened for towers and mining only if one of its names has such a word in it."""


class UpstreamError(Exception):
    """What upstream's loader ends with."""


def state_by_upstream(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the model that upstream's loader makes of a whole folder, by published names."""
    name, config = folder.name.lower(), json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "mgm" not in name or "2b" not in name or "8x7b" in name:
        raise UpstreamError(f"'{folder.name}' is opened as another class than MGM on Gemma")
    if config.get("mm_use_im_patch_token", True):
        raise UpstreamError("a token for patches is added, and the embeddings grow")
    if config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]:
        raise UpstreamError("hidden_size must be divisible by num_heads")
    low = tower(config, "mm_vision_tower", ("openai", "sharegpt4v"))
    high = tower(config, "mm_vision_tower_aux", ("openclip",))
    if not any(
        all(w in high.name for w in words) for words in (("convnext", "large", "d-320"), ("convnext", "base", "w-320"))
    ):
        raise UpstreamError(f"'OpenCLIPVisionTower' object has no attribute 'vision_config' of '{high.name}'")
    index = next((f for f in ("model.safetensors.index.json",) if (folder / f).is_file()), None)
    if index is None:
        raise UpstreamError("FileNotFoundError: pytorch_model.bin.index.json")
    shards: dict[str, str] = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
    everything = {n: tensor for file in sorted(set(shards.values())) for n, tensor in load_file(folder / file).items()}
    opened = {file for n, file in shards.items() if any(word in n for word in SHARDS_THAT_ARE_OPENED)}
    uni = {n: tensor for file in sorted(opened) for n, tensor in load_file(folder / file).items()}

    state = {n: tensor for n, tensor in everything.items() if not n.startswith((CLIP, CONVNEXT)) and "vlm_uni" not in n}
    state.pop("lm_head.weight", None)  # tied
    state |= {n: tensor for n, tensor in uni.items() if "vlm_uni" in n}
    clip = {CLIP + n: tensor for n, tensor in load_file(low / "model.safetensors").items()}
    if here := {n: tensor for n, tensor in uni.items() if n.startswith(CLIP)}:
        if missing := clip.keys() - here.keys():
            raise UpstreamError(f"Missing key(s) in state_dict: {min(missing)}")
        clip = here
    trunk = torch.load(high / "open_clip_pytorch_model.bin", weights_only=True)
    convnext = {
        f"{CONVNEXT}vision_{n.removeprefix('visual.trunk.')}": tensor
        for n, tensor in trunk.items()
        if n.startswith(("visual.trunk.stem.", "visual.trunk.stages."))
    }
    if config.get("optimize_vision_tower_aux"):
        convnext |= {n: tensor for n, tensor in uni.items() if n.startswith(CONVNEXT)}
    return {**state, **clip, **convnext}


def tower(config: dict[str, Any], key: str, words: tuple[str, ...]) -> Path:
    """The folder of a tower, by the key of config.json that names it."""
    if not config.get(key):
        raise UpstreamError("'NoneType' object has no attribute 'is_loaded'")
    place = Path(config[key])
    if not place.exists():
        raise UpstreamError(f"Not find vision tower: {place}")
    if not any(word in str(place).lower() for word in words):
        raise UpstreamError(f"Unknown vision tower: {place}")
    needed = (
        ("open_clip_config.json", "open_clip_pytorch_model.bin")
        if key.endswith("aux")
        else ("preprocessor_config.json",)
    )
    for file in needed:
        if not (place / file).is_file():
            raise UpstreamError(f"FileNotFoundError: {place / file}")
    return place


def read_by_upstream(folder: Path) -> Small:
    """The model that upstream's loader makes of a whole folder, in fp32 and in evaluation mode."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    places = {"low": Path(config["mm_vision_tower"]), "high": Path(config.get("mm_vision_tower_aux") or ".")}
    state = state_by_upstream(folder)
    architecture = MgmGemma(MgmSettings())
    towers = {"low": Clip(ClipSettings()), "high": OpenClipConvNext(NoSettings())}
    sizes = {part: each.configuration(places[part]) for part, each in towers.items()}
    own = architecture.configuration(folder)
    outputs = architecture.describe_towers(own, {part: (each, sizes[part]) for part, each in towers.items()})
    modules = {part: each.build(sizes[part], BuildContext()) for part, each in towers.items()}
    structure = architecture.build(own, modules, outputs, BuildContext())
    structure.model.eval()
    named = architecture.tensors({n: lambda tensor=tensor: tensor for n, tensor in state.items()}, towers)
    structure.model.load_state_dict({n: tensor().float() for n, tensor in named.items()})
    processor = architecture.processor(own, folder, outputs)
    return Small(architecture, towers, sizes, own, outputs, structure, processor)  # type: ignore[arg-type]
