"""Format 1 of checkpoints and of answers, read as format 2. Only this file knows the words of format 1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

GOLDEN_INPUTS = "probe.safetensors"
"""The file of the golden inputs."""
KEYS = {"probe": "golden", "fresh": "newly_initialised"}
PLAN_KEYS = {"identity": "model_spec", "circumstance": "run_context"}
RUN_CONTEXT_KEYS = {"rungs": "candidates"}
GOLDEN_KEYS = {"rounded": "quantized"}
TENSORS = {"picture_positions": "image_token_mask"}
HEADER_KEYS = {"arms": "variants"}
LINE_KEYS = {"pictures": "images"}


def read_manifest(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest of format 1 with the keys of format 2; what is no table is left for the reader of format 2 to refuse."""
    manifest: dict[str, Any] = renamed(content, KEYS)
    manifest["golden"] = renamed(manifest.get("golden"), GOLDEN_KEYS)
    manifest["plan"] = renamed(manifest.get("plan"), PLAN_KEYS)
    if isinstance(manifest["plan"], dict) and "run_context" in manifest["plan"]:
        manifest["plan"]["run_context"] = renamed(manifest["plan"]["run_context"], RUN_CONTEXT_KEYS)
    return manifest


def read_golden_inputs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The golden inputs, by the names of format 2."""
    return {TENSORS.get(name, name): tensor for name, tensor in tensors.items()}


def read_answers(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a file of answers, of either format, with the keys of format 2: a header, then lines."""
    return [renamed(entry, LINE_KEYS if place else HEADER_KEYS) for place, entry in enumerate(entries)]


def renamed(table: Any, keys: Mapping[str, str]) -> Any:
    """A table with other keys; anything else as it is."""
    if isinstance(table, Mapping):
        return {keys.get(key, key): value for key, value in table.items()}
    return table
