"""Differences are paired and drawn by image, p values are exact, and forgetting is said in words."""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_vlm import Quiz, question

from graftwork.cli.printing import print_comparison, print_scores
from graftwork.contracts import BadRecord, Prediction, Score
from graftwork.errors import DataError
from graftwork.evaluate.comparison import Comparison, compare
from graftwork.evaluate.evaluation import Result
from graftwork.evaluate.scores import (
    Row,
    format_change,
    format_p,
    format_ratio,
    format_score,
    majority_answer,
    tabulate,
)
from graftwork.evaluate.statistics import Interval, interval, mcnemar, resample_sums
from graftwork.report import ReportContent, write_report


def answered(
    name: str, base: float, adapter: float, *, image: str = "", group: str = "", reference: str = "yes"
) -> Prediction:
    scores = {"base": Score(base, group), "adapter": Score(adapter, group)}
    tokens = {"base": 1, "adapter": 1}
    record = question(name, "is it", image=image, group=group, reference=reference)
    return Prediction(record, {"base": f"b{base}", "adapter": f"a{adapter}"}, scores, tokens, 0.1)


def result(ones: Sequence[Prediction], quiz: Quiz | None = None) -> Result:
    return Result(quiz or Quiz(), tuple(ones), (), {})


def overall(ones: Sequence[Prediction]) -> Row:
    return tabulate(Quiz(), ones)[0]


def compared(ones: Sequence[Prediction], trained: Sequence[str] | None = None) -> Comparison:
    return compare(result(ones), trained)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(9, 1, 22 / 1024), (1, 9, 22 / 1024), (5, 5, 1.0), (0, 0, 1.0), (10, 0, 2 / 1024), (3, 0, 0.25)],
)
def test_mcnemar_is_exact(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == p


def test_mcnemar_neither_overflows_nor_rounds_with_many_changes() -> None:
    assert mcnemar(5000, 5000) == 1.0
    assert 0 < mcnemar(5300, 4700) < 1e-8
    assert mcnemar(20_000, 0) == 0.0


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_doubled_binomial_tail(gained: int, lost: int) -> None:
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail))


def test_resampled_sums_are_those_of_drawing_rows_one_by_one() -> None:
    generator = np.random.default_rng(5)
    rows = np.column_stack([np.ones(40), generator.integers(0, 2, 40), generator.random(40).round(1)])
    fast = resample_sums(rows, resamples=40_000)
    drawn = generator.integers(40, size=(40_000, 40))
    slow = rows[drawn].sum(axis=1)
    assert (fast[:, 0] == 40).all()
    assert np.cov(fast[:, 1:].T) == pytest.approx(np.cov(slow[:, 1:].T), rel=0.05)
    assert np.percentile(fast, [2.5, 50, 97.5], axis=0) == pytest.approx(
        np.percentile(slow, [2.5, 50, 97.5], axis=0), abs=0.6
    )


def test_an_interval_holds_the_middle_95_percent_of_the_resamples_that_exist() -> None:
    draws = np.append(np.arange(1001.0), np.nan)
    assert interval(400.0, draws) == Interval(400.0, 25.0, 975.0)
    assert interval(400.0, np.array([np.nan])) == Interval(400.0)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(11)
    hits = 0
    for _ in range(200):
        values = (generator.random(120) < 0.3).astype(float)
        sums = resample_sums(values[:, None], resamples=1000)
        bounds = interval(values.mean(), sums[:, 0] / 120)
        assert bounds.low is not None and bounds.high is not None
        hits += bounds.low <= 0.3 <= bounds.high
    assert 180 <= hits <= 198


def test_questions_about_one_image_do_not_make_a_score_surer() -> None:
    single = [answered(str(n), n % 2, (n % 3) / 2, image=f"{n}.png") for n in range(30)]
    tenfold = [answered(f"{n}-{k}", n % 2, (n % 3) / 2, image=f"{n}.png") for n in range(30) for k in range(10)]
    apart = [answered(f"{n}-{k}", n % 2, (n % 3) / 2, image=f"{n}-{k}.png") for n in range(30) for k in range(10)]
    assert overall(tenfold).scores == overall(single).scores
    assert overall(tenfold).difference == overall(single).difference
    wide, narrow = overall(tenfold).scores["base"], overall(apart).scores["base"]
    assert wide.low is not None and narrow.low is not None
    assert wide.value - wide.low > 2 * (narrow.value - narrow.low)


