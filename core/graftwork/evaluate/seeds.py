"""The same run on other data, with several seeds: what the data changes, with intervals over seeds and questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftwork.contracts.kinds import Evaluator
from graftwork.contracts.records import Record, image_key, unit_key
from graftwork.contracts.score import Prediction
from graftwork.errors import DataError
from graftwork.evaluate.scores import ADAPTER, BASE, members_of, totals_and_draws
from graftwork.evaluate.statistics import Interval, interval_over_seeds

if TYPE_CHECKING:
    from graftwork.evaluate.scores import Draws

Answers = Mapping[str, Prediction]
"""The answers of a run by the ids of their questions."""


@dataclass(frozen=True)
class SeedScores:
    """One number of the runs on one data set."""

    by_seed: Mapping[int, float]
    score: Interval
    """Their mean."""
    over_base: Interval | None = None
    """The mean of their differences to the base; None without a base."""
    over_own: Interval | None = None
    """The mean of their differences to the runs of the same seeds on the run's own data; None for these, and without such runs."""


@dataclass(frozen=True)
class SeedRow:
    """A line of the table: the whole benchmark, or one group."""

    name: str
    questions: int
    judged: bool
    """Whether more is better, as of the metric and of each group's score; of other numbers that is not known."""
    base: float | None
    data: Mapping[str, SeedScores]
    """By the name of the data."""


@dataclass(frozen=True)
class DataComparison:
    """Runs on several data sets, asked the same questions."""

    evaluator: str
    metric: str
    own: str
    """What the run's own data is called."""
    percent: bool
    """Whether scores lie from 0 to 1 and are shown in per cent."""
    questions: int
    """Those that all runs were asked."""
    images: int
    left_out: int
    """Questions that some run could not be asked."""
    rows: tuple[SeedRow, ...] = field(repr=False)
    """The metric first, then the groups."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def compare_data(
    evaluator: Evaluator[Any], records: Sequence[Record], runs: Mapping[str, Mapping[int, Answers]], own: str
) -> DataComparison:
    """Compare runs, by data and seed, on the questions that all of them were asked.

    Differences are paired by question, and by seed; see `statistics.interval_over_seeds`. Raises DataError where no question is left.
    """
    each = {(data, seed): answers for data, by_seed in runs.items() for seed, answers in by_seed.items()}
    # What counts as a whole is left out as a whole.
    missing = {unit_key(record) for record in records if not all(record.id in answers for answers in each.values())}
    asked = [record for record in records if unit_key(record) not in missing]
    if not asked:
        raise DataError(f"no question of '{evaluator.name}' was asked of all {len(each)} runs; see their evaluations")
    bases = _bases(asked, each)
    columns = {(run, ADAPTER) for run in each} | {(run, BASE) for run in bases.values()}
    joined = [_joined(record, sorted(columns), each) for record in asked]
    totals, draws = totals_and_draws(evaluator, joined)
    shown = [value for numbers in totals.values() for value in numbers.values()]
    percent = all(0 <= value <= 1 for value in [*shown, *_best(evaluator, asked)])
    numbers = _Numbers(own, runs, bases, percent, totals, draws)
    groups = {evaluator.metric, *(one.group for one in joined)}
    rows = tuple(
        SeedRow(
            name,
            len(members),
            name in groups,
            numbers.base(name),
            {data: numbers.scores(data, name) for data in runs},
        )
        for name, members in members_of(evaluator, joined, totals).items()
    )
    return DataComparison(
        evaluator.name,
        evaluator.metric,
        own,
        percent=percent,
        questions=len(asked),
        images=len({image_key(record) for record in asked}),
        left_out=len(records) - len(asked),
        rows=rows,
    )


Run = tuple[str, int]
"""A run by its data and its seed."""


def _bases(asked: Sequence[Record], each: Mapping[Run, Answers]) -> dict[Run, Run]:
    """For each run with a base the first one whose base gives the same answers: mostly one for all, unless a part of the base was
    newly initialised in each run."""
    known: dict[tuple[str, ...], Run] = {}
    return {
        run: known.setdefault(tuple(answers[record.id].answers[BASE] for record in asked), run)
        for run, answers in each.items()
        if all(BASE in answers[record.id].answers for record in asked)
    }


def _joined(record: Record, columns: Sequence[tuple[Run, str]], each: Mapping[Run, Answers]) -> Prediction:
    """The answers of several runs to a question as those of one prediction, in which each variant of each run is one."""
    found = {_column(run, variant): (each[run][record.id], variant) for run, variant in columns}
    texts = {name: one.answers[variant] for name, (one, variant) in found.items()}
    return Prediction(record, texts, {name: one.scores[variant] for name, (one, variant) in found.items()}, {}, 0.0)


def _column(run: Run, variant: str) -> str:
    return f"{variant} of {run[0]}, seed {run[1]}"


def _best(evaluator: Evaluator[Any], asked: Sequence[Record]) -> Sequence[float]:
    """The numbers of right answers to all questions; none where a question has no reference."""
    if not all(record.reference for record in asked):
        return ()
    return [*evaluator.total([evaluator.best_score(record) for record in asked]).values()]


@dataclass(frozen=True)
class _Numbers:
    """The numbers of all runs, in all questions and in their resamples."""

    own: str
    runs: Mapping[str, Mapping[int, Answers]]
    bases: Mapping[Run, Run]
    percent: bool
    totals: Mapping[str, Mapping[str, float]]
    draws: Draws

    def base(self, name: str) -> float | None:
        """A number of the base, as the mean over the runs on the first data."""
        data, seeds = next(iter(self.runs.items()))
        found = [self.totals[column][name] for seed in seeds if (column := self.base_of((data, seed)))]
        return sum(found) / len(found) if found else None

    def base_of(self, run: Run) -> str:
        """The column of a run's base; empty where it has none."""
        return _column(self.bases[run], BASE) if run in self.bases else ""

    def scores(self, data: str, name: str) -> SeedScores:
        """A number of the runs on one data set."""
        mine = {seed: _column((data, seed), ADAPTER) for seed in self.runs[data]}
        bases = {seed: base for seed in mine if (base := self.base_of((data, seed)))}
        own = {seed: _column((self.own, seed), ADAPTER) for seed in self.runs.get(self.own, ()) if seed in mine}
        return SeedScores(
            {seed: self.totals[column][name] for seed, column in mine.items()},
            self.mean(name, [(column, "") for column in mine.values()]),
            self.mean(name, [(mine[seed], base) for seed, base in bases.items()]) if bases else None,
            self.mean(name, [(mine[seed], column) for seed, column in own.items()])
            if own and data != self.own
            else None,
        )

    def mean(self, name: str, pairs: Sequence[tuple[str, str]]) -> Interval:
        """The mean of a number over columns, each less another column where one is named."""
        import numpy as np

        numbers = [self.totals[mine][name] - (self.totals[other][name] if other else 0.0) for mine, other in pairs]
        drawn = [self.draws[mine][name] - (self.draws[other][name] if other else 0.0) for mine, other in pairs]
        found = interval_over_seeds(numbers, np.mean(drawn, axis=0))
        # Student's t knows no end, and scores do.
        return found.within(-1.0 if pairs[0][1] else 0.0, 1.0) if self.percent else found
