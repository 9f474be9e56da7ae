"""Checkpoints: saved whole and verified, or not at all; opened strictly, or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import __version__, hub, processes, weights
from graftwork.build import compose, filling
from graftwork.checkpoint import format1, learning, manifest, verification
from graftwork.checkpoint.manifest import Manifest
from graftwork.checkpoint.writing import put_in_place, unfinished
from graftwork.config.restore import restore_component
from graftwork.contracts.accounting import Accounts
from graftwork.contracts.component import missing_requirements
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Choice, Plan, WeightsRef
from graftwork.contracts.verdict import Verdict
from graftwork.errors import CheckpointError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts.assembly import Assembly
    from graftwork.contracts.model import Processor

TENSORS = "tensors.safetensors"
GOLDEN_INPUTS = "golden.safetensors"
PROCESSOR = "processor"
OPTIMIZER = "optimizer"


@dataclass(frozen=True)
class Opened:
    """A checkpoint that was opened and verified."""

    assembly: Assembly
    manifest: Manifest
    verification: verification.Verification
    folder: Path

    @property
    def note(self) -> str:
        """What a person should know of how it was opened, as a sentence; empty when there is nothing to say."""
        missing = [name for name in self.manifest.golden.quantized if name not in self.assembly.quantized]
        if missing:
            return f"Trained on a base that {' and '.join(missing)} rounded; the base is whole here, so outputs differ a little."
        undecided = self.verification.cannot_tell
        return undecided and f"Not verified: {undecided}."

    @property
    def learned(self) -> learning.LearningMap | None:
        """What each trained module learned; None where that is not recorded."""
        return learning.read(self.folder)

    @property
    def sha256(self) -> str:
        """What identifies the checkpoint: the hash of its manifest, which seals all the rest."""
        return weights.sha256(self.folder / manifest.FILE)


@dataclass(frozen=True)
class Capture:
    """What a checkpoint will hold, copied, so that it can be written while the model goes on training."""

    manifest: Manifest
    """Without the files, and without the hashes of the base weights."""
    tensors: Mapping[str, Tensor]
    golden: Mapping[str, Tensor]
    processor: Processor
    optimizer: Mapping[str, Tensor] | None
    learned: learning.LearningMap | None


def capture(
    assembly: Assembly,
    *,
    step: int,
    steps: int,
    golden: dict[str, Tensor],
    health: Verdict,
    data: Mapping[str, Any],
    optimizer: Mapping[str, Tensor] | None = None,
    origin: Mapping[str, str] | None = None,
    accounts: Accounts | None = None,
    initialised_from: tuple[manifest.Ancestor, ...] = (),
    learned: learning.LearningMap | None = None,
) -> Capture | None:
    """Copy all that a checkpoint of the model, as it is now, will hold; None on all processes but the first, which writes it.

    `golden` gets the logits that it must give; the tensors of `optimizer` must be copies already. `origin` adds to the
    provenance, and `accounts` to those of the base weights' files. Collective: all processes hand in their part of the model.
    """
    facts = verification.measure(assembly, golden)
    with assembly.full_params(assembly.state_to_save()):
        if not processes.is_first():
            return None
        added = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in assembly.state_to_save().items()}
    entries = {n: manifest.TensorEntry(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in added.items()}
    described = Manifest(
        graftwork=__version__,
        step=step,
        steps=steps,
        plan=assembly.plan,
        tensors=entries,
        files={},
        golden=facts,
        counts=dict(assembly.adaptation.counts),
        health=health,
        newly_initialised=assembly.adaptation.newly_initialised,
        attention=assembly.kernel_usage(),
        data=deepcopy(dict(data)),
        provenance={**provenance(), **(origin or {})},
        accounts={**assembly.base_files, **(accounts or {})},
        initialised_from=initialised_from,
    )
    return Capture(described, added, dict(golden), assembly.processor, optimizer, learned)


def rebuild(captured: Capture, folder: Path, lookup: Lookup) -> dict[str, bytes]:
    """Rebuild the model on the meta device from what the manifest of `folder` will say, and compare every name and shape; the
    files of its processor, by their names. Raises CheckpointError. It draws random numbers and puts them back, so not while another thread computes.
    """
    import torch

    with unfinished(folder) as work:
        (work / PROCESSOR).mkdir()
        captured.processor.save(work / PROCESSOR)
        manifest.write(captured.manifest, work)
        with torch.random.fork_rng():
            rebuilt = compose.build_shape(manifest.read(work).plan, lookup, processor_folder=work / PROCESSOR)
        filling.check_keys(rebuilt.state_to_save(), {n: each.shape for n, each in captured.manifest.tensors.items()})
        files = [file for file in (work / PROCESSOR).rglob("*") if file.is_file()]
        return {file.relative_to(work).as_posix(): file.read_bytes() for file in files}


def write(captured: Capture, folder: Path, processor: Mapping[str, bytes]) -> Manifest:
    """Write a checkpoint and give it its name only when it is complete; `processor` are files that `rebuild` returned.

    It is written into a hidden folder beside `folder`, compared with its manifest, synced and renamed. Whatever goes wrong, an existing
    checkpoint stays as it was. Raises CheckpointError. It computes nothing with torch, so it may run beside training.
    """
    from safetensors.torch import save_file

    with unfinished(folder) as work:
        save_file(dict(captured.tensors), work / TENSORS)
        save_file(dict(captured.golden), work / GOLDEN_INPUTS)
        for name, content in processor.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(content)
        if captured.optimizer is not None:
            (work / OPTIMIZER).mkdir()
            save_file(dict(captured.optimizer), work / OPTIMIZER / "state.safetensors")
        if captured.learned is not None:
            learning.write(captured.learned, work)
        plan = with_fingerprints(captured.manifest.plan, folder)
        written = replace(captured.manifest, plan=plan, files=manifest.describe_files(work))
        manifest.write(written, work)
        filling.check_keys(manifest.read(work).tensors, weights.shapes_in(work / TENSORS))
        put_in_place(work, folder)
    return written


def save(assembly: Assembly, folder: Path, lookup: Lookup, **facts: Any) -> Manifest:
    """Save a checkpoint, and return when it has its name; `facts` are those that `capture` takes. Raises CheckpointError. Collective."""
    if captured := capture(assembly, **facts):
        written = write(captured, folder, rebuild(captured, folder, lookup))
    processes.all_gather_object(None)  # Nobody goes on before the checkpoint has its name.
    return written if captured else manifest.read(folder)


def with_fingerprints(plan: Plan, folder: Path) -> Plan:
    """The plan with the hashes of its base weights, and their places relative to the checkpoint `folder`."""

    def marked(choice: Choice) -> Choice:
        if not choice.weights:
            return choice
        path = Path(choice.weights.path)
        # Relative to the final name: the unfinished folder is its sibling.
        relative = os.path.relpath(path, folder.resolve())
        known = choice.weights.sha256 or weights.fingerprint(path)
        return replace(choice, weights=replace(choice.weights, relative=relative, sha256=known))

    model_spec = plan.model_spec
    parts = {part: marked(choice) for part, choice in model_spec.parts.items()}
    return replace(plan, model_spec=replace(model_spec, model=marked(model_spec.model), parts=parts))


def provenance() -> dict[str, str]:
    """Which versions, on what, and when."""
    import platform
    import sys
    from datetime import UTC, datetime
    from importlib import metadata

    found = {"python": platform.python_version(), "platform": platform.platform(), "command": " ".join(sys.argv)}
    for name in ("torch", "transformers", "safetensors"):
        found[name] = metadata.version(name)
    return {**found, "created": datetime.now(UTC).isoformat(timespec="seconds")}


def newest(folder: Path) -> Path:
    """`folder` itself if it is a checkpoint, else the newest checkpoint of the run that it is the folder of."""
    if (folder / manifest.FILE).is_file():
        return folder
    if found := checkpoints(folder):
        return found[-1]
    if not folder.exists():
        raise CheckpointError(f"there is no folder '{folder}'; name a checkpoint or the folder of a run")
    raise CheckpointError(
        f"'{folder}' is not a Graftwork checkpoint and holds none; name a checkpoint or the folder of a run"
    )


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in out.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def open_checkpoint(
    folder: Path,
    lookup: Lookup,
    *,
    base: Path | None = None,
    parts: Mapping[str, Path] | None = None,
    attention: Mapping[str, Sequence[Choice]] | None = None,
    device: str | None = None,
    precision: str | None = None,
    as_trained: bool = False,
) -> Opened:
    """Open a checkpoint, or the newest one of a run, strictly: files, base weights, every tensor, and the golden inputs.

    `base` and `parts` name the folders of the base weights when they are no longer where they were; they must be the
    recorded ones. Of a part whose weights are not in a folder of its own, `parts` says where other code will find one. `attention` chooses other kernels than training used. With `as_trained` the memory strategies that
    rounded its weights do so again, where they work here; otherwise the base is whole. Raises CheckpointError, AdapterError,
    WeightsError.
    """
    folder = newest(folder)
    read = manifest.read(folder)
    if (folder / TENSORS).is_file():
        # Before the hashes: which tensors differ says more than that the file does.
        filling.check_keys(read.tensors, weights.shapes_in(folder / TENSORS))
    manifest.check_files(read, folder)
    plan = locate_base(read.plan, folder, base, parts or {})
    # Memory strategies belong to the run context of training, and so do the kernels.
    memory = rounding(read, lookup) if as_trained else []
    plan = replace(plan, run_context=replace(plan.run_context, memory=memory))
    if attention is not None:
        plan = replace(
            plan, run_context=replace(plan.run_context, attention={k: list(v) for k, v in attention.items()})
        )
    assembly = compose.build(
        plan,
        lookup,
        device=device,
        precision=precision,
        **contents(folder),
    )
    assembly.model.eval()
    verified = verification.verify(assembly, read_golden_inputs(folder, read), read.golden)
    return Opened(assembly, read, verified, folder)


def rounding(read: Manifest, lookup: Lookup) -> list[Choice]:
    """The memory strategies that rounded a checkpoint's weights in training and that work here."""
    found = []
    for choice in read.plan.run_context.memory:
        if choice.name in read.golden.quantized:
            with suppress(CheckpointError):  # it is not installed
                if not missing_requirements(restore_component(choice, lookup).requires):
                    found.append(choice)
    return found