def test_a_difference_is_paired() -> None:
    generator = np.random.default_rng(2)
    right = (generator.random(200) < 0.5).astype(float)
    ones = [answered(str(n), value, value if n else 1 - value) for n, value in enumerate(right)]
    row = overall(ones)
    assert row.difference is not None and row.difference.low is not None and row.difference.high is not None
    score = row.scores["base"]
    assert score.low is not None and score.high is not None
    assert row.difference.high - row.difference.low <= 0.02 < score.high - score.low


def test_the_same_answers_always_give_the_same_numbers() -> None:
    ones = [answered(str(n), n % 2, (n % 3) / 2, group="xy"[n % 2]) for n in range(50)]
    assert tabulate(Quiz(), ones) == tabulate(Quiz(), ones)


def test_rows_hold_the_metric_then_the_groups_with_what_was_gained_and_lost() -> None:
    ones = [
        answered("1", 0, 1, group="colour"),
        answered("2", 0, 1, group="colour"),
        answered("3", 1, 0, group="shape"),
        answered("4", 1, 1, group="shape"),
    ]
    whole, colour, shape = tabulate(Quiz(), ones)
    assert [row.name for row in (whole, colour, shape)] == ["accuracy", "colour", "shape"]
    assert [(row.records, row.gained, row.lost) for row in (whole, colour, shape)] == [(4, 2, 1), (2, 2, 0), (2, 0, 1)]
    assert whole.difference is not None and whole.difference.value == 0.25
    assert whole.p == mcnemar(2, 1)
    assert colour.scores["base"] == Interval(0, 0, 0)
    assert colour.ratio is None, "a ratio to zero means nothing"
    assert shape.ratio is not None and shape.ratio.value == 0.5


def test_a_ratio_has_no_interval_where_a_resample_of_the_base_has_no_right_answer() -> None:
    ones = [answered(str(n), float(n == 0), 1) for n in range(6)]
    assert overall(ones).ratio == Interval(6.0)
    assert compared(ones).notes[0] == (
        "The adapter scores 6.00 times the base; an interval of this ratio cannot be given, because the base's score may be "
        "zero."
    )


def test_a_ratio_to_zero_is_undefined_in_words() -> None:
    notes = compared([answered(str(n), 0, float(n == 0)) for n in range(6)]).notes
    assert notes[0] == "A ratio to the base is undefined, because the base scores zero."


