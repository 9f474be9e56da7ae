"""Whether a module imports beside what else is installed: tried in a child process, so that nothing heavy is imported here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from graftwork.processes import cache_folder

FILE = "imports.json"
"""What was tried, and why it failed: a set of versions to a sentence, empty where it did not."""
PATIENCE = 120
"""Seconds that an import may take."""
SLOW = f"it took more than {PATIENCE} seconds"


@cache
def import_failure(module: str, distributions: Sequence[str]) -> str:
    """Why a module cannot be imported, in a few words; empty where it can. Remembered for these versions of `distributions`."""
    versions = [f"{name} {version(name)}" for name in ("torch", *distributions)]
    key, file = " ".join([sys.executable, module, *versions]), cache_folder() / FILE
    known = remembered(file)
    if key in known:
        return known[key]
    failure = tried(module)
    if failure != SLOW:  # the next time it may be faster
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({**known, key: failure}, indent=1), encoding="utf-8")
        except OSError:
            pass  # it is tried again the next time
    return failure


def remembered(file: Path) -> dict[str, str]:
    """What was tried before."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def tried(module: str) -> str:
    """The last line of what an import in a child process says where it fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return SLOW
    said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
    return said[-1][:200] if done.returncode else ""
