"""The budget: which memory strategies a run needs, and how many records it can take at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from graftwork.config.machine import Machine, chosen_device
from graftwork.config.restore import restore_component
from graftwork.config.sizes import format_size
from graftwork.contracts.kinds import MemoryStrategy
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Choice, Plan
from graftwork.errors import GraftworkError
from graftwork.memory import rehearsal
from graftwork.memory.images import Shown
from graftwork.memory.rehearsal import Step, Watched
from graftwork.memory.timeline import Footprint

if TYPE_CHECKING:
    from graftwork.contracts.assembly import Assembly

RESERVE = 1 << 30
"""The bytes of a CUDA device that are kept free for what the rehearsal does not see: the CUDA context, the workspaces of
libraries, and gaps between tensors. An estimate, not a measurement."""


@dataclass(frozen=True)
class Candidate:
    """One list of memory strategies, rehearsed."""

    strategies: tuple[str, ...]
    steps: tuple[Step, ...]
    """One for each micro-batch size that was rehearsed, the deciding one last; empty where rehearsal failed."""
    problem: str = ""
    """Why it could not be rehearsed."""
    not_rehearsed: tuple[str, ...] = ()
    """Those of the strategies that one process cannot rehearse, and that compute themselves what they save."""

    @property
    def name(self) -> str:
        """The strategies as people read them."""
        return ", ".join(self.strategies) or "none"

    @property
    def peak(self) -> int | None:
        """In bytes, at the deciding micro-batch size."""
        return self.steps[-1].footprint.peak if self.steps else None


@dataclass(frozen=True)
class CandidateSearch:
    """Every candidate of a plan, and the chosen one."""

    device: str
    budget: int | None
    """In bytes; None where it is not set, and then nothing is chosen."""
    candidates: tuple[Candidate, ...]
    chosen: int | None
    """The index of the chosen candidate; None where no candidate fits, or none could be rehearsed."""
    why: str

    @property
    def fits(self) -> bool | None:
        """Whether a candidate fits the budget; None without a budget."""
        return None if self.budget is None else self.chosen is not None

    @property
    def best(self) -> Candidate | None:
        """The chosen candidate, or else the one with the lowest peak."""
        if self.chosen is not None:
            return self.candidates[self.chosen]
        return min(
            (candidate for candidate in self.candidates if candidate.steps),
            key=lambda candidate: candidate.peak or 0,
            default=None,
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "fits": self.fits}


def search_candidates(
    plan: Plan,
    lookup: Lookup,
    machine: Machine,
    *,
    device: str,
    budget: int | None,
    longest: int | None = None,
    shown: Shown | None = None,
    processes: int = 1,
    listen: Callable[[str], None] = lambda line: None,
) -> CandidateSearch:
    """Rehearse the plan's candidates, and take the first that fits, with the largest micro-batch that fits.

    The micro-batch is the plan's own where it has one; otherwise a power of two, or the whole batch. All its records are as long as
    can be, and show what is `shown` (see `rehearsal.rehearsing`). `processes` is how
    many share the run. `listen` is called with the strategies of each candidate before its rehearsal.
    """
    run_context = plan.run_context
    found: list[Candidate] = []
    chosen: int | None = None
    for index, memory in enumerate(run_context.candidates or [run_context.memory]):
        listen(strategy_names(memory))
        # Candidates after the chosen one are rehearsed at its micro-batch size, for comparison.
        fixed = found[chosen].steps[-1].micro_batch if chosen is not None else None
        taken = with_candidate(plan, memory, fixed)
        found.append(rehearse(taken, lookup, machine, device, budget, longest, processes, shown))
        peak = found[-1].peak
        if chosen is None and peak is not None and (budget is None or peak <= budget):
            chosen = index
    why = reason(found, chosen, budget, run_context.train.batch_size)
    if run_context.train.compile:
        why += "; of blocks that are not compiled, as train.compile is not rehearsed"
    return CandidateSearch(device, budget, tuple(found), chosen, why)


def with_candidate(plan: Plan, memory: Sequence[Choice], micro_batch: int | None = None) -> Plan:
    """The plan with these memory strategies, and with a micro-batch size unless it is None. What is trained stays the same."""
    train = replace(plan.run_context.train, micro_batch_size=micro_batch or plan.run_context.train.micro_batch_size)
    return replace(plan, run_context=replace(plan.run_context, memory=list(memory), train=train))


def chosen_plan(plan: Plan, search: CandidateSearch) -> Plan:
    """The plan as it will run: on the chosen candidate. GraftworkError where there is none."""
    if search.chosen is None:
        hint = "add strategies to memory.try, shorten train.max_length, or use a larger device"
        raise GraftworkError(f"{search.why}; {hint}", lines(search))
    micro_batch = search.candidates[search.chosen].steps[-1].micro_batch
    memory = (plan.run_context.candidates or [plan.run_context.memory])[search.chosen]
    return with_candidate(plan, memory, micro_batch if search.budget is not None else None)


def rehearse(
    plan: Plan,
    lookup: Lookup,
    machine: Machine,
    device: str,
    budget: int | None,
    longest: int | None = None,
    processes: int = 1,
    shown: Shown | None = None,
) -> Candidate:
    """One candidate, at the plan's micro-batch size, or with a budget at the largest that fits it."""
    names = tuple(choice.name for choice in plan.run_context.memory)
    train = plan.run_context.train
    try:
        with counting(plan, lookup, machine, device, longest, processes, shown) as counted:

            def take(micro_batch: int) -> Step:
                return counted.whole(counted.watched.take(micro_batch))

            if train.micro_batch_size or train.batch_size == 1 or budget is None:
                fixed = min(train.micro_batch_size or (train.batch_size if budget is None else 1), train.batch_size)
                steps = [take(fixed)]
            else:
                steps = largest(take, train.batch_size, budget)
        return Candidate(names, tuple(steps), not_rehearsed=tuple(counted.not_rehearsed))
    except GraftworkError as error:
        return Candidate(names, (), error.sentence)
    except Exception as error:  # the code of any plugin runs here, on tensors that it was not written for
        lines = str(error).strip().splitlines() or [""]
        return Candidate(names, (), f"its code does not run on fake tensors ({type(error).__name__}: {lines[0][:200]})")


