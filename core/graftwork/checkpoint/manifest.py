"""The manifest: `graftwork.json`, which says what a checkpoint is and seals everything in it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from graftwork.checkpoint import format1
from graftwork.checkpoint.verification import GoldenFacts
from graftwork.checkpoint.writing import hidden
from graftwork.contracts.accounting import FileAccount
from graftwork.contracts.plan import Plan
from graftwork.contracts.records import RecordCounts
from graftwork.contracts.verdict import Verdict
from graftwork.errors import CheckpointError

FILE = "graftwork.json"
FORMAT = 2
LARGEST = 64 << 20


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of `tensors.safetensors`."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class FileEntry:
    """One file of the checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Ancestor:
    """An earlier checkpoint whose tensors a run began with."""

    sha256: str
    """Of its manifest, which seals all the rest."""
    given: str
    """Its path as the run file wrote it."""
    step: int

    def __str__(self) -> str:
        return f"'{self.given}' at step {self.step} (sha256 {self.sha256[:12]}…)"


def told(ancestors: Sequence[Ancestor]) -> str:
    """A chain of checkpoints as a phrase, the newest first; empty where there is none."""
    return ", which began with ".join(map(str, reversed(ancestors)))


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is."""

    graftwork: str
    """The version of Graftwork that wrote it."""
    step: int
    steps: int
    plan: Plan
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    golden: GoldenFacts
    counts: dict[str, int]
    """Numbers in the model: `total`, `trained`."""
    health: Verdict
    newly_initialised: tuple[str, ...] = ()
    """Roles that the base lacks."""
    attention: dict[str, Any] = field(default_factory=dict)
    """Which kernel ran at each site."""
    data: dict[str, Any] = field(default_factory=dict)
    """How many records were used, and the groups that they belong to."""
    provenance: dict[str, str] = field(default_factory=dict)
    accounts: dict[str, FileAccount] = field(default_factory=dict)
    """What became of every tensor in the files that were read: of base weights and, for an import, of the other code's folder."""
    initialised_from: tuple[Ancestor, ...] = ()
    """What the run began with, what that began with, and so on, the oldest first; empty where all began anew."""
    format: int = FORMAT
    """As it was written; everything else here has the words of the present format."""

    @property
    def began_with(self) -> str:
        """What the run began with, as a phrase; empty where all began anew."""
        return told(self.initialised_from)

    @property
    def record_counts(self) -> RecordCounts | None:
        """How many records its run read, used and left out; None where that was not recorded."""
        return RecordCounts.recorded(self.data)


def write(manifest: Manifest, folder: Path) -> None:
    """Write a manifest with its seal: the sha256 of everything else in it."""
    content = dataclasses.asdict(manifest)
    text = json.dumps({**content, "seal": seal(content)}, indent=1, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def record(folder: Path, facts: Mapping[str, str]) -> Manifest:
    """Add to the provenance of a checkpoint what was found out once it was written; whenever the process is killed, it has the one manifest
    or the other."""
    known = read(folder)
    added = dataclasses.replace(known, provenance={**known.provenance, **facts})
    with hidden(folder.parent) as work:
        write(added, work)
        (work / FILE).replace(folder / FILE)
    return added


def seal(content: dict[str, Any]) -> str:
    """The sha256 of a manifest's content without its seal."""
    rest = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()


def read(folder: Path) -> Manifest:
    """Read and check a checkpoint's manifest; CheckpointError in one sentence for everything that can be wrong."""
    from pydantic import TypeAdapter, ValidationError

    file = folder / FILE
    if not file.is_file():
        raise CheckpointError(f"'{folder}' is not a Graftwork checkpoint: it has no {FILE}")
    if file.stat().st_size > LARGEST:
        raise CheckpointError(f"'{file}' is larger than any manifest; restore it from a copy")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        sealed = isinstance(content, dict) and content.pop("seal", None) == seal(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{file}' is damaged ({str(error)[:120]}); restore it from a copy") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"'{file}' is damaged (it holds no table); restore it from a copy")
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"'{folder}' has format {version}, written by Graftwork {content.get('graftwork')}; this version reads formats "
            f"up to {FORMAT}: pip install --upgrade graftwork"
        )
    if not sealed:
        raise CheckpointError(
            f"'{file}' was changed after it was written (its seal does not fit); restore it from a copy"
        )
    if version == 1:
        content = format1.read_manifest(content)
    try:
        return TypeAdapter(Manifest).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:10]]
        raise CheckpointError(f"'{file}' is not a manifest that this version can read", mistakes) from None


def check_files(manifest: Manifest, folder: Path) -> None:
    """Compare every file of a checkpoint with the manifest: all there, none more, none changed."""
    from graftwork.weights import sha256

    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    for name, entry in manifest.files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(f"the manifest of '{folder}' names '{name}', which leads out of its folder; refused")
        if name not in present:
            raise CheckpointError(f"'{folder}' lacks '{name}'; restore the checkpoint from a copy")
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"'{folder / name}' is a link that leads out of its folder; refused")
        if (folder / name).stat().st_size != entry.bytes or sha256(folder / name) != entry.sha256:
            raise CheckpointError(
                f"'{folder / name}' was changed after it was written; restore the checkpoint from a copy"
            )
    if unknown := sorted(present - manifest.files.keys() - {FILE}):
        raise CheckpointError(f"'{folder}' holds '{unknown[0]}', which its manifest does not know; remove it")


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """The entries of every file below a folder."""
    from graftwork.weights import sha256

    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {f.relative_to(folder).as_posix(): FileEntry(f.stat().st_size, sha256(f)) for f in files}
