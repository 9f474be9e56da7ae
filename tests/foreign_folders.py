"""Folders as MGM's training leaves them, copied from `tests/golden` and changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mgm_folders import GOLDEN

NAMES = {
    "base": "LLM/gemma/gemma-2b-it",
    "clip": "OpenAI/clip-vit-large",
    "convnext": "OpenAI/openclip-convnext-large-d-320",
}
"""Where upstream's scripts expect the base and the towers, below `model_zoo`."""
RECORDED = {"_name_or_path": "base", "mm_vision_tower": "clip", "mm_vision_tower_aux": "convnext"}


def zoo(folder: Path, *wanted: str) -> Path:
    """A `model_zoo` in `folder` with the base and the towers, or with those that are wanted."""
    for source in wanted or NAMES:
        shutil.copytree(GOLDEN / source, folder / "model_zoo" / NAMES[source])
    return folder / "model_zoo"


def run_folder(
    folder: Path, source: str = "lora", *, name: str = "run", prefix: str = "model_zoo", **config: Any
) -> Path:
    """A folder `work_dirs/name` like `source`, whose recorded paths begin with `prefix`; None removes a key of config.json."""
    made = Path(shutil.copytree(GOLDEN / source, folder / "work_dirs" / name))
    paths = {key: f"{prefix}/{NAMES[source]}" for key, source in RECORDED.items()}
    edit(made / "config.json", **(paths | config))
    if (made / "adapter_config.json").exists():
        edit(made / "adapter_config.json", base_model_name_or_path=paths["_name_or_path"])
    return made


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def change(file: Path, edit_tensors: Any) -> None:
    """Save a file of tensors again, each passed through a function of its name and value; None leaves one out."""
    import torch
    from safetensors.torch import load_file, save_file

    pickled = file.suffix == ".bin"
    tensors = torch.load(file, weights_only=True) if pickled else load_file(file)
    changed = {name: new for name, tensor in tensors.items() if (new := edit_tensors(name, tensor)) is not None}
    if pickled:
        torch.save(changed, file)
    else:
        save_file(changed, file)