def contents(folder: Path | None) -> dict[str, Any]:
    """What `compose.build` takes of a checkpoint: its tensors, and where its processor is; empty without one."""
    return {"trained": read_tensors(folder / TENSORS), "processor_folder": folder / PROCESSOR} if folder else {}


def read_golden_inputs(folder: Path, read: Manifest) -> dict[str, Tensor]:
    """A checkpoint's golden inputs and the logits that they must give, of whatever format it is."""
    if read.format == 1:
        return format1.read_golden_inputs(read_tensors(folder / format1.GOLDEN_INPUTS))
    return read_tensors(folder / GOLDEN_INPUTS)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file; CheckpointError for one that is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)  # type: ignore[no-any-return]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{file}' is damaged ({error}); restore the checkpoint from a copy") from None


def locate_base(plan: Plan, folder: Path, base: Path | None, parts: Mapping[str, Path]) -> Plan:
    """The plan with the places where its base weights are now; every folder must hold the recorded weights."""
    model_spec = plan.model_spec
    if unknown := sorted(parts.keys() - model_spec.parts.keys()):
        raise CheckpointError(
            f"the model has no part '{unknown[0]}'; its parts are {', '.join(model_spec.parts) or 'none'}"
        )

    def found(choice: Choice, given: Path | None, option: str) -> Choice:
        if not choice.weights:
            if given and not given.is_dir():
                raise WeightsError(f"there is no folder '{given}'; correct {option}")
            # Nothing is read from it here: an export names it for whoever takes a part from a folder of its own.
            return replace(choice, folder=str(given.resolve())) if given else choice
        place = find_weights(choice.weights, folder, given, option)
        return replace(choice, weights=replace(choice.weights, path=str(place)), folder=str(place))

    located = {part: found(choice, parts.get(part), f"--part {part}=DIR") for part, choice in model_spec.parts.items()}
    return replace(
        plan, model_spec=replace(model_spec, model=found(model_spec.model, base, "--base-weights DIR"), parts=located)
    )


