"""Answers and how good they are: what an evaluator gives for each, and what core keeps of a question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

from graftwork.contracts.records import Record


@dataclass(frozen=True)
class Score:
    """How good one answer is, from 0 to 1, and the group that it counts for."""

    value: float
    group: str = ""
    detail: Any = None
    """What the evaluator's own `total` has to know beyond that; core does not look into it."""


def plain_sum(values: Iterable[float]) -> float:
    """The values added from left to right, as published scripts did: from Python 3.12 on `sum` makes up for rounding, and the last bit
    of a score would depend on the interpreter."""
    return reduce(add, values, 0.0)


@dataclass(frozen=True)
class Prediction:
    """A question with the answers of each variant."""

    record: Record
    answers: Mapping[str, str]
    scores: Mapping[str, Score]
    tokens: Mapping[str, int]
    """Generated, by variant."""
    seconds: float
    ended: Mapping[str, bool] = field(default_factory=dict)
    """Whether an answer ended by itself, by variant, or was stopped at `max_new_tokens` or where the model's context ends."""

    @property
    def group(self) -> str:
        """The group that the question counts for."""
        return next(iter(self.scores.values())).group

    def correct(self, variant: str) -> bool:
        """Whether an answer counts as right where only right and wrong are told apart: a score of at least a half."""
        return self.scores[variant].value >= 0.5
