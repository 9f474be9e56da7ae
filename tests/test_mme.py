"""MME: both layouts of its folders, and points for answers and for images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from graftwork.contracts import BadRecord, Prediction, Record, Score
from graftwork.errors import DataError
from graftwork.evaluate.questions import read_questions
from graftwork.evaluate.scores import describe_maximum, is_percent, tabulate
from graftwork_mme import TASKS, Asked, Mme, MmeSettings, parse

ALL = [task for tasks in TASKS.values() for task in tasks]
ENDING = "Answer the question using a single word or phrase."


def mme(folder: Path, images: int = 3) -> Mme:
    """Every task with as many images, the first five in two folders each, the others in one."""
    for number, task in enumerate(ALL):
        image_folder = folder / task / "images" if number < 5 else folder / task
        text_folder = folder / task / "questions_answers_YN" if number < 5 else folder / task
        for path in (image_folder, text_folder):
            path.mkdir(parents=True, exist_ok=True)
        for image in range(images):
            (image_folder / f"{image:04}.{('jpg', 'png')[image % 2]}").touch()
            lines = f"Is it {task}? Please answer yes or no.\tYes\nIs it not?  Please answer yes or no.\tNo\n"
            (text_folder / f"{image:04}.txt").write_text(lines, encoding="utf-8")
    return Mme(MmeSettings(folder))


def scores(evaluator: Mme, answer: Callable[[Record], str]) -> list[Score]:
    return [evaluator.score(one, answer(one)) for one in evaluator.records() if isinstance(one, Record)]


def test_both_layouts_are_read(tmp_path: Path) -> None:
    found = [one for one in mme(tmp_path).records() if isinstance(one, Record)]
    assert len(found) == 14 * 3 * 2
    first, last = found[0], found[-1]
    assert first.question == f"<image>\nIs it existence?\n{ENDING}"
    assert found[1].question == f"<image>\nIs it not?\n{ENDING}"
    assert [one.reference for one in found[:2]] == [("yes",), ("no",)]
    assert first.images[0].path == tmp_path / "existence" / "images" / "0000.jpg"
    assert last.images[0].path == tmp_path / "code_reasoning" / "0002.jpg"
    assert (last.id, last.group) == ("code_reasoning/0002/2", "code_reasoning")
    assert last.where == f"{tmp_path / 'code_reasoning' / '0002.txt'}:2"


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        *[("Yes", "yes"), ("yes, there is", "yes"), ("NO.", "no"), ("no yes", "no"), ("I do", "other")],
        *[("", "other"), ("A yes", "other"), ("an yes", "other"), ("Not", "no"), ("know", "no"), ("noyes", "no")],
    ],
)
def test_yes_and_no_are_looked_for_in_the_first_four_characters(answer: str, meaning: str) -> None:
    assert parse(answer) == meaning


def test_points_are_two_thousand_and_eight_hundred_at_most(tmp_path: Path) -> None:
    evaluator = mme(tmp_path)
    totals = evaluator.total(scores(evaluator, lambda record: record.reference[0]))
    assert [*totals][:4] == ["points", "perception", "cognition", "existence"]
    assert (totals["points"], totals["perception"], totals["cognition"]) == (2800, 2000, 800)
    assert {totals[task] for task in ALL} == {200}


def test_always_yes_gives_half_the_answers_and_no_image(tmp_path: Path) -> None:
    evaluator = mme(tmp_path)
    totals = evaluator.total(scores(evaluator, lambda record: "Yes"))
    assert (totals["OCR"], totals["perception"], totals["cognition"]) == (50, 500, 200)


def test_an_image_counts_only_with_both_answers_right(tmp_path: Path) -> None:
    evaluator = mme(tmp_path)
    right = scores(evaluator, lambda record: "no" if record.id == "count/0001/1" else record.reference[0])
    assert evaluator.total(right)["count"] == pytest.approx(100 * 5 / 6 + 100 * 2 / 3)
    unanswered = [one for one in right if (one.group, one.detail) != ("count", Asked("0001", 1))]
    assert evaluator.total(unanswered)["count"] == pytest.approx(100 + 100 * 2 / 3)


def test_a_resample_counts_an_image_as_often_as_it_was_drawn() -> None:
    evaluator = Mme(MmeSettings())
    good = [Score(1.0, "count", Asked("a", number)) for number in (1, 2)]
    bad = [Score(float(number == 1), "count", Asked("b", number)) for number in (1, 2)]
    totals = evaluator.total([*good, *bad, *good, *good])
    assert totals == {"points": 162.5, "perception": 162.5, "count": 100 * 7 / 8 + 100 * 3 / 4}
    assert evaluator.total(bad + bad)["count"] == 50


def test_points_have_intervals_and_are_no_percentages(tmp_path: Path) -> None:
    evaluator = mme(tmp_path, images=4)
    ones = []
    for number, record in enumerate(one for one in evaluator.records() if isinstance(one, Record)):
        text = record.reference[0] if number % 8 else "maybe"
        ones.append(Prediction(record, {"adapter": text}, {"adapter": evaluator.score(record, text)}, {}, 0))
    rows = tabulate(evaluator, ones)
    assert not is_percent(rows)
    assert [row.records for row in rows[:4]] == [112, 80, 32, 8]
    for row in rows:
        score = row.scores["adapter"]
        assert score.low is not None and score.high is not None
        assert score.low < score.value < score.high
    assert rows[0].majority == 700


def test_what_cannot_be_asked_says_where_and_why(tmp_path: Path) -> None:
    evaluator = mme(tmp_path)
    text_folder = tmp_path / "count" / "questions_answers_YN"
    (text_folder / "0000.txt").write_text("Is it?\tYes\n", encoding="utf-8")
    (text_folder / "0001.txt").write_text("Is it?\tYes\nIs it not?\tMaybe\n", encoding="utf-8")
    (tmp_path / "count" / "images" / "0002.jpg").unlink()
    for file in (tmp_path / "OCR").iterdir():
        file.unlink()
    (tmp_path / "OCR").rmdir()
    bad = [one for one in evaluator.records() if isinstance(one, BadRecord)]
    assert [one.where for one in bad] == [*(str(text_folder / f"000{n}.txt") for n in range(3)), str(tmp_path / "OCR")]
    for one, why in zip(bad, ["has 1 questions", "question 2 is not", "no image", "folder is missing"], strict=True):
        assert why in one.why


def test_a_folder_without_tasks_is_one_sentence(tmp_path: Path) -> None:
    assert list(Mme(MmeSettings()).validate(None)) == ["'folder' is not set"]
    with pytest.raises(DataError, match="has no folder of a task, such as 'existence'"):
        list(Mme(MmeSettings(tmp_path)).records())


@pytest.mark.parametrize(
    ("limit", "points"), [(1, 200), (2, 200), (3, 200), (4, 400), (10, 800), (42, 2800), (None, 2800)]
)
def test_right_answers_score_the_maximum_of_what_was_asked_at_any_limit(
    tmp_path: Path, limit: int | None, points: int
) -> None:
    evaluator = mme(tmp_path)
    records, _ = read_questions(evaluator, limit=limit)
    assert len(records) == 2 * (limit or 42)
    for answer, score in (("right", points), ("wrong", 0)):
        texts = {one.id: one.reference[0] if answer == "right" else "" for one in records}
        given = [
            Prediction(one, {"adapter": texts[one.id]}, {"adapter": evaluator.score(one, texts[one.id])}, {}, 0)
            for one in records
        ]
        rows = tabulate(evaluator, given)
        assert (rows[0].scores["adapter"].value, rows[0].maximum) == (score, points)
        assert not is_percent(rows)
        assert describe_maximum(rows) == f"Right answers to all of these questions score {points:,}.0 points."
