"""What is in memory during a step: when every storage is allocated and freed, and what follows from that."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

CATEGORIES = (
    "frozen weights",
    "trained weights",
    "gradients",
    "optimizer state",
    "activations",
    "temporaries",
)
FROZEN, TRAINED, GRADIENTS, OPTIMIZER, ACTIVATIONS, TEMPORARIES = CATEGORIES
BUILD, PREPARATION, BATCH, FORWARD, BACKWARD, UPDATE = (
    "build",
    "preparation",
    "batch",
    "forward",
    "backward",
    "update",
)
"""The phases in which something can be allocated."""
MAX_GROUPS = 10
"""How many of the largest groups a footprint lists."""
MAX_POINTS = 240
"""How many points of a step a timeline keeps."""


@dataclass(eq=False, slots=True)
class Allocation:
    """One storage, from its allocation to its release."""

    size: int
    """In bytes."""
    allocated_at: int
    phase: str
    pass_index: int
    path: str
    """The module that made it, or the name of the weight, gradient or state."""
    shape: tuple[int, ...]
    dtype: str
    category: str = ""
    """Set where it is known; else it follows from how long the storage lived."""
    freed_at: int | None = None
    last_pass: int | None = None


@dataclass(frozen=True, slots=True)
class OpEvent:
    """One operation."""

    phase: str
    module: str
    operation: str
    pass_index: int
    """Counts the times that computing forwards changed to backwards, or back: recomputation is a pass of its own."""
    forwards: bool


@dataclass(frozen=True)
class AllocationGroup:
    """Equal storages that are alive at the peak: the same in every block of a model, for example."""

    category: str
    path: str
    """With `*` for a number that differs."""
    shape: tuple[int, ...]
    dtype: str
    count: int
    bytes: int
    """Of all of them."""


@dataclass(frozen=True)
class Footprint:
    """The memory that a step needs, and where it goes when it is fullest."""

    peak: int
    """In bytes, as is everything here."""
    categories: dict[str, int]
    """The bytes of each category at the peak; every one of `CATEGORIES`."""
    phase: str
    module: str
    operation: str
    largest: tuple[AllocationGroup, ...]
    timeline: tuple[tuple[str, dict[str, int]], ...] = ()
    """Phase and categories at points of one step, in order."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class MemoryTimeline:
    """Every allocation and every operation, in order. Time counts operations; an allocation lives through its own."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.op_events: list[OpEvent] = []

    @property
    def now(self) -> int:
        """The index of the last operation; -1 before the first."""
        return len(self.op_events) - 1

    def footprint(self, since: int, block_bytes: int = 1) -> Footprint:
        """The peak from the operation `since` on; sizes are rounded up to multiples of `block_bytes`, as allocators do."""
        end = self.now + 1
        lives = [
            (
                max(h.allocated_at, since),
                end if h.freed_at is None else h.freed_at,
                -(-h.size // block_bytes) * block_bytes,
                self.category_of(h),
                h,
            )
            for h in self.allocations
            if h.freed_at is None or h.freed_at > since
        ]
        changes: dict[str, list[int]] = {category: [0] * (end - since + 1) for category in CATEGORIES}
        for allocated_at, freed_at, size, category, _ in lives:
            changes[category][allocated_at - since] += size
            changes[category][freed_at - since] -= size
        sums = {category: running_sum(change)[:-1] for category, change in changes.items()}
        totals = [sum(values) for values in zip(*sums.values(), strict=True)]
        top = max(range(len(totals)), key=totals.__getitem__)
        event = self.op_events[since + top]
        alive = [
            (size, category, h)
            for allocated_at, freed_at, size, category, h in lives
            if allocated_at <= since + top < freed_at
        ]
        return Footprint(
            peak=totals[top],
            categories={category: values[top] for category, values in sums.items()},
            phase=event.phase,
            module=event.module,
            operation=event.operation,
            largest=tuple(group_allocations(alive)[:MAX_GROUPS]),
            timeline=tuple(
                (self.op_events[since + place].phase, {category: values[place] for category, values in sums.items()})
                for place in downsample(totals)
            ),
        )

    def category_of(self, allocation: Allocation) -> str:
        """The category of an allocation: what was set, or what follows from its lifetime.

        What a forward pass keeps for the backward pass is an activation; what is freed before, or made in the backward
        pass, is a temporary.
        """
        if allocation.category:
            return allocation.category
        if allocation.phase == BUILD:
            return FROZEN
        forwards = allocation.phase == BATCH or (
            allocation.allocated_at >= 0 and self.op_events[allocation.allocated_at].forwards
        )
        return ACTIVATIONS if forwards and allocation.last_pass != allocation.pass_index else TEMPORARIES


def running_sum(changes: Sequence[int]) -> list[int]:
    """The cumulative sums."""
    cumulative, value = [], 0
    for change in changes:
        value += change
        cumulative.append(value)
    return cumulative


def downsample(totals: Sequence[int]) -> list[int]:
    """The place of the largest total in each of at most `MAX_POINTS` equal pieces, so that no peak is lost."""
    size = -(-len(totals) // MAX_POINTS)
    starts = range(0, len(totals), size)
    return [max(range(start, min(start + size, len(totals))), key=totals.__getitem__) for start in starts]


def group_allocations(alive: Sequence[tuple[int, str, Allocation]]) -> list[AllocationGroup]:
    """The allocations that are alive, equal ones of several blocks in one group, the largest first."""
    sizes: Counter[tuple[str, str, tuple[int, ...], str]] = Counter()
    counts: Counter[tuple[str, str, tuple[int, ...], str]] = Counter()
    names: dict[tuple[str, str, tuple[int, ...], str], set[str]] = {}
    for size, category, allocation in alive:
        key = (category, re.sub(r"(?<=\.)\d+(?=\.|$)", "*", allocation.path), allocation.shape, allocation.dtype)
        sizes[key] += size
        counts[key] += 1
        names.setdefault(key, set()).add(allocation.path)
    groups = []
    for key, size in sizes.most_common():
        category, path, shape, dtype = key
        one = next(iter(names[key])) if len(names[key]) == 1 else path
        groups.append(AllocationGroup(category, one, shape, dtype, counts[key], size))
    return groups
