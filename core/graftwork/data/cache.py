"""What was computed from data once and is kept for the next run, under the hash of all that it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from graftwork.weights import sha256

UNUSED = 30 * 24 * 3600
"""Seconds after which what was not used is removed."""
FORMAT = 1
"""Counted up when what is kept changes its form."""


def cache_folder() -> Path:
    """Where everything is kept: `GRAFTWORK_CACHE`, else `graftwork` in the user's folder for caches."""
    if named := os.environ.get("GRAFTWORK_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graftwork"


def key_of(*content: Any) -> str:
    """The name under which what depends on this plain content is kept."""
    text = json.dumps([FORMAT, *content], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def entry(key: str, make: Callable[[Path], None], is_current: Callable[[Path], bool] = lambda folder: True) -> Path:
    """The folder kept under `key`; where there is none, or it is not current, `make` fills an empty one, which then gets its
    name. OSError where the cache cannot be written."""
    place = cache_folder() / "data" / key
    if place.is_dir() and is_current(place):
        os.utime(place)
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place.parent)
    work = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=place.parent))
    try:
        make(work)
        shutil.rmtree(place, ignore_errors=True)
        try:
            work.rename(place)
        except OSError:
            if not place.is_dir():  # Another process was faster: it has the same.
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return place


def _sweep(folder: Path) -> None:
    """Remove what was not used for long, and what killed commands left behind."""
    for each in folder.iterdir():
        try:
            if time.time() - each.stat().st_mtime > (UNUSED if each.name[0] != "." else UNUSED / 30):
                shutil.rmtree(each, ignore_errors=True)
        except OSError:
            continue


def known_hashes(files: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of each file by its path; one whose size and time are those of last time is not read again. OSError where one
    cannot be read."""
    place = cache_folder() / "hashes.json"
    try:
        known = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    found, changed = {}, False
    for file in files:
        state = file.stat()
        stamp = [state.st_size, state.st_mtime_ns, state.st_ino]
        if known.get(str(file), [None])[:-1] != stamp:
            known[str(file)], changed = [*stamp, sha256(file)], True
        found[str(file)] = known[str(file)][-1]
    if changed:
        _keep(place, known)
    return found


def _keep(place: Path, known: Any) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False, encoding="utf-8") as file:
            json.dump(known, file)
        Path(file.name).replace(place)
    except OSError:
        return  # They are computed anew next time.