@dataclass(frozen=True)
class Counted:
    """A plan that is rehearsed but for some of its memory strategies."""

    watched: Watched
    not_rehearsed: Mapping[str, MemoryStrategy[Any]]
    """Strategies that one process cannot rehearse, and that compute themselves what they save, by their names."""
    processes: int

    def whole(self, step: Step) -> Step:
        """A step after their arithmetic."""
        strategies = [*self.not_rehearsed.values()]
        return replace(
            step, footprint=with_footprints(step.footprint, strategies, self.processes, self.watched.assembly)
        )


@contextmanager
def counting(
    plan: Plan,
    lookup: Lookup,
    machine: Machine,
    device: str,
    longest: int | None = None,
    processes: int = 1,
    shown: Shown | None = None,
) -> Iterator[Counted]:
    """Build a plan's model for rehearsals with those of its memory strategies that can be rehearsed."""
    strategies = [
        (choice, cast(MemoryStrategy[Any], restore_component(choice, lookup))) for choice in plan.run_context.memory
    ]
    kept = [choice for choice, each in strategies if type(each).footprint is MemoryStrategy.footprint]
    others = {choice.name: each for choice, each in strategies if choice not in kept}
    with rehearsal.rehearsing(
        with_candidate(plan, kept), lookup, machine, device=device, longest=longest, shown=shown
    ) as watched:
        yield Counted(watched, others, processes)


def with_footprints(
    footprint: Footprint, strategies: Sequence[MemoryStrategy[Any]], processes: int, assembly: Assembly
) -> Footprint:
    """A footprint after the arithmetic of strategies that one process cannot rehearse."""
    categories = dict(footprint.categories)
    for strategy in strategies:
        categories.update(strategy.footprint(categories, processes, assembly))
    return replace(footprint, categories=categories, peak=sum(categories.values())) if strategies else footprint


