"""What a run resolves to, and how much memory a step of it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from graftwork.build import compose
from graftwork.build.outline import Outline
from graftwork.build.outline import outline as outline_of
from graftwork.checkpoint import ancestry
from graftwork.checkpoint.manifest import Ancestor, told
from graftwork.config.machine import Machine, detect_machine, free_bytes
from graftwork.config.sizes import parse_size
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Plan
from graftwork.errors import GraftworkError
from graftwork.jobs.messages import Listener, Looking, Rehearsing, ignore
from graftwork.jobs.run import Run, installed
from graftwork.memory import budget, images
from graftwork.memory.budget import CandidateSearch
from graftwork.memory.images import AN_IMAGE, Shown
from graftwork.memory.weather import Forecast, Weather


@dataclass(frozen=True)
class Planned:
    """A run that was resolved, and rehearsed where that was asked for."""

    plan: Plan
    outline: Outline
    search: CandidateSearch | None
    """What the rehearsal found; None without one."""
    missing_files: Sequence[str]
    """What is not there yet, and needed to train or evaluate: sentences."""
    out: Path
    weather: Weather | None = None
    """Which batches of the data would not fit; None unless that was asked for."""
    unknown_images: str = ""
    """Why the images of the data are not known, so that others were rehearsed; empty where they are, or nothing was rehearsed."""
    ancestors: tuple[Ancestor, ...] = ()
    """What the run begins with, and what that began with, the oldest first; empty where everything begins anew."""

    @property
    def begins_with(self) -> str:
        """The same as a phrase; empty where everything begins anew."""
        return told(self.ancestors)

    @property
    def fits(self) -> bool | None:
        """Whether it fits into the memory that is allowed; None where that is not known."""
        return self.search.fits if self.search else None

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "plan": self.plan.to_json(),
            "outline": asdict(self.outline),
            "memory": self.search.to_json() if self.search else None,
            "weather": self.weather.to_json() if self.weather else None,
            "missing_files": [*self.missing_files],
            "unknown_images": self.unknown_images,
            "out": str(self.out),
            "initialised_from": [asdict(ancestor) for ancestor in self.ancestors],
        }


def plan(
    run: Run | Mapping[str, Any] | str | PathLike[str],
    *,
    device_memory: str | None = None,
    processes: int = 1,
    rehearse: bool = True,
    weather: bool = False,
    on_event: Listener = ignore,
    lookup: Lookup | None = None,
) -> Planned:
    """Resolve a run, count its parameters, and rehearse a step on tensors without content.

    No weights are read; what is not there yet is listed. `device_memory` is the memory of a CUDA device to rehearse for,
    such as `24GiB`; `processes` how many share the step. With `weather` the run's data is read, and it is told which of its
    batches would not fit; GraftworkError where that cannot be told. Raises RunFileError and PlanRefused with every mistake.
    """
    run, lookup, missing_files, machine = Run.of(run), lookup or installed(), list[str](), detect_machine()
    resolved = run.plan(lookup, fetch=False, missing=missing_files)
    allowed = budget.budget_bytes(resolved, parse_size(device_memory) if device_memory is not None else free_bytes())
    ancestors = ancestors_of(resolved, lookup, missing_files)
    outline = outline_of(resolved, lookup, machine)
    if outline.no_processor and not any(line.startswith("model.weights:") for line in missing_files):
        missing_files.append(f"model: {outline.no_processor}")
    search, shown, unknown_images = None, None, ""
    if rehearse and outline.trained:
        if not outline.no_processor:
            shown, unknown_images = images_of(resolved, lookup, on_event)
        search = budget.search_candidates(
            resolved,
            lookup,
            machine,
            device="cuda" if machine.cuda or allowed is not None else "cpu",
            budget=allowed,
            shown=shown,
            processes=processes,
            listen=lambda strategies: on_event(Rehearsing(strategies)),
        )
    told = weather_of(resolved, lookup, machine, search, processes, on_event) if weather else None
    return Planned(resolved, outline, search, missing_files, run.out, told, unknown_images, ancestors)


def weather_of(
    plan: Plan, lookup: Lookup, machine: Machine, search: CandidateSearch | None, processes: int, listen: Listener
) -> Weather:
    """Which of a plan's batches would not fit, with the memory strategies and the micro-batch that its search came to."""
    if search is None or search.best is None:
        raise GraftworkError(f"there is no weather without a rehearsal{': ' + search.why if search else ''}")
    if search.budget is None:
        raise GraftworkError("weather needs to know the memory; set memory.budget, or give --device-memory")
    if not plan.run_context.sources:
        raise GraftworkError("weather needs data; name a source in data.source")
    memory = (plan.run_context.candidates or [plan.run_context.memory])[search.candidates.index(search.best)]
    chosen = budget.with_candidate(plan, memory, search.best.steps[-1].micro_batch)
    listen(Looking("the batches of the data"))
    with budget.counting(chosen, lookup, machine, search.device, processes=processes, shown=AN_IMAGE) as counted:
        return Forecast(chosen, lookup, counted, search.budget, lambda what: listen(Looking(what))).weather()


def images_of(plan: Plan, lookup: Lookup, listen: Listener) -> tuple[Shown | None, str]:
    """The largest images of a plan's data, None where there are none; and why they are not known. Collective."""
    if not plan.run_context.sources:
        return None, ""
    listen(Looking("the images of the data"))
    try:
        return images.of_data(plan, lookup, compose.processor_of(plan, lookup)), ""
    except GraftworkError as error:
        return None, error.sentence


def ancestors_of(plan: Plan, lookup: Lookup, missing_files: list[str]) -> tuple[Ancestor, ...]:
    """What a plan begins with, as far as it is there; CheckpointError where it does not fit."""
    ref = plan.run_context.init_from
    if ref and not Path(ref.path).exists():
        missing_files.append(f"peft.init_from: there is no folder '{ref.path}'")
        return ()
    found = ancestry.beginning(plan, lookup, hashed=False)
    return found.ancestors if found else ()
