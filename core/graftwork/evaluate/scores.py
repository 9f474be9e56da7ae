"""An evaluation's table: scores with intervals, overall and by group, and what the adapter changed in them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from graftwork.contracts.kinds import Evaluator
from graftwork.contracts.records import Record, image_key, unit_key
from graftwork.contracts.score import Prediction, plain_sum
from graftwork.evaluate import statistics
from graftwork.evaluate.statistics import Interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Draws = Mapping[str, Mapping[str, NDArray[np.float64]]]

BASE, ADAPTER = "base", "adapter"
"""The variants: the model with its adapter off, and on."""
TOTAL_RESAMPLES = 1_000
"""Fewer than for means, because a benchmark's own `total` is called for each."""


@dataclass(frozen=True)
class Row:
    """A line of a table of scores: the whole benchmark, or one group."""

    name: str
    records: int
    scores: Mapping[str, Interval]
    """By variant."""
    maximum: float | None
    """The score of right answers to all of these questions; None where a question has no reference."""
    majority: float
    """The score of always giving the most common reference of these questions."""
    majority_answer: str
    difference: Interval | None = None
    """Adapter minus base."""
    ratio: Interval | None = None
    """Adapter over base; None where the base scores zero, and without bounds where a resample of it does."""
    p: float | None = None
    """Of McNemar's exact test; None where the number is not the mean of the questions' scores."""
    gained: int = 0
    lost: int = 0


def tabulate(evaluator: Evaluator[Any], answered: Sequence[Prediction]) -> tuple[Row, ...]:
    """The table of scores: the metric first, then whatever groups the evaluator has."""
    totals, draws = totals_and_draws(evaluator, answered)
    members = members_of(evaluator, answered, totals)
    return tuple(_row(evaluator, name, members[name], totals, draws) for name in members)


def totals_and_draws(
    evaluator: Evaluator[Any], answered: Sequence[Prediction]
) -> tuple[Mapping[str, Mapping[str, float]], Draws]:
    """Every number of each variant, and the same in resamples of the images, which all variants are drawn in together."""
    variants = tuple(answered[0].answers)
    totals = {variant: evaluator.total([one.scores[variant] for one in answered]) for variant in variants}
    clusters: dict[str, list[Prediction]] = {}
    images: dict[tuple[str, str], str] = {}
    for one in answered:  # A resample must not cut in two what counts as a whole, even if that has several images.
        image = images.setdefault(unit_key(one.record), image_key(one.record))
        clusters.setdefault(image, []).append(one)
    plain = type(evaluator).total is Evaluator.total
    draw = _draw_means if plain else _draw_totals
    return totals, draw(evaluator, list(clusters.values()), variants, list(totals[variants[0]]))


def members_of(
    evaluator: Evaluator[Any], answered: Sequence[Prediction], totals: Mapping[str, Mapping[str, float]]
) -> dict[str, Sequence[Prediction]]:
    """The questions of each number: those that it would have if they were the only one; all, where there are none."""
    variant, names = next(iter(totals.items()))
    members: dict[str, list[Prediction]] = {name: [] for name in names}
    for one in answered:
        for name in evaluator.total([one.scores[variant]]).keys() & members.keys():
            members[name].append(one)
    return {name: found or answered for name, found in members.items()}


def _row(
    evaluator: Evaluator[Any],
    name: str,
    members: Sequence[Prediction],
    totals: Mapping[str, Mapping[str, float]],
    draws: Draws,
) -> Row:
    common = majority_answer([one.record for one in members])
    always = [evaluator.score(one.record, common) for one in members]
    best = [evaluator.best_score(one.record) for one in members if one.record.reference]
    row = Row(
        name,
        len(members),
        {variant: statistics.interval(totals[variant][name], draws[variant][name]) for variant in totals},
        evaluator.total(best).get(name) if len(best) == len(members) else None,
        evaluator.total(always).get(name, 0.0),
        common,
    )
    if set(totals) != {BASE, ADAPTER}:
        return row
    base, adapter = totals[BASE][name], totals[ADAPTER][name]
    gained = sum(one.correct(ADAPTER) and not one.correct(BASE) for one in members)
    lost = sum(one.correct(BASE) and not one.correct(ADAPTER) for one in members)
    means = {variant: plain_sum(one.scores[variant].value for one in members) / len(members) for variant in totals}
    mean = all(
        math.isclose(means[variant], totals[variant][name], abs_tol=1e-9) for variant in totals
    )  # what the test is about
    known = draws[BASE][name] == draws[BASE][name]  # NaN where a resample holds no member of the group
    ratio = Interval(adapter / base) if base > 0 else None
    if ratio and (draws[BASE][name][known] > 0).all():
        ratio = statistics.interval(ratio.value, draws[ADAPTER][name] / draws[BASE][name])
    return replace(
        row,
        difference=statistics.interval(adapter - base, draws[ADAPTER][name] - draws[BASE][name]),
        ratio=ratio,
        p=statistics.mcnemar(gained, lost) if mean else None,
        gained=gained,
        lost=lost,
    )


def majority_answer(records: Sequence[Record]) -> str:
    """The most common reference, the first of equally common ones; what a model that sees nothing could always say."""
    counts = Counter(reference for record in records for reference in record.reference)
    return max(counts, key=counts.__getitem__, default="")


