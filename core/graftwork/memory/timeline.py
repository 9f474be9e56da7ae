"""What lies in memory during a step: the birth and death of every storage, and what is known from them."""

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
"""The phases in which something can be born."""
SHOWN = 10
"""How many of the largest things a footprint names."""
POINTS = 240
"""How many moments of a step a timeline keeps."""


@dataclass(eq=False, slots=True)
class Allocation:
    """One storage, from its birth to its death."""

    size: int
    """In bytes."""
    born: int
    phase: str
    pass_index: int
    path: str
    """The module that made it, or the name of what it is."""
    shape: tuple[int, ...]
    dtype: str
    category: str = ""
    """Where it is known by itself; else it follows from the life that it had."""
    died: int | None = None
    last_pass: int | None = None


@dataclass(frozen=True, slots=True)
class OpEvent:
    """One operation."""

    phase: str
    module: str
    operation: str
    pass_index: int
    """Counts the times that computing forwards changed to backwards, or back: recomputation is a pass_index of its own."""
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
    """What lies there at the peak; every one of `CATEGORIES`."""
    phase: str
    module: str
    operation: str
    largest: tuple[AllocationGroup, ...]
    timeline: tuple[tuple[str, dict[str, int]], ...] = ()
    """Phase and categories at moments of one step, in order."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class MemoryTimeline:
    """Every holding and every moment, in order. The clock counts moments; what is born in one lives through it."""

    def __init__(self) -> None:
        self.holdings: list[Allocation] = []
        self.moments: list[OpEvent] = []

    @property
    def now(self) -> int:
        """The number of the last moment; -1 before the first."""
        return len(self.moments) - 1

    def footprint(self, since: int, block_bytes: int = 1) -> Footprint:
        """The peak from the moment `since` to now; sizes are rounded up to multiples of `block_bytes`, as allocators do."""
        end = self.now + 1
        lives = [
            (
                max(h.born, since),
                end if h.died is None else h.died,
                -(-h.size // block_bytes) * block_bytes,
                self.judged(h),
                h,
            )
            for h in self.holdings
            if h.died is None or h.died > since
        ]
        changes: dict[str, list[int]] = {category: [0] * (end - since + 1) for category in CATEGORIES}
        for born, died, size, category, _ in lives:
            changes[category][born - since] += size
            changes[category][died - since] -= size
        courses = {category: running_sum(change)[:-1] for category, change in changes.items()}
        totals = [sum(values) for values in zip(*courses.values(), strict=True)]
        top = max(range(len(totals)), key=totals.__getitem__)
        moment = self.moments[since + top]
        alive = [(size, category, h) for born, died, size, category, h in lives if born <= since + top < died]
        return Footprint(
            peak=totals[top],
            categories={category: course[top] for category, course in courses.items()},
            phase=moment.phase,
            module=moment.module,
            operation=moment.operation,
            largest=tuple(gathered(alive)[:SHOWN]),
            timeline=tuple(
                (self.moments[since + place].phase, {category: course[place] for category, course in courses.items()})
                for place in thinned(totals)
            ),
        )

    def judged(self, holding: Allocation) -> str:
        """The category of a holding: what it was said to be, or what its life shows.

        What a computation forwards leaves behind for the gradients is an activation; what dies before, or is made on the
        way back, is a temporary.
        """
        if holding.category:
            return holding.category
        if holding.phase == BUILD:
            return FROZEN
        forwards = holding.phase == BATCH or (holding.born >= 0 and self.moments[holding.born].forwards)
        return ACTIVATIONS if forwards and holding.last_pass != holding.pass_index else TEMPORARIES


def running_sum(changes: Sequence[int]) -> list[int]:
    """The sums of the first one, two, … changes."""
    sums, value = [], 0
    for change in changes:
        value += change
        sums.append(value)
    return sums


def thinned(totals: Sequence[int]) -> list[int]:
    """The place of the largest total in each of at most `POINTS` equal pieces, so that no peak is lost."""
    size = -(-len(totals) // POINTS)
    starts = range(0, len(totals), size)
    return [max(range(start, min(start + size, len(totals))), key=totals.__getitem__) for start in starts]


def gathered(alive: Sequence[tuple[int, str, Allocation]]) -> list[AllocationGroup]:
    """What is alive, the same in several blocks taken together, the largest first."""
    sizes: Counter[tuple[str, str, tuple[int, ...], str]] = Counter()
    counts: Counter[tuple[str, str, tuple[int, ...], str]] = Counter()
    names: dict[tuple[str, str, tuple[int, ...], str], set[str]] = {}
    for size, category, holding in alive:
        key = (category, re.sub(r"(?<=\.)\d+(?=\.|$)", "*", holding.path), holding.shape, holding.dtype)
        sizes[key] += size
        counts[key] += 1
        names.setdefault(key, set()).add(holding.path)
    things = []
    for key, size in sizes.most_common():
        category, path, shape, dtype = key
        one = next(iter(names[key])) if len(names[key]) == 1 else path
        things.append(AllocationGroup(category, one, shape, dtype, counts[key], size))
    return things
