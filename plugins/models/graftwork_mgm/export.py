"""Writing a whole MGM folder, as published ones are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from graftwork.contracts import Choice, VisionTower
from graftwork.errors import CheckpointError
from graftwork.weights import read_json, tensor_files
from graftwork_mgm import KEYS, NESTED, PUBLISHED, TOWERS
from graftwork_mgm.backbones import Backbone

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from graftwork.contracts import Assembly


NAMED = {"low": ("openai", "sharegpt4v"), "high": ("openclip",)}
"""What upstream's loader wants in the path of a part's tower, one of it, in whatever case."""
CONVNEXTS = (("convnext", "large", "d-320"), ("convnext", "base", "w-320"), ("convnext", "xxlarge"))
"""What it wants in the name of a ConvNeXt's folder besides, all of one row."""


def write_for_upstream(backbone: Backbone, assembly: Assembly, folder: Path) -> None:
    """A whole MGM folder that upstream's loader accepts: its towers are in their own folders, which it is told of.

    Raises CheckpointError where there is no such folder, or where upstream would not know a tower by its folder's name.
    """
    places = {part: tower_folder(part, assembly.plan.model_spec.parts[part]) for part in assembly.towers}
    write(backbone, assembly, folder)
    config = read_json(folder / "config.json")
    base = assembly.plan.model_spec.model.weights
    named = {KEYS[part]: place for part, place in places.items()} | ({"_name_or_path": base.path} if base else {})
    write_json(folder / "config.json", {**config, **named})
    for part in places:
        shutil.rmtree(folder / part)
    write_old_tokenizer(backbone, folder)


def write_old_tokenizer(backbone: Backbone, folder: Path) -> None:
    """Change a tokenizer's files so that transformers 4.38 reads them, which upstream needs: it looks the class up by
    its name, and knows the merges of a vocabulary as "left right" only."""
    config = read_json(folder / "tokenizer_config.json")
    special = {"additional_special_tokens": config.pop("extra_special_tokens", [])}
    write_json(folder / "tokenizer_config.json", {**config, **special, "tokenizer_class": backbone.tokenizer})
    tokenizer = read_json(folder / "tokenizer.json")
    merges = tokenizer["model"].get("merges", [])
    tokenizer["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def tower_folder(part: str, choice: Choice) -> str:
    """The folder that upstream's loader will read a part's tower from."""
    if not choice.folder or not tensor_files(Path(choice.folder)):
        raise CheckpointError(
            f"upstream reads the {part} part's tower from a folder of its own, and this checkpoint knows none with weights; "
            "merge it instead"
        )
    path, name = choice.folder.lower(), Path(choice.folder).name.lower()
    known = any(word in path for word in NAMED[part])
    if part == "high" and known:
        known = any(all(word in name for word in words) for words in CONVNEXTS)
    if not known:
        wanted = "openai" if part == "low" else "openclip, convnext, large and d-320"
        raise CheckpointError(
            f"upstream knows a tower by its folder's name, and would not know '{choice.folder}' as the {part} part's; give it a "
            f"name with {wanted} in it, and name that with --part {part}=DIR"
        )
    return choice.folder


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
    for part, choice in assembly.plan.model_spec.parts.items():
        (folder / part).mkdir()
        write_json(folder / part / "config.json", choice.config)


def published(name: str, towers: Mapping[str, VisionTower[Any]]) -> str:
    """The name of the built model's tensor `name` in a published folder."""
    for part, tower in towers.items():
        if name.startswith(f"{TOWERS[part]}."):
            return f"{TOWERS[part]}.{NESTED[part]}{tower.published_name(name.removeprefix(f'{TOWERS[part]}.'))}"
    return name


def configuration(backbone: Backbone, assembly: Assembly, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config.json of a published folder."""
    config = assembly.plan.model_spec.model.config or {}
    outputs, high = assembly.outputs, "high" in assembly.towers
    return {
        **config["language"],
        "architectures": [backbone.architecture],
        "model_type": backbone.model_types[1],
        "torch_dtype": str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch."),
        "use_cache": True,
        **{key: config[name] for name, (key, _, _) in PUBLISHED.items() if name in config},
        KEYS["low"]: "low",
        "mm_hidden_size": outputs["low"].widths[0],
        **({KEYS["high"]: "high", "mm_hidden_size_aux": sum(outputs["high"].widths)} if high else {}),
        "mm_vision_select_layer": getattr(assembly.towers["low"].settings, "select_layer", None),
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tokenizer_padding_side": "right",
        "freeze_mm_mlp_adapter": False,
        "tune_mm_mlp_adapter": False,
        "optimize_vision_tower": False,
        "optimize_vision_tower_aux": False,
    }


def write_json(file: Path, content: Any) -> None:
    """Write JSON as people read it."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
