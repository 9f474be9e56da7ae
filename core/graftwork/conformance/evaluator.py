"""What every evaluator must do: ask the same questions each time, and score the right answers best."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import groupby, islice, zip_longest
from typing import Any

from graftwork.conformance.outcome import Check, Skipped, Subject
from graftwork.contracts.kinds import Evaluator
from graftwork.contracts.records import BadRecord, Record, unit_key
from graftwork.contracts.score import Score

NONSENSE = "zxqv jkwp"
"""An answer that is right to no question."""
SCORED = 500
"""How many questions are scored; all of them are read."""
UNITS = 20
"""For so many whole questions, one after another, it is tried what right answers to them come to."""


def questions(subject: Subject) -> list[Record]:
    """The good records; Skipped when there is none."""
    read = subject.once("reading the questions", lambda: list(subject.create_valid().records()))
    found = [record for record in read if isinstance(record, Record)]
    if not found:
        raise Skipped("it has no questions with these settings")
    return found


def questions_are_records_with_ids_of_their_own(subject: Subject) -> Iterator[str]:
    """Records or BadRecords, every id once, and a question to each."""
    questions(subject)
    for item in subject.kept["reading the questions"]:
        if not isinstance(item, Record | BadRecord):
            yield f"'records' must give a Record or a BadRecord, and it gave a {type(item).__name__}; wrap it"
            return
    id, times = Counter(record.id for record in questions(subject)).most_common(1)[0]
    if times > 1:
        yield f"every question must have an id of its own, and {times} are called '{id}'; number them"
    for record in questions(subject):
        if not record.question.strip():
            yield f"every record must ask something, and '{record.id}' has no text of the user; give it a Turn(\"user\", …)"


def the_order_is_fixed(subject: Subject) -> Iterator[str]:
    """Another instance gives the same records in the same order."""
    first, again = questions(subject), [r for r in subject.create_valid().records() if isinstance(r, Record)]
    for number, (one, other) in enumerate(zip_longest(first, again), 1):
        if one != other:
            yield f"the questions must be the same each time, and number {number} of two readings differs; sort, and draw nothing"


def best_and_worst(subject: Subject) -> tuple[Any, list[Record], list[Score], list[Score]]:
    """The evaluator, the questions with references, and the scores of their best references and of nonsense."""
    evaluator: Evaluator[Any] = subject.create_valid()
    scored = [record for record in questions(subject) if record.reference][:SCORED]
    if not scored:
        raise Skipped("its questions have no reference answers")
    return (
        evaluator,
        scored,
        [evaluator.best_score(record) for record in scored],
        [evaluator.score(record, NONSENSE) for record in scored],
    )


def reference_answers_score_best(subject: Subject) -> Iterator[str]:
    """No worse than nonsense for any question, and better over all; an empty answer is no error."""
    evaluator, scored, best, worst = best_and_worst(subject)
    for record, good, bad in zip(scored, best, worst, strict=True):
        if good.value < max(bad.value, evaluator.score(record, "").value):
            yield (
                f"a reference must score best, and for '{record.id}' {record.reference[0]!r} has {good.value:g} and nonsense "
                f"has {bad.value:g}; fix 'score'"
            )
    if not sum(score.value for score in best) > sum(score.value for score in worst):
        yield "references must score better than nonsense, and over all questions they do not; fix 'score'"


def scores_are_from_0_to_1_and_repeat(subject: Subject) -> Iterator[str]:
    """A Score for every answer, the same each time, and in the same group whatever the answer."""
    evaluator, scored, best, worst = best_and_worst(subject)
    for record, good, bad in zip(scored, best, worst, strict=True):
        for score in (good, bad):
            if not isinstance(score, Score) or not 0.0 <= score.value <= 1.0:
                yield f"'score' must give a Score from 0 to 1, and for '{record.id}' it gave {score!r}; scale it"
        if good.group != bad.group:
            yield f"a question must count for one group, and '{record.id}' counts for '{good.group}' or '{bad.group}'; use its own"
        if evaluator.score(record, NONSENSE) != bad:
            yield f"an answer must score the same each time, and one to '{record.id}' does not; keep no state in 'score'"


def totals_hold_the_metric(subject: Subject) -> Iterator[str]:
    """Finite numbers with the metric among them, which is higher for better answers."""
    evaluator, _, best, worst = best_and_worst(subject)
    totals, low = evaluator.total(best), evaluator.total(worst)
    if evaluator.metric not in totals or evaluator.metric not in low:
        yield f"'total' must hold the metric '{evaluator.metric}', and it holds {', '.join(totals) or 'nothing'}; add it, or name the metric"
        return
    for name, value in [*totals.items(), *low.items()]:
        if not math.isfinite(value):
            yield f"totals must be finite numbers, and '{name}' is {value}; mind groups without answers"
        if type(evaluator).total is Evaluator.total and not 0.0 <= value <= 1.0:
            yield f"totals must be from 0 to 1, and '{name}' is {value}; scale the scores"
    if not math.isfinite(evaluator.total(best[:1]).get(evaluator.metric, 0.0)):
        yield "'total' must take a single score, and of one it makes no finite number; mind groups without answers"
    if not totals[evaluator.metric] > low[evaluator.metric]:
        yield f"the metric '{evaluator.metric}' must be higher for right answers than for nonsense, and it is not; turn it round"


def what_counts_together_has_a_unit(subject: Subject) -> Iterator[str]:
    """Records of one unit follow one another, and right answers to more whole questions never have a lower metric."""
    ended, last = set[tuple[str, str]](), None
    for record in questions(subject):
        if (unit := unit_key(record)) in ended:
            yield f"records of one unit must follow one another, and others lie between those of '{record.unit}'; sort them by it"
        if last not in (None, unit):
            ended.add(last)
        last = unit
    evaluator, scored, best, _ = best_and_worst(subject)
    if len(questions(subject)) < len(subject.kept["reading the questions"]):
        return  # A whole with a malformed record cannot be right.
    so_far, reached = list[Score](), -math.inf
    for _, group in islice(groupby(zip(scored, best, strict=True), lambda pair: unit_key(pair[0])), UNITS):
        pairs = list(group)
        if any(score.value < 1.0 for _, score in pairs):
            continue
        so_far += [score for _, score in pairs]
        total = evaluator.total(so_far).get(evaluator.metric, reached)
        if total < reached - 1e-9:
            yield (
                f"right answers must never cost, and '{evaluator.metric}' falls from {reached:g} to {total:g} when that to "
                f"'{pairs[0][0].id}' is added; give records that count only together the same 'unit'"
            )
        reached = max(reached, total)


CHECKS: tuple[Check, ...] = (
    questions_are_records_with_ids_of_their_own,
    the_order_is_fixed,
    reference_answers_score_best,
    scores_are_from_0_to_1_and_repeat,
    totals_hold_the_metric,
    what_counts_together_has_a_unit,
)
