"""What was computed from data once and is kept for the next run, under the hash of all that it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from graftwork.processes import cache_folder
from graftwork.weights import sha256

UNUSED = 90 * 24 * 3600
"""Seconds after which what was not used is removed: longer than any run takes."""
SEAL = "seal.json"
"""The file of an entry that holds the sizes and times of all others."""
MAX_HASHES = 1_000
"""When more files are known, those that are gone are forgotten."""
FORMAT = 1
"""Counted up when what is kept changes its form."""


def key_of(*content: Any, form: int = FORMAT) -> str:
    """The name under which what depends on this plain content is kept, in this version of its form."""
    text = json.dumps([form, *content], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def entry(key: str, make: Callable[[Path], None], is_current: Callable[[Path], bool] = lambda folder: True) -> Path:
    """The folder kept under `key`; where there is none, or it is not current, `make` fills an empty one, which then gets its
    name. OSError where the cache cannot be written."""
    place = cache_folder() / "data" / key
    if _is_usable(place, is_current):
        os.utime(place)
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place.parent)
    work = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=place.parent))
    try:
        make(work)
        (work / SEAL).write_text(json.dumps(_states(work)), encoding="utf-8")
        outdated = Path(tempfile.mkdtemp(prefix=".outdated-", dir=place.parent))
        with suppress(OSError):  # At once, so that nobody finds half of it.
            place.rename(outdated / key)
        try:
            work.rename(place)
        except OSError:
            if not place.is_dir():  # Another process was faster: it has the same.
                raise
        shutil.rmtree(outdated, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return place


def _is_usable(place: Path, is_current: Callable[[Path], bool]) -> bool:
    """Whether what is kept is there, whole, and current."""
    try:
        sealed = json.loads((place / SEAL).read_text(encoding="utf-8"))
        return bool(sealed == _states(place)) and is_current(place)
    except Exception:  # A damaged file makes libraries raise anything.
        return False


def _states(folder: Path) -> dict[str, list[int]]:
    """The size and time of every file of an entry, which nobody changes once it is there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SEAL:
            state = path.stat()
            found[str(path.relative_to(folder))] = [state.st_size, state.st_mtime_ns]
    return found


def _sweep(folder: Path) -> None:
    """Remove what was not used for long, and what killed commands left behind."""
    for each in folder.iterdir():
        try:
            if time.time() - each.stat().st_mtime > UNUSED:
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
        if len(known) > MAX_HASHES:
            known = {name: state for name, state in known.items() if name in found or Path(name).exists()}
        _keep(place, known)
    return found


def _keep(place: Path, known: Any) -> None:
    """Write a JSON file whole or not at all; where it cannot be written, everything is computed anew next time."""
    work = place.with_name(f".{place.name}-{os.getpid()}-{time.time_ns()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        work.write_text(json.dumps(known), encoding="utf-8")
        work.replace(place)
    except OSError:
        with suppress(OSError):
            work.unlink()