def largest(take: Callable[[int], Step], batch: int, budget: int) -> list[Step]:
    """Steps up to the largest micro-batch that fits, which is the last; only the first where not even that fits.

    Memory grows evenly with the micro-batch, so two sizes predict all others. The predicted size is rehearsed as well.
    """
    steps = [take(1)]
    if batch == 1 or steps[0].footprint.peak > budget:
        return steps
    second = take(2)
    if second.footprint.peak > budget:
        return steps
    steps.append(second)
    growth = max(1, second.footprint.peak - steps[0].footprint.peak)
    reach = min(batch, 2 + (budget - second.footprint.peak) // growth)
    size = batch if reach >= batch else 2 ** int(math.log2(reach))
    while size > 2:
        step = take(size)
        if step.footprint.peak <= budget:
            return [*steps, step]
        size = 2 ** int(math.log2(size - 1))
    return steps


def reason(candidates: Sequence[Candidate], chosen: int | None, budget: int | None, batch: int) -> str:
    """Why that candidate is chosen, in one sentence."""
    if chosen is None:
        peaks = [candidate.peak for candidate in candidates if candidate.peak is not None]
        if not peaks:
            return f"the plan cannot be rehearsed: {candidates[0].problem}"
        return f"no candidate fits into {format_size(budget or 0)}: the smallest needs {format_size(min(peaks))}"
    step, name = candidates[chosen].steps[-1], candidates[chosen].name
    strategies = "no memory strategy" if name == "none" else name
    if budget is None:
        return f"a step needs {format_size(step.footprint.peak)} with {strategies}"
    first = "the first that fits" if chosen else "the fastest, and it fits"
    accumulated = math.ceil(batch / step.micro_batch)
    times = f", {accumulated} times for each step" if accumulated > 1 else ""
    return (
        f"{strategies} ({first} into {format_size(budget)}), {step.micro_batch} of {batch} records at a time{times}: "
        f"{format_size(step.footprint.peak)}"
    )


def lines(search: CandidateSearch) -> list[str]:
    """A line for each candidate."""
    return [
        f"{candidate.name}: {format_size(candidate.peak)} for {candidate.steps[-1].micro_batch} at a time"
        if candidate.peak is not None
        else f"{candidate.name}: {candidate.problem}"
        for candidate in search.candidates
    ]


def budget_bytes(plan: Plan, device_bytes: int = 0) -> int | None:
    """The bytes that a plan's tensors may take: its own budget, and no more than a device with so many free ones has, less the reserve;
    None where neither is known."""
    limits = [plan.run_context.budget, max(0, device_bytes - RESERVE) if device_bytes else None]
    return min((limit for limit in limits if limit is not None), default=None)


def next_fallback(plan: Plan) -> Plan | None:
    """What to try where a plan's memory runs out: its next candidate, or else half the micro-batch; None where it is 1."""
    run_context = plan.run_context
    remaining = (
        run_context.candidates[run_context.candidates.index(run_context.memory) + 1 :] if run_context.candidates else []
    )
    if remaining:
        return with_candidate(plan, remaining[0])
    size = run_context.train.micro_batch_size or run_context.train.batch_size
    return with_candidate(plan, run_context.memory, (size + 1) // 2) if size > 1 else None


def strategy_names(memory: Sequence[Choice]) -> str:
    """Memory strategies as people read them in a sentence."""
    return ", ".join(choice.name for choice in memory) or "no memory strategy"


def describe_memory(plan: Plan) -> str:
    """How a plan uses memory, as people read it."""
    train = plan.run_context.train
    return f"{strategy_names(plan.run_context.memory)}, {train.micro_batch_size or train.batch_size} records at a time"


def enforce(plan: Plan, device: str | None) -> None:
    """Let PyTorch take no more of a CUDA device than the plan's budget, which is that of tensors, and what is reserved for the gaps between
    them; a CPU has no such limit."""
    import torch

    chosen = chosen_device(device)
    if plan.run_context.budget is not None and chosen.type == "cuda":
        total = torch.cuda.get_device_properties(chosen).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (plan.run_context.budget + RESERVE) / total), chosen)
