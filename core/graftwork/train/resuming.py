"""Resuming: whether a run may go on from a checkpoint, its random numbers, and what weight decay falls on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import processes
from graftwork.checkpoint import manifest, store
from graftwork.contracts.plan import Plan, RunContext
from graftwork.contracts.stepper import Stepper, decays
from graftwork.data.digest import STATE, digest_of
from graftwork.data.training_data import TrainingData
from graftwork.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def starting_point(out: Path, *, resume: bool) -> Path | None:
    """The newest checkpoint of a run's folder, to go on from; None where there is none. Collective."""
    found = store.checkpoints(out)
    if found and not resume:
        raise CheckpointError(
            f"'{out}' already holds {found[-1].name}; go on with --resume, or name another folder with --out"
        )
    start = found[-1] if found else None
    if len(names := dict.fromkeys(processes.all_gather_object(start.name if start else "none"))) > 1:
        raise CheckpointError(
            f"the processes do not see the same checkpoints in '{out}' ({', '.join(names)}); name a "
            "folder with --out that all machines share"
        )
    return start


def resumable(start: Path, plan: Plan) -> manifest.Manifest:
    """The manifest of the checkpoint to go on from; it must be whole, and of the same plan."""
    saved = manifest.read(start)
    manifest.check_files(saved, start)
    if store.OPTIMIZER + "/state.safetensors" not in saved.files:
        raise CheckpointError(f"'{start}' holds no optimizer state to resume from; start a new run with --out")
    # Where the digest of the records is known, it decides, wherever their files lie now.
    without = ("sources", "operators") if saved.data.get("digest") else ()
    recorded, current = (comparable(each, without) for each in (saved.plan, store.with_fingerprints(plan, start)))
    if recorded != current:
        differing = sorted(_differences(recorded, current))
        raise CheckpointError(
            f"'{start}' was trained with another plan, so it cannot be resumed; change it back, or name another folder with "
            "--out",
            differing[:10],
        )
    return saved


class DataHistory:
    """What data a run reads, and after which steps it went on with other data."""

    def __init__(self, data: TrainingData, run_context: RunContext) -> None:
        known = data.measured
        self.digest = digest_of(
            data.records,
            known.fields,
            known.lengths,
            run_context,
            by_content=known.by_content,
            sources=known.sources,
            validation=data.validation_fields,
        )
        self.accepted: list[dict[str, Any]] = []
        self.messages: tuple[str, ...] = ()
        """What a person should know of it, a sentence each."""

    def recorded(self) -> dict[str, Any]:
        """What a manifest says."""
        return {"digest": self.digest.recorded(), "accepted": self.accepted}

    def restore(self, saved: manifest.Manifest, state: Mapping[str, Tensor], start: Path, *, accept: bool) -> bool:
        """Compare with what the run of a checkpoint has read; whether it is other data, which is to be accepted.

        CheckpointError with all that differs, unless `accept`. Collective.
        """
        recorded = saved.data.get("digest")
        if not recorded or f"{STATE}ids" not in state:
            self.messages = (
                f"'{start}' does not record its data, as its Graftwork was older: that it goes on with the same cannot be verified",
            )
            return False
        self.accepted = [*saved.data["accepted"]]
        if (by_content := recorded["images_by"] == "content") != self.digest.by_content:
            self.digest = self.digest.with_images(by_content=by_content)
        gathered = processes.all_gather_object(self.digest.differences(state))
        differing = next(filter(None, gathered), [])
        if not differing:
            return False
        if not accept:
            raise CheckpointError(
                f"'{start}' was trained on other data than is read now: {differing[0]}; change the data back, begin a new run "
                "with --out, or go on with this data by --accept-data",
                [*differing[1:], *self.digest.changed_files(recorded["files"])],
            )
        self.accepted.append({"after_step": saved.step, "differences": differing})
        self.messages = (f"the run goes on with other data from step {saved.step + 1:,}: {'; '.join(differing)}",)
        return True


def comparable(plan: Plan, without: Sequence[str] = ()) -> dict[str, Any]:
    """The parts of a plan that must be the same when a run is resumed: all but where weights are, the plugins' versions,
    and how a batch is cut to fit a device."""

    def without_skipped(key: str, value: Any, skipped: tuple[str, ...]) -> Any:
        if key == "weights" and skipped:
            return value and value["sha256"]
        if key == "init_from" and skipped:
            return value and value["given"]
        if key in ("settings", "config"):
            skipped = ()  # Keys that components chose keep their meaning, whatever they are called.
        if isinstance(value, dict):
            return {name: without_skipped(name, inner, skipped) for name, inner in value.items() if name not in skipped}
        return [without_skipped("", inner, skipped) for inner in value] if isinstance(value, list | tuple) else value

    ignored = (
        "folder",
        "version",
        "attention",
        "evaluate",
        "candidates",
        "budget",
        "micro_batch_size",
        "workers",
        "allow_unreached",
        *without,
    )
    result: dict[str, Any] = without_skipped("", plan.to_json(), ignored)
    return result


def _differences(recorded: Any, current: Any, path: str = "") -> list[str]:
    if isinstance(recorded, dict) and isinstance(current, dict):
        keys = sorted(recorded.keys() | current.keys())
        return [
            d for key in keys for d in _differences(recorded.get(key), current.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if recorded == current else [f"{path}: {recorded!r} in the checkpoint, {current!r} now"]


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The random states of every process, by name. Collective."""
    import torch

    mine = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        mine["random/cuda"] = torch.cuda.get_rng_state(device)
    states = enumerate(processes.all_gather_object(mine))
    return {_of_process(name, rank): state for rank, found in states for name, state in found.items()}


def restore_random_states(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore this process's random states from what `random_states` returned; those that are missing stay as they are."""
    import torch

    if (saved := state.get(_of_process("random/cpu", processes.rank()))) is not None:
        torch.set_rng_state(saved)
    if device.type == "cuda" and (saved := state.get(_of_process("random/cuda", processes.rank()))) is not None:
        torch.cuda.set_rng_state(saved, device)


def _of_process(name: str, rank: int) -> str:
    return f"{name}/{rank}" if rank else name


def decayed(stepper: Stepper) -> Tensor:
    """Whether weight decay falls on each trained parameter, in their order."""
    import torch

    return torch.tensor([decays(stepper.assembly.model, name) for name in stepper.parameters])


def refuse_other_decay(state: Mapping[str, Tensor], own: Tensor, start: Path) -> None:
    """CheckpointError where weight decay fell on other parameters in the run that saved `state` than on its `own` here."""
    import torch

    # Runs that began before weight decay spared anything have not recorded what it spares.
    if spared := int((state.get("decays", torch.ones_like(own)) != own).sum()):
        raise CheckpointError(
            f"weight decay fell on other parameters in the run of '{start}' than it does here: {spared} biases and weights of "
            "normalisation layers; go on with the Graftwork that it began with, or start a new run with --out"
        )
