"""Writing a whole MGM folder, as published ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from graftwork.kinds import VisionTower
from graftwork_mgm import NESTED, PUBLISHED, TOWERS
from graftwork_mgm.backbones import Backbone

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from graftwork.compose import Assembly


def write(backbone: Backbone, assembly: Assembly, folder: Path) -> None:
    """Tokenizer, weights with an index, config.json, and each tower's configuration in a folder of its part's name."""
    assembly.processor.save(folder)
    tensors = {published(name, assembly.towers): tensor for name, tensor in assembly.model.state_dict().items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(tensors), "model.safetensors")}
    write_json(folder / "model.safetensors.index.json", index)  # Upstream's loader wants one, even for a single file.
    write_json(folder / "config.json", configuration(backbone, assembly, tensors))
    for part, choice in assembly.plan.identity.parts.items():
        (folder / part).mkdir()
        write_json(folder / part / "config.json", choice.config)


def published(name: str, towers: Mapping[str, VisionTower[Any]]) -> str:
    """The name of the built model's tensor `name` in a published folder."""
    for part, tower in towers.items():
        if name.startswith(f"{TOWERS[part]}."):
            return f"{TOWERS[part]}.{NESTED[part]}{tower.original(name.removeprefix(f'{TOWERS[part]}.'))}"
    return name


def configuration(backbone: Backbone, assembly: Assembly, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config.json of a published folder."""
    config = assembly.plan.identity.model.config or {}
    outputs, high = assembly.outputs, "high" in assembly.towers
    return {
        **config["language"],
        "architectures": [backbone.architecture],
        "model_type": backbone.model_types[1],
        "torch_dtype": str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch."),
        "use_cache": True,
        **{key: config[name] for name, (key, _, _) in PUBLISHED.items() if name in config},
        "mm_vision_tower": "low",
        "mm_hidden_size": outputs["low"].widths[0],
        **({"mm_vision_tower_aux": "high", "mm_hidden_size_aux": sum(outputs["high"].widths)} if high else {}),
        "mm_vision_select_layer": getattr(assembly.towers["low"].settings, "select_layer", None),
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tokenizer_padding_side": "right",
    }


def write_json(file: Path, content: Any) -> None:
    """Write JSON as people read it."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
