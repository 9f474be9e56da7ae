"""What a job reports to whoever started it, besides the events of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from graftwork.evaluate.comparison import Comparison
    from graftwork.evaluate.evaluation import Result

Listener = Callable[[object], None]
"""Gets every `Event` of `graftwork.contracts`, and every message of this module, in the order in which they happen."""


@dataclass(frozen=True)
class Message:
    """A sentence for a person."""

    text: str
    level: Literal["info", "success", "warning", "error"] = "info"


@dataclass(frozen=True)
class Rehearsing:
    """A list of memory strategies is being rehearsed, which takes seconds."""

    strategies: str


@dataclass(frozen=True)
class Answering:
    """Some of an evaluator's questions are done."""

    evaluator: str
    done: int
    total: int


@dataclass(frozen=True)
class Scored:
    """A model was scored, without a base to compare it with."""

    result: Result


@dataclass(frozen=True)
class Compared:
    """Base and adapter were compared."""

    comparison: Comparison


def ignore(message: object) -> None:
    """The listener that ignores everything."""
