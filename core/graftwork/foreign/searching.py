"""Search for the weights that a foreign folder names, by the recorded path and by what folders hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

from graftwork import hub
from graftwork.errors import WeightsError

DEPTH = 6
"""How many levels below a folder are searched."""
ABOVE = 3
"""How many folders above a foreign one are searched for its recorded paths."""
CONFIG = "config.json"
"""How the name of a file ends that is in every folder of weights."""

Fits = Callable[[Path], str]
"""Why a folder cannot be the one that is meant, as a clause; empty when it can."""


class Search:
    """Searches for what a foreign folder names: beside it, and below the folders to search."""

    def __init__(self, folder: Path, below: Sequence[Path] = ()) -> None:
        self.folder = folder.resolve()
        self.below = [path.resolve() for path in below]
        for path in self.below:
            if not path.is_dir():
                raise WeightsError(f"--search: there is no folder '{path}'; correct the path")

    def find(self, recorded: str, fits: Fits, guess: Fits) -> tuple[Path | None, str]:
        """The folder that `recorded` means, where what it holds `fits`; else the only one below the folders to search that
        is a good `guess`, whatever it is called. None with what was found instead, a clause.
        """
        mismatch, of_hub = "", hub.ID.fullmatch(recorded)
        if of_hub and of_hub["revision"]:
            with suppress(WeightsError):  # a folder says of itself no revision
                return hub.snapshot(recorded, fetch=False), ""
        for place in dict.fromkeys(self._named(of_hub["name"] if of_hub else recorded)):
            if place.is_dir():
                if not (reason := fits(place)):
                    return place.resolve(), ""
                mismatch = mismatch or f"'{place}' is not it: {reason}"
        found = sorted({place for place in self._below() if not guess(place)})
        if len(found) == 1:
            return found[0], ""
        if found:
            return None, f"{len(found)} folders could be it: " + ", ".join(f"'{place}'" for place in found)
        if of_hub:
            try:
                return hub.snapshot(recorded, fetch=False), ""
            except WeightsError:
                fetch = f"'{recorded}' with --base or --part fetches it"
                mismatch = mismatch or f"it is not, or not whole, in the cache of the Hugging Face hub; {fetch}"
        return None, mismatch

    def _named(self, recorded: str) -> Iterator[Path]:
        """The places that a recorded path can mean: as it is, else its last parts, the more the better."""
        if not recorded:
            return
        if Path(recorded).is_absolute():
            yield Path(recorded)
        pure = PureWindowsPath(recorded) if "\\" in recorded else PurePosixPath(recorded)
        parts = [part for part in pure.parts if part not in (pure.anchor, ".", "..")]
        roots = [*self.below, self.folder, *self.folder.parents[:ABOVE], Path.cwd()]
        if not pure.is_absolute():
            yield from (root / recorded for root in roots)
        for start in range(len(parts)):
            yield from (root.joinpath(*parts[start:]) for root in roots)

    def _below(self) -> Iterator[Path]:
        """Every folder below those to search that looks like one of weights."""
        for root in self.below:
            for path, folders, files in os.walk(root):
                here = Path(path)
                deep = len(here.relative_to(root).parts) >= DEPTH
                folders[:] = [] if deep else sorted(name for name in folders if not name.startswith("."))
                if any(name.endswith(CONFIG) for name in files) and here != self.folder:
                    yield here
