"""Intervals over seeds and questions hold what they promise, and differences are paired by both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from tiny_vlm import Quiz, question

from graftwork.contracts import Prediction, Record, Score
from graftwork.errors import DataError
from graftwork.evaluate.seeds import Answers, DataComparison, compare_data
from graftwork.evaluate.statistics import interval, interval_over_seeds, resample_sums

GROUPS = ("colour", "shape")
SEEDS = (5, 6, 7)


def test_the_interval_covers_the_truth_where_one_over_questions_alone_does_not() -> None:
    """Differences with effects of seeds, of questions, and of both together: how often does the interval hold their mean?"""
    generator = np.random.default_rng(3)
    seeds, questions, repetitions, truth = 3, 60, 300, 4.0
    covered: Counter[str] = Counter()
    for _ in range(repetitions):
        of_seeds, of_questions = generator.normal(0, 3, (seeds, 1)), generator.normal(0, 8, (1, questions))
        differences = truth + of_seeds + of_questions + generator.normal(0, 6, (seeds, questions))
        draws = resample_sums(differences.mean(axis=0)[:, None], resamples=400)[:, 0] / questions
        alone = interval(differences.mean(), draws)
        both = interval_over_seeds([*differences.mean(axis=1)], draws)
        for name, found in (("questions alone", alone), ("seeds and questions", both)):
            assert found.low is not None and found.high is not None
            covered[name] += found.low <= truth <= found.high
    assert 0.93 <= covered["seeds and questions"] / repetitions <= 0.98
    assert covered["questions alone"] / repetitions < 0.75


def test_two_seeds_bound_nothing() -> None:
    assert not interval_over_seeds([0.1, 0.3], np.zeros(10)).known
    found = interval_over_seeds([0.1, 0.2, 0.3], np.full(10, 0.2))
    assert found.low is not None and found.high is not None
    # Student's t with two degrees of freedom: 4.30 standard errors of 0.1 / sqrt(3).
    assert found.high - found.value == pytest.approx(4.303 * 0.1 / 3**0.5, rel=0.05)
    assert found.value - found.low == pytest.approx(found.high - found.value)


class Summed(Quiz):
    """A quiz whose numbers are no means: ten points for each right answer, and the share of questions of a colour"""

    def total(self, scores: Sequence[Score]) -> Mapping[str, float]:
        groups = Counter(score.group for score in scores)
        return {self.metric: 10 * sum(score.value for score in scores), "share": groups["colour"] / len(scores)}


RECORDS = [question(str(number), "is it", image=f"{number // 2}.png", group=GROUPS[number % 2]) for number in range(40)]


def answers(
    right: Mapping[str, float], *, seed: int = 5, records: Sequence[Record] = RECORDS, base: bool = True
) -> dict[str, Prediction]:
    """Answers of a run that has about these shares of each group right, of a base that has every tenth question right."""
    found: dict[str, Prediction] = {}
    for place, record in enumerate(records):
        said = {"base": place % 10 == 0} if base else {}
        said["adapter"] = (place * 7 + seed) % 20 < 20 * right[record.group]
        scores = {variant: Score(float(correct), record.group) for variant, correct in said.items()}
        texts = {variant: "yes" if correct else "no" for variant, correct in said.items()}
        found[record.id] = Prediction(record, texts, scores, {}, 0.1)
    return found


def runs(shape: float, seeds: Sequence[int] = SEEDS) -> dict[int, Answers]:
    return {seed: answers({"colour": 0.9, "shape": shape}, seed=seed) for seed in seeds}


def compared(own: Mapping[int, Answers], other: Mapping[int, Answers], quiz: Quiz | None = None) -> DataComparison:
    return compare_data(quiz or Quiz(), RECORDS, {"own": own, "other": other}, "own")


def test_differences_are_paired_and_say_where_data_hurts() -> None:
    found = compared(runs(0.9), runs(0.3))
    assert [row.name for row in found.rows] == ["accuracy", "colour", "shape"] and found.percent
    assert (found.questions, found.images, found.left_out) == (40, 20, 0)
    _, colour, shape = found.rows
    assert colour.data["other"].over_own is not None and not colour.data["other"].over_own.excludes_zero
    hurt = shape.data["other"].over_own
    assert hurt is not None and hurt.excludes_zero and hurt.high is not None and hurt.high < 0
    assert hurt.value == pytest.approx(shape.data["other"].score.value - shape.data["own"].score.value)
    assert shape.base == pytest.approx(sum(place % 10 == 0 for place in range(1, 40, 2)) / 20)
    own = shape.data["own"]
    assert own.over_own is None and own.over_base is not None
    assert own.over_base.value == pytest.approx(own.score.value - shape.base)
    assert own.score.value == pytest.approx(sum(own.by_seed.values()) / 3) and [*own.by_seed] == [*SEEDS]


def test_equal_runs_differ_by_nothing_however_much_seeds_differ() -> None:
    """What seeds and questions have in common on both sides cancels out."""
    own = {seed: answers({"colour": 0.9, "shape": 0.2 * (seed - 4)}, seed=seed) for seed in SEEDS}
    row = compared(own, own).rows[0].data["other"]
    assert row.over_own is not None and (row.over_own.value, row.over_own.low, row.over_own.high) == (0, 0, 0)
    assert row.score.low is not None and row.score.value - row.score.low > 0.05


def test_bounds_go_no_further_than_scores_can() -> None:
    own = {
        seed: answers({"colour": right, "shape": right}, seed=seed)
        for seed, right in zip(SEEDS, (1, 0.9, 0.1), strict=True)
    }
    row = compared(runs(0.9), own).rows[0].data["other"]
    assert (row.score.low, row.score.high) == (0, 1)
    assert row.over_own is not None and row.over_own.low == -1


def test_questions_that_some_run_was_not_asked_are_left_out_as_wholes() -> None:
    short = runs(0.9)
    short[6] = {id: one for id, one in short[6].items() if id != "4"}
    found = compared(runs(0.9), short)
    assert (found.questions, found.left_out) == (39, 1)
    assert found.rows[0].data["own"].by_seed == compared(short, runs(0.9)).rows[0].data["other"].by_seed
    whole = [replace(record, unit="turned" if place < 4 else "") for place, record in enumerate(RECORDS)]
    one = {seed: answers({"colour": 0.9, "shape": 0.9}, seed=seed, records=whole) for seed in SEEDS}
    del one[6]["3"]
    assert compare_data(Quiz(), whole, {"own": one}, "own").left_out == 4
    with pytest.raises(DataError, match="no question of 'quiz' was asked of all 6 runs"):
        compared(runs(0.9), {5: {}, 6: {}, 7: {}})


def test_numbers_that_are_no_means_are_those_of_the_benchmark() -> None:
    found = compared(runs(0.9), runs(0.3), Summed())
    assert not found.percent
    accuracy, share = found.rows
    assert accuracy.data["own"].by_seed[5] == 10 * sum(
        one.scores["adapter"].value for one in answers({"colour": 0.9, "shape": 0.9}).values()
    )
    change = accuracy.data["other"].over_own
    assert change is not None and change.excludes_zero and accuracy.judged
    assert not share.judged and share.data["own"].score.value == 0.5


def test_only_seeds_of_both_are_paired_and_two_of_them_bound_nothing() -> None:
    other = compared(runs(0.9), runs(0.3, (6, 7, 8))).rows[0].data["other"]
    assert other.over_own is not None and not other.over_own.known
    assert other.score.known and other.over_base is not None and other.over_base.known
    without = compare_data(Quiz(), RECORDS, {"other": runs(0.3)}, "own").rows[0].data["other"]
    assert without.over_own is None


def test_without_a_base_nothing_is_compared_with_it() -> None:
    own = {seed: answers({"colour": 0.9, "shape": 0.9}, seed=seed, base=False) for seed in SEEDS}
    row = compared(own, own).rows[0]
    assert row.base is None and row.data["own"].over_base is None


def test_bases_that_differ_between_runs_are_each_the_base_of_its_own() -> None:
    own = runs(0.9)
    own[6] = {
        id: Prediction(one.record, one.answers, {**one.scores, "base": one.scores["adapter"]}, {}, 0.1)
        for id, one in own[6].items()
    }
    own[6] = {
        id: Prediction(one.record, {**one.answers, "base": one.answers["adapter"]}, one.scores, {}, 0.1)
        for id, one in own[6].items()
    }
    row = compared(own, runs(0.9)).rows[0]
    found, by_seed = row.data["own"].over_base, row.data["own"].by_seed
    assert found is not None and found.value == pytest.approx((by_seed[5] + by_seed[7] - 0.2) / 3)
