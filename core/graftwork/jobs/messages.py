"""What a job reports to whoever started it, besides the events of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Listener = Callable[[object], None]
"""Gets every `Event` of `graftwork.contracts`, every message of this module, and every `Scored` and `Compared` of
`graftwork.jobs.results`, in the order in which they happen."""


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
class Looking:
    """Something is looked at, which may take a while."""

    what: str


@dataclass(frozen=True)
class Answering:
    """Some of an evaluator's questions are done."""

    evaluator: str
    done: int
    total: int


@dataclass(frozen=True)
class Checking:
    """Some of a data set's records are looked at."""

    done: int
    total: int


@dataclass(frozen=True)
class WaitingForReplies:
    """A stage that asks a writer has got some replies."""

    stage: str
    replies: int


def ignore(message: object) -> None:
    """The listener that ignores everything."""
