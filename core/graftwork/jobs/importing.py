"""Folders of any origin: what they are, and checkpoints made of those that other code wrote."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.checkpoint import learning, manifest
from graftwork.checkpoint.learning import LearningMap
from graftwork.checkpoint.manifest import Manifest
from graftwork.checkpoint.store import checkpoints, newest
from graftwork.contracts.lookup import Lookup
from graftwork.errors import CheckpointError
from graftwork.jobs.run import installed, preferred_kernels
from graftwork.jobs.verify import FreshProcess
from graftwork.weights import sha256

if TYPE_CHECKING:
    from graftwork.foreign.diagnosis import Diagnosis
    from graftwork.foreign.importing import Imported

Place = str | PathLike[str]


@dataclass(frozen=True)
class Inspected:
    """A checkpoint of Graftwork, as its manifest describes it."""

    folder: Path
    manifest: Manifest

    @cached_property
    def damage(self) -> str:
        """Which of its files are not as they were written, a sentence; empty when all are. Every file is read for it."""
        try:
            manifest.check_files(self.manifest, self.folder)
        except CheckpointError as error:
            return error.sentence
        return ""

    @cached_property
    def learned(self) -> LearningMap | None:
        """What each trained module learned; None where that is not recorded."""
        return learning.read(self.folder)

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain data, and the learning map."""
        return asdict(self.manifest) | {"learned": learning.to_json(self.learned) if self.learned else None}


def inspect(
    folder: Place,
    *,
    base: Place | None = None,
    parts: Mapping[str, Place] | None = None,
    search: Sequence[Place] = (),
    lookup: Lookup | None = None,
) -> Inspected | Diagnosis:
    """What a folder is, without building it: a checkpoint, or a diagnosis of what other code wrote, with what becomes of every
    tensor in it.

    `base` and `parts` say where what it was trained from is, and `search` names folders to search for it. Raises
    CheckpointError where there is no folder.
    """
    given = Path(folder)
    if not (given / manifest.FILE).is_file() and not any((c / manifest.FILE).is_file() for c in checkpoints(given)):
        from graftwork.foreign.importing import examine

        lookup = lookup or installed()
        return examine(_diagnose(given, base, parts, search, lookup), lookup, preferred_kernels(lookup))
    found = newest(given)
    return Inspected(found, manifest.read(found))


@dataclass(frozen=True)
class ImportResult:
    """A checkpoint that was made of a folder that other code wrote."""

    diagnosis: Diagnosis
    imported: Imported
    verification: Mapping[str, Any]
    """What a fresh process found when it reopened the checkpoint, and compared it with what other code makes of the folder."""

    @property
    def verified(self) -> str:
        """What that shows: `verified against` a library that opens the folder too, or `reopens as saved`."""
        return str(self.verification["verified"])

    @property
    def not_taken(self) -> list[str]:
        """What the folder's files hold and the checkpoint does not, a line for each file and reason."""
        own = {str(file) for file in self.diagnosis.folder.iterdir()}
        accounts = self.imported.manifest.accounts.items()
        return [f"of {Path(file).name} {why}" for file, each in accounts if file in own for why in each.reasons()]


def import_folder(
    folder: Place,
    out: Place,
    *,
    base: Place | None = None,
    parts: Mapping[str, Place] | None = None,
    search: Sequence[Place] = (),
    precision: str = "fp32",
    lookup: Lookup | None = None,
) -> ImportResult:
    """Make a checkpoint `out` of a folder that other code wrote, and verify it in a fresh process: against that code, where it is
    installed and opens the folder.

    The rest is as for `inspect`; `precision`, `fp32` or `bf16`, is the one to verify it in, and to evaluate it in by default. Raises
    CheckpointError with the reason where that cannot be done, and leaves nothing.
    """
    from graftwork.checkpoint.merging import refuse_existing
    from graftwork.foreign import importing

    out, lookup = Path(out), lookup or installed()
    refuse_existing(out)
    diagnosis = _diagnose(Path(folder), base, parts, search, lookup)
    kernels = preferred_kernels(lookup)
    imported = importing.import_folder(diagnosis, lookup, out, precision=precision, kernels=kernels)
    try:
        with FreshProcess(lookup, against=diagnosis.folder) as fresh:
            facts = fresh.verify(out)
        written = manifest.record(out, {"verified": facts["verified"], "compared": "; ".join(facts["compared"])})
    except BaseException:  # a signal too
        shutil.rmtree(out, ignore_errors=True)
        raise
    facts["sha256"] = sha256(out / manifest.FILE)
    return ImportResult(diagnosis, replace(imported, manifest=written), facts)


def _diagnose(
    folder: Path, base: Place | None, parts: Mapping[str, Place] | None, search: Sequence[Place], lookup: Lookup
) -> Diagnosis:
    from graftwork.foreign.diagnosis import diagnose

    places = {part: Path(place) for part, place in (parts or {}).items()}
    return diagnose(folder, lookup, base=Path(base) if base else None, parts=places, search=[*map(Path, search)])