def find_weights(ref: WeightsRef, folder: Path, given: Path | None, option: str) -> Path:
    """Where recorded base weights are: at `given`, a folder or a hub id, else where they were seen from the checkpoint, else
    where they were, else at their commit on the hub. Their hash must be the recorded one; the commit may be another."""
    if given and not given.exists() and hub.ID.fullmatch(str(given)):
        given = hub.locate(str(given), Path.cwd(), where=option.partition(" ")[0])
    places = [given] if given else [folder / ref.relative, Path(ref.path)]
    there = [place.resolve() for place in places if place.is_dir()]
    for place in there:
        with suppress(WeightsError):  # another folder that is incomplete
            if weights.fingerprint(place) == ref.sha256:
                return place
    tried = " or ".join(f"'{place}'" for place in dict.fromkeys(map(str, places)))
    reason = ""
    if not (there or given):
        # A snapshot's path says which one it was, whatever the run named it by; the hub may have dropped its commit since.
        for name in filter(hub.ID.fullmatch, dict.fromkeys((hub.id_of(Path(ref.path)), ref.given))):
            try:
                place = hub.snapshot(name)
            except WeightsError as error:
                reason = reason or f", and {error.sentence}"
                continue
            if weights.fingerprint(place) == ref.sha256:
                return place
            there.append(place)
    if there:
        raise WeightsError(
            f"'{there[0]}'{_at(hub.commit_of(there[0]))} does not hold the base weights that the checkpoint was trained on "
            f"('{ref.given}'{_at(ref.commit)}, sha256 {ref.sha256[:12]}…); name the right folder with {option}"
        )
    raise WeightsError(
        f"the base weights '{ref.given}'{_at(ref.commit)} are not at {tried}{reason}; name their folder with {option}"
    )


def _at(commit: str) -> str:
    return f" at commit {commit}" * bool(commit)
