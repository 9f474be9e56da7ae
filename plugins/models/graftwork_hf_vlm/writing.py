"""A whole model's folder, which says of itself what its base's folder says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graftwork.contracts import Assembly
from graftwork.weights import read_json
from graftwork_hf_vlm.model import save

CONFIG = "config.json"
DTYPE_KEYS = ("dtype", "torch_dtype")


def write(assembly: Assembly, folder: Path) -> None:
    """Write the tensors as `save_pretrained` does, and all else as the base's folder has it."""
    save(assembly.model, folder)
    for made in folder.glob("*config.json"):
        made.unlink()  # transformers fills in what the base leaves to it, such as how text is generated
    assembly.processor.save(folder)
    said = read_json(folder / CONFIG)
    if (true := with_dtype(said, str(assembly.model.dtype).removeprefix("torch."))) != said:
        (folder / CONFIG).write_text(json.dumps(true, indent=2) + "\n", encoding="utf-8")


def with_dtype(value: Any, dtype: str) -> Any:
    """A configuration that says of its weights, wherever it says so, that they have this dtype."""
    if isinstance(value, dict):
        return {key: dtype if key in DTYPE_KEYS and held else with_dtype(held, dtype) for key, held in value.items()}
    return [with_dtype(each, dtype) for each in value] if isinstance(value, list) else value
