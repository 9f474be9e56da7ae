"""The file of all that was found, whole whenever its writers end: an entry for each check, with how it ended, its seconds, and what was found of each case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

UNFINISHED = {"error": "it did not end"}
"""What stands for a case while it goes on, for whoever finds that all ended there."""


def read(file: Path) -> dict[str, Any]:
    """What the file holds; nothing where there is none."""
    return json.loads(file.read_text()) if file.exists() else {}


def write(file: Path, told: dict[str, Any]) -> None:
    """Put `told` into the file, in one go."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(told, indent=1, default=str))
    new.replace(file)


def update(file: Path, check: str, **changes: Any) -> None:
    """Change the entry of a check."""
    told = read(file)
    told["checks"][check] |= changes
    write(file, told)


def left_out(value: Any) -> bool:
    """Whether this stands for a case that there was no time for."""
    return isinstance(value, dict) and "left out" in value


def missing(entry: dict[str, Any]) -> bool:
    """Whether something of a check is left to do."""
    return entry["ended"] != "done" or any(map(left_out, entry["found"].values()))