def _draw_means(
    evaluator: Evaluator[Any], clusters: Sequence[Sequence[Prediction]], variants: Sequence[str], names: Sequence[str]
) -> Draws:
    """Every mean in every resample, all at once: columns hold how many members a name has, and their scores by variant."""
    import numpy as np

    column = {name: position * (1 + len(variants)) for position, name in enumerate(names)}
    sums = np.zeros((len(clusters), len(names) * (1 + len(variants))))
    for row, cluster in zip(sums, clusters, strict=True):
        for one in cluster:
            for name in {evaluator.metric, one.group} - {""}:
                row[column[name]] += 1
                for offset, variant in enumerate(variants, start=1):
                    row[column[name] + offset] += one.scores[variant].value
    drawn = statistics.resample_sums(sums)
    with np.errstate(invalid="ignore"):
        return {
            variant: {name: drawn[:, column[name] + offset] / drawn[:, column[name]] for name in names}
            for offset, variant in enumerate(variants, start=1)
        }


def _draw_totals(
    evaluator: Evaluator[Any], clusters: Sequence[Sequence[Prediction]], variants: Sequence[str], names: Sequence[str]
) -> Draws:
    """The evaluator's own totals in every resample; NaN where a resample lacks a group."""
    import numpy as np

    draws = {variant: {name: np.full(TOTAL_RESAMPLES, np.nan) for name in names} for variant in variants}
    for number, drawn in enumerate(statistics.resample_clusters(len(clusters), resamples=TOTAL_RESAMPLES)):
        for variant in variants:
            total = evaluator.total([one.scores[variant] for cluster in drawn for one in clusters[cluster]])
            for name in total.keys() & draws[variant].keys():
                draws[variant][name][number] = total[name]
    return draws


def is_percent(rows: Sequence[Row]) -> bool:
    """Whether all scores lie from 0 to 1, those of right answers too, and are then shown in per cent."""
    scores = [score.value for row in rows for score in row.scores.values()]
    return all(0 <= score <= 1 for score in [*scores, *(row.maximum or 0.0 for row in rows)])


def format_score(value: float | None, percent: bool) -> str:
    """A score as people read it: `93.1%`, or `1,432.1`."""
    return "–" if value is None else f"{value:.1%}" if percent else f"{value:,.1f}"


def format_change(change: Interval, percent: bool) -> str:
    """A difference with its interval: `+84.1 [+80.0, +88.2]`, in percentage points where scores are in per cent."""
    bounds = f" [{_signed(change.low, percent)}, {_signed(change.high, percent)}]" if change.known else ""
    return _signed(change.value, percent) + bounds


def _signed(value: float | None, percent: bool) -> str:
    rounded = round((value or 0.0) * (100 if percent else 1), 1) or 0.0  # never -0.0
    return f"{rounded:+,.1f}"


def format_ratio(ratio: Interval | None) -> str:
    """A ratio with its interval: `0.53 [0.48, 0.59]`."""
    if ratio is None:
        return "undefined"
    return f"{ratio.value:.2f}" + (f" [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio.known else " (no interval)")


def describe_ratio(row: Row) -> str:
    """The ratio to the base in a sentence, also where there is none."""
    ratio = row.ratio
    if ratio is None:
        return "A ratio to the base is undefined, because the base scores zero."
    if not ratio.known:
        return (
            f"The adapter scores {ratio.value:.2f} times the base; an interval of this ratio cannot be given, because the base's "
            "score may be zero."
        )
    return f"The adapter scores {ratio.value:.2f} times the base (95% interval {ratio.low:.2f} to {ratio.high:.2f})."


def format_p(p: float | None) -> str:
    """A p value as people read it."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def describe_maximum(rows: Sequence[Row]) -> str:
    """The most that the metric can come to, where that is not 100%; empty otherwise and where it is not known."""
    whole = rows[0]
    if whole.maximum is None or is_percent(rows):
        return ""
    return f"Right answers to all of these questions score {format_score(whole.maximum, percent=False)} {whole.name}."


def describe_majority(rows: Sequence[Row], groups: Collection[str]) -> Iterator[str]:
    """A sentence for the metric and each group in which the adapter, or the only variant, does no better than one answer, always
    given. Right answers to all questions are not held against a group that has only one answer."""
    percent = is_percent(rows)
    for row in rows:
        score = list(row.scores.values())[-1].value
        perfect = row.maximum is not None and score >= row.maximum
        if (row is rows[0] or row.name in groups) and row.majority_answer and score <= row.majority and not perfect:
            majority = format_score(row.majority, percent)
            yield f"{row.name}: no better than always answering '{row.majority_answer}' ({majority})."


def describe_change(row: Row, subject: str, percent: bool) -> str:
    """What became of a score: `colour rose from 12.0% to 96.4% (+84.4 points, 95% interval +80.1 to +88.3, p < 0.001)`.

    It rose or fell only if the interval of the difference excludes zero.
    """
    base, adapter = format_score(row.scores[BASE].value, percent), format_score(row.scores[ADAPTER].value, percent)
    difference = row.difference or Interval(0.0)
    facts = [_signed(difference.value, percent) + " points" * percent]
    if difference.known:
        facts.append(f"95% interval {_signed(difference.low, percent)} to {_signed(difference.high, percent)}")
    if row.p is not None:
        facts.append(f"p {format_p(row.p)}" if row.p < 0.001 else f"p = {format_p(row.p)}")
    if difference.excludes_zero:
        change = f"{'rose' if difference.value > 0 else 'fell'} from {base} to {adapter}"
    else:
        change = f"did not change measurably: {base} before, {adapter} after"
    return f"{subject} {change} ({', '.join(facts)})"
