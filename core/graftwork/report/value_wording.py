"""How the worth of data is worded: the same rows and sentences on the page, in Markdown and in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from graftwork.evaluate.scores import format_change, format_score
from graftwork.evaluate.seeds import DataComparison, SeedRow, SeedScores
from graftwork.evaluate.statistics import MIN_SEEDS, Interval

OWN = "the run's own data"
RUN_HEADERS = ("data", "records", "steps", "healthy runs", "read from")
SCORE_HEADERS = ("", "data", "mean", "seeds", "against own, 95%", "against base, 95%")
MUCH = 1.25
"""From this ratio on, steps alone may be why runs differ."""


@dataclass
class DataRuns:
    """The runs on one data set."""

    name: str
    given: str
    """Where it was read from."""
    records: int
    """That can be used, as with the first seed."""
    steps: int
    """Of each run, as with the first seed."""
    healthy: list[int] = field(default_factory=list)
    """The seeds of the runs that count."""
    unhealthy: dict[int, str] = field(default_factory=dict)
    """Seed to what is wrong with the run."""


def run_rows(runs: Sequence[DataRuns]) -> list[tuple[str, ...]]:
    """What was trained, under `RUN_HEADERS`."""
    rows = list[tuple[str, ...]]()
    for each in runs:
        healthy = f"{len(each.healthy)} of {len(each.healthy) + len(each.unhealthy)}"
        rows.append((each.name, f"{each.records:,}", f"{each.steps:,}", healthy, each.given))
    return rows


def score_rows(comparison: DataComparison) -> list[tuple[str, ...]]:
    """The table under `SCORE_HEADERS`: the base, and each data, group by group."""
    percent, rows = comparison.percent, list[tuple[str, ...]]()
    for row in comparison.rows:
        lines = list[tuple[str, ...]]()
        if row.base is not None:
            lines.append(("base", format_score(row.base, percent), "", "", ""))
        lines += [(name, *_cells(scores, percent)) for name, scores in row.data.items()]
        rows += [(row.name if not place else "", *line) for place, line in enumerate(lines)]
    return rows


def _cells(scores: SeedScores, percent: bool) -> tuple[str, ...]:
    least, most = min(scores.by_seed.values()), max(scores.by_seed.values())
    changes = (format_change(each, percent) if each else "" for each in (scores.over_own, scores.over_base))
    spread = f"{format_score(least, percent)} to {format_score(most, percent)}"
    return format_score(scores.score.value, percent), spread, *changes


def worse(comparison: DataComparison) -> list[str]:
    """A sentence for each number that is surely lower than on the run's own data, or than the base's."""
    changes = [
        _changed(comparison, row, name, scores.over_own, "worse", f"than {OWN}")
        for row, name, scores in _judged(comparison)
        if scores.over_own and scores.over_own.excludes_zero and scores.over_own.value < 0
    ]
    forgotten = [
        _changed(comparison, row, name, scores.over_base, "below", "the base")
        for row, name, scores in _judged(comparison)
        if scores.over_base and scores.over_base.excludes_zero and scores.over_base.value < 0
    ]
    return changes + forgotten


def better(comparison: DataComparison) -> list[str]:
    """A sentence for each number that is surely higher than on the run's own data."""
    return [
        _changed(comparison, row, name, scores.over_own, "better", f"than {OWN}")
        for row, name, scores in _judged(comparison)
        if scores.over_own and scores.over_own.excludes_zero and scores.over_own.value > 0
    ]


def undecided(comparison: DataComparison) -> list[str]:
    """A sentence for each data on the numbers of which nobody can tell whether they differ from those on the run's own data."""
    found: dict[str, list[str]] = {}
    for row, name, scores in _judged(comparison):
        if scores.over_own and scores.over_own.known and not scores.over_own.excludes_zero:
            same = scores.over_own.low == scores.over_own.high
            change = "(the same in all)" if same else format_change(scores.over_own, comparison.percent)
            found.setdefault(name, []).append(f"{row.name} {change}")
    return [f"'{name}' cannot be told from {OWN}, for the noise: {', '.join(rows)}." for name, rows in found.items()]


def _judged(comparison: DataComparison) -> Iterator[tuple[SeedRow, str, SeedScores]]:
    """The scores of which more is better."""
    for row in comparison.rows:
        if row.judged:
            yield from ((row, name, scores) for name, scores in row.data.items())


def _changed(comparison: DataComparison, row: SeedRow, name: str, change: Interval | None, how: str, what: str) -> str:
    """`shape: 'unfiltered' is 12.3 points worse than the run's own data [-15.0, -9.6].`"""
    assert change is not None
    subject = OWN if name == comparison.own else f"'{name}'"
    scale, unit = (100, " points") if comparison.percent else (1, "")
    bounds = format_change(change, comparison.percent).partition(" ")[2]
    return f"{row.name}: {subject} is {abs(change.value) * scale:,.1f}{unit} {how} {what} {bounds}."


def caveats(runs: Sequence[DataRuns], comparisons: Sequence[DataComparison]) -> Iterator[str]:
    """What else a reader must not miss, a sentence each."""
    for each in runs:
        for why in dict.fromkeys(each.unhealthy.values()):
            seeds = [str(seed) for seed, found in each.unhealthy.items() if found == why]
            plural = "s" * (len(seeds) != 1)
            yield f"Run{plural} of '{each.name}' with the seed{plural} {', '.join(seeds)} left out, for what is wrong: {why}."
        if len(each.healthy) < MIN_SEEDS:
            yield (
                f"'{each.name}' has {len(each.healthy)} healthy run{'s' * (len(each.healthy) != 1)}, and so no interval: it takes "
                f"{MIN_SEEDS} seeds to tell their noise."
            )
    least, most = min(each.steps for each in runs), max(each.steps for each in runs)
    if most >= MUCH * least:
        steps = ", ".join(f"{each.steps:,} on '{each.name}'" for each in runs)
        yield f"The runs took different numbers of steps ({steps}), which alone may be why they differ; train.steps makes them equal."
    for found in comparisons:
        if found.left_out:
            yield (
                f"{found.left_out:,} of {found.questions + found.left_out:,} questions of {found.evaluator} could not be asked of "
                "every run, and are left out of all."
            )
        if found.rows[0].base is None:
            yield f"There is no base to compare with on {found.evaluator}: everything that was trained is new."
