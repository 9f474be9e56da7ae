"""What observers are told of, in the order of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.contracts.verdict import Failure


@dataclass(frozen=True)
class Event:
    """Something that happened in a run; `out` is the run's folder."""

    out: Path


@dataclass(frozen=True)
class RunStarted(Event):
    """The model is built; training begins or resumes at `step`."""

    step: int
    steps: int
    plan: Any
    notes: tuple[str, ...] = ()
    """What the memory strategies say of themselves."""
    warnings: tuple[str, ...] = ()
    """What a person should know of how it is resumed, and of what is trained and cannot learn, a sentence each."""


@dataclass(frozen=True)
class StepTaken(Event):
    """One optimizer step; `loss` is the mean over the step's labelled tokens, in nats."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    images: int
    """Of the step's records, in however many views or tiles the model sees each."""
    tokens: int
    seconds: float
    memory: int = 0
    """The most bytes that tensors have taken of the device so far; 0 on a device that does not say."""


@dataclass(frozen=True)
class NotLearning(Event):
    """After the first steps some of what is trained has not learned anything; the run goes on."""

    step: int
    findings: tuple[str, ...]
    """A clause each."""


@dataclass(frozen=True)
class RunWarned(Event):
    """Something does not work as was asked for; the run goes on, as the sentence says."""

    sentence: str


@dataclass(frozen=True)
class MemoryRanOut(RunWarned):
    """The device's memory did not hold a step; the run begins again, or goes on, as the sentence says."""


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint has its final name."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Evaluated(Event):
    """An evaluator's scores are known: `scores[variant][metric or group]`."""

    evaluator: str
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True)
class RunStopped(Event):
    """A signal ended the run after a step."""

    step: int
    steps: int
    signal: str
    """Its name, such as SIGTERM."""
    folder: Path | None
    """The checkpoint of that step; None where nothing was there to save."""


@dataclass(frozen=True)
class RunEnded(Event):
    """Training is over; `healthy` is the verdict and `reasons` what speaks against it."""

    step: int
    healthy: bool
    reasons: tuple[str, ...]
    failure: Failure = ""
    """How a run failed: it did not learn, or it broke."""