def test_the_interval_of_a_ratio_is_about_fiellers() -> None:
    """Fieller, Some Problems in Interval Estimation, J. R. Stat. Soc. B 16, 1954: the ratios that are not refuted."""
    generator = np.random.default_rng(4)
    base = (generator.random(600) < 0.4).astype(float)
    adapter = np.where(generator.random(600) < 0.7, base, (generator.random(600) < 0.6).astype(float))
    row = overall(
        [answered(str(n), b, a) for n, (b, a) in enumerate(zip(base.tolist(), adapter.tolist(), strict=True))]
    )
    variances = np.cov(base, adapter) / 600 * 1.96**2
    quadratic = [
        base.mean() ** 2 - variances[0, 0],
        2 * (variances[0, 1] - base.mean() * adapter.mean()),
        adapter.mean() ** 2 - variances[1, 1],
    ]
    high, low = np.roots(quadratic)
    assert row.ratio is not None and row.ratio.low is not None and row.ratio.high is not None
    assert row.ratio.value == pytest.approx(adapter.mean() / base.mean())
    assert (row.ratio.low, row.ratio.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    independent = 1.96 * row.ratio.value * (0.24 / 600) ** 0.5 * (1 / base.mean() ** 2 + 1 / adapter.mean() ** 2) ** 0.5
    assert row.ratio.high - row.ratio.low < 0.8 * 2 * independent, "the variants are drawn together"


def test_questions_that_could_not_be_asked_are_in_a_second_denominator() -> None:
    ones = [answered("1", 0, 1), answered("2", 1, 1)]
    comparison = compare(Result(Quiz(), tuple(ones), (BadRecord("file:1", "no image"),) * 2, {}))
    assert (comparison.read, comparison.questions, comparison.bad) == (4, 2, 2)
    assert comparison.notes[1] == (
        "2 of 4 questions could not be asked; with zero for them the mean score is 25.0% (base) and 50.0% (adapter)."
    )


def test_a_variant_that_always_says_the_same_is_noticed() -> None:
    ones = [answered(str(n), float(n % 2), 1, reference=str(n)) for n in range(4)]
    assert compared(ones).notes[1:] == ("The adapter gave one and the same answer to every question: 'a1'.",)
    assert len(compared([answered(str(n), 1, 1) for n in range(4)]).notes) == 1, "all references are the same as well"


def shapes(right: Sequence[bool]) -> list[Prediction]:
    """Five shapes, three of them rectangles, and a colour that is always right."""
    names = ["rectangle", "circle", "rectangle", "triangle", "rectangle"]
    drawn = [
        answered(name + str(n), 0, float(hit), group="shape", reference=name)
        for n, (name, hit) in enumerate(zip(names, right, strict=True))
    ]
    return [*drawn, *(answered(f"{name}?", 0, 1, group="colour", reference=name) for name in ("red", "green", "blue"))]


def test_a_group_that_does_no_better_than_one_answer_is_named_everywhere(tmp_path: Path) -> None:
    said = "shape: no better than always answering 'rectangle' (60.0%)."
    for right in ([True, False] * 2 + [True], [False] * 5):
        comparison = compared(shapes(right))
        assert [note for note in comparison.notes if "no better" in note][-1:] == [said]
        write_report(tmp_path, ReportContent("run", comparisons=[comparison]))
        alone = [Prediction(o.record, {"adapter": ""}, {"adapter": o.scores["adapter"]}, {}, 0) for o in shapes(right)]
        assert said in result(alone).to_json()["notes"]
        for printed in (
            (tmp_path / "report.md").read_text(encoding="utf-8"),
            html.unescape((tmp_path / "report.html").read_text(encoding="utf-8")),
            printed_by(print_comparison, comparison),
            printed_by(print_scores, result(alone)),
        ):
            assert said in printed
            assert "colour: no better" not in printed


def test_a_score_above_the_majoritys_or_right_throughout_is_not_held_against_a_group() -> None:
    assert not [note for note in compared(shapes([True] * 4 + [False])).notes if "no better" in note]
    assert not [note for note in compared(shapes([True] * 5)).notes if "no better" in note]
    one_answer = [answered(str(n), 0, 1, group="same") for n in range(3)]
    assert not [note for note in compared(one_answer).notes if "no better" in note]
    missed = [*one_answer, answered("x", 0, 0, group="same")]
    assert "same: no better than always answering 'yes' (100.0%)." in compared(missed).notes


def printed_by(printer: Callable[[Console, Any], None], shown: object) -> str:
    out = io.StringIO()
    printer(Console(file=out, width=200), shown)
    return out.getvalue()


def test_one_variant_alone_has_scores_and_no_difference() -> None:
    ones = [
        Prediction(o.record, {"adapter": ""}, {"adapter": o.scores["adapter"]}, {}, 0) for o in [answered("1", 0, 1)]
    ]
    row = tabulate(Quiz(), ones)[0]
    assert row.scores["adapter"].value == 1
    assert (row.difference, row.p) == (None, None)
    with pytest.raises(DataError, match="did not ask base and adapter both"):
        compare(result(ones))


class Points(Quiz):
    """A benchmark whose total is a sum"""

    def total(self, scores: Sequence[Score]) -> Mapping[str, float]:
        return {"accuracy": 100 * sum(score.value for score in scores), "best": max(score.value for score in scores)}


def test_a_benchmark_with_its_own_total_is_resampled_through_it() -> None:
    ones = [answered(str(n), 0, float(n % 2), group="g") for n in range(40)]
    whole, best = tabulate(Points(), ones)
    assert whole.scores["adapter"].value == 2000
    assert whole.difference is not None and whole.difference.low is not None
    assert 1200 < whole.difference.low < 1600
    assert (best.records, best.p, whole.p) == (40, None, None), "no mean, no test of single answers"
    comparison = compare(result(ones, Points()))
    assert not comparison.percent
    assert "from 0.0 to 2,000.0" in comparison.headline


def test_the_majority_answer_is_the_most_common_reference_and_is_scored_by_the_evaluator() -> None:
    references = ["yes"] * 3 + ["red"] * 2
    ones = [answered(str(n), 0, 0, reference=r, group="q" if r == "red" else "p") for n, r in enumerate(references)]
    whole, yes_no, colour = tabulate(Quiz(), ones)
    assert (whole.majority_answer, whole.majority) == ("yes", 0.6)
    assert (yes_no.majority_answer, yes_no.majority) == ("yes", 1.0)
    assert (colour.majority_answer, colour.majority) == ("red", 1.0)
    assert majority_answer([]) == ""


def test_flips_are_the_questions_that_one_variant_alone_answers() -> None:
    ones = [answered("up", 0, 1, image="a.png"), answered("down", 0.6, 0.4), answered("same", 0, 0.3)]
    comparison = compared(ones)
    assert [(flip.id, flip.gained) for flip in comparison.flips] == [("up", True), ("down", False)]
    assert str(comparison.flips[0].image) == "a.png"
    assert comparison.flips[1].image is None


def test_what_was_not_trained_on_and_fell_is_said_in_a_sentence() -> None:
    colour = [answered(f"c{n}", float(n < 2), 1, group="colour") for n in range(60)]
    yes_no = [answered(f"y{n}", float(n < 56), float(n < 25), group="yes/no") for n in range(60)]
    steady = [answered(f"s{n}", float(n % 2), float((n + (n < 2)) % 2), group="count") for n in range(60)]
    comparison = compared([*colour, *yes_no, *steady], trained=["colour"])
    steadily, fell = comparison.forgetting
    assert comparison.untrained == ("count", "yes/no")
    assert fell.startswith("yes/no, which was not trained on, fell from 93.3% to 41.7% (-51.7 points, 95% interval -")
    assert fell.endswith("p < 0.001).")
    assert steadily.startswith(
        "count, which was not trained on, did not change measurably: 50.0% before, 50.0% after ("
    )
    assert comparison.headline.startswith("Accuracy rose from 48.9% to ")
    assert "on 180 questions about 180 images; always answering 'yes' scores 100.0%." in comparison.headline


def test_without_known_training_groups_nothing_is_said_of_forgetting() -> None:
    ones = [answered("1", 1, 0, group="shape")]
    assert compared(ones).forgetting == ()
    assert compared(ones, trained=["shape"]).forgetting == ()
    assert len(compared(ones, trained=[]).forgetting) == 1


def test_a_comparison_is_plain_json() -> None:
    content = json.loads(json.dumps(compared([answered("1", 0, 1, image="p.png")]).to_json(), allow_nan=False))
    assert content["flips"][0]["image"] == "p.png"
    assert content["rows"][0]["difference"]["value"] == 1


def test_numbers_are_shown_as_people_read_them() -> None:
    assert format_score(0.9314, True) == "93.1%"
    assert format_score(1432.06, False) == "1,432.1"
    assert format_score(None, True) == "–"
    assert format_change(Interval(-0.521, -0.6, -0.441), True) == "-52.1 [-60.0, -44.1]"
    assert format_change(Interval(3.0), False) == "+3.0"
    assert format_change(Interval(-0.0001), True) == "+0.0"
    assert format_ratio(Interval(0.534, 0.48, 0.59)) == "0.53 [0.48, 0.59]"
    assert (format_ratio(Interval(2.0)), format_ratio(None)) == ("2.00 (no interval)", "undefined")
    assert (format_p(0.0004), format_p(0.0214), format_p(None)) == ("< 0.001", "0.021", "–")
