"""POPE: answers are taken for yes or no, and measured, as the published script does."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from graftwork.contracts import BadRecord, Prediction, Record, Score
from graftwork.errors import DataError
from graftwork.evaluate.scores import tabulate
from graftwork_pope import Pope, PopeSettings

GOLDEN = Path(__file__).parent / "golden_eval" / "pope"
CASES = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
ENDING = "Answer the question using a single word or phrase."


def pope(folder: Path, categories: Sequence[str] = ("random",)) -> Pope:
    """The golden labels, for each category, with a question file as LLaVA has it."""
    (folder / "coco").mkdir(exist_ok=True)
    lines = []
    for category in categories:
        labels = (GOLDEN / "coco" / "coco_pope_random.json").read_text(encoding="utf-8")
        (folder / "coco" / f"coco_pope_{category}.json").write_text(labels, encoding="utf-8")
        for label in map(json.loads, labels.splitlines()):
            (folder / label["image"]).touch()
            question = {"question_id": len(lines), "image": label["image"], "category": category}
            lines.append(json.dumps({**question, "text": f"{label['text']}\n{ENDING}"}))
    (folder / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return Pope(PopeSettings(folder / "questions.jsonl", folder / "coco", folder))


def scored(evaluator: Pope) -> list[Prediction]:
    asked = [one for one in evaluator.records() if isinstance(one, Record)]
    texts = CASES["texts"] * (len(asked) // len(CASES["texts"]))
    return [
        Prediction(record, {"adapter": text}, {"adapter": evaluator.score(record, text)}, {}, 0)
        for record, text in zip(asked, texts, strict=True)
    ]


def test_the_measures_are_those_that_upstream_prints(tmp_path: Path) -> None:
    evaluator = pope(tmp_path)
    ones = scored(evaluator)
    assert [one.record.reference[0] for one in ones] == CASES["labels"]
    totals = evaluator.total([one.scores["adapter"] for one in ones])
    printed = dict(re.findall(r"(\w[\w ]*): ([\d.]+)", CASES["upstream_stdout"]))
    for name, value in printed.items():
        ours = {"Accuracy": "random", "F1 score": "random: F1", "Yes ratio": "random: yes ratio"}
        assert totals[ours.get(name, f"random: {name.lower()}")] == float(value)
    assert len(printed) == 5
    assert totals["accuracy"] == totals["random"]
    assert totals["mean F1"] == totals["F1"] == totals["random: F1"]


def test_the_mean_f1_weighs_categories_equally() -> None:
    evaluator = Pope(PopeSettings())
    right, wrong = Score(1.0, "popular", "yes"), Score(0.0, "random", "yes")
    totals = evaluator.total([right, wrong, wrong, wrong])
    assert (totals["accuracy"], totals["mean F1"]) == (0.25, 0.5)
    assert totals["F1"] == pytest.approx(0.4)
    assert totals["random: precision"] == totals["random: F1"] == totals["random: yes ratio"] == 0


def test_every_measure_has_an_interval_and_its_own_questions(tmp_path: Path) -> None:
    evaluator = pope(tmp_path, ("adversarial", "random"))
    rows = {row.name: row for row in tabulate(evaluator, scored(evaluator))}
    assert [*rows][:6] == ["accuracy", "precision", "recall", "F1", "yes ratio", "mean F1"]
    assert [rows[name].records for name in ("accuracy", "F1", "random", "random: F1")] == [40, 40, 20, 20]
    for row in rows.values():
        score = row.scores["adapter"]
        assert score.low is not None and score.high is not None
        assert score.low < score.value < score.high


def test_the_prompt_is_the_files_and_the_group_its_category(tmp_path: Path) -> None:
    first = next(iter(pope(tmp_path).records()))
    assert isinstance(first, Record)
    assert first.question == f"<image>\nIs there a dog in the image?\n{ENDING}"
    assert (first.id, first.group, first.where) == ("random/1", "random", f"{tmp_path / 'questions.jsonl'}:1")


def test_labels_of_another_release_are_not_taken_for_these_questions(tmp_path: Path) -> None:
    evaluator = pope(tmp_path)
    file = tmp_path / "coco" / "coco_pope_random.json"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[1], lines[2] = lines[2], lines[1]
    lines[3] = lines[3].replace('"no"', '"maybe"')
    lines[4] = "{"
    file.write_text("\n".join(lines[:-1]), encoding="utf-8")
    bad = [one for one in evaluator.records() if isinstance(one, BadRecord)]
    assert [one.where.rpartition(":")[2] for one in bad] == ["2", "3", "4", "5", "20"]
    assert bad[0].why == f"the label in {file}:2 is not about this image and question"
    assert "neither yes nor no" in bad[2].why
    assert "there are 19 labels for 'random', and this is question 20" in bad[4].why


def test_missing_files_are_said(tmp_path: Path) -> None:
    assert len(list(Pope(PopeSettings()).validate(None))) == 3
    evaluator = pope(tmp_path)
    (tmp_path / "COCO_7.jpg").unlink()
    (bad,) = [one for one in evaluator.records() if isinstance(one, BadRecord)]
    assert (bad.where, bad.why) == (
        f"{tmp_path / 'questions.jsonl'}:8",
        f"there is no image '{tmp_path / 'COCO_7.jpg'}'",
    )
    (tmp_path / "coco" / "coco_pope_random.json").unlink()
    with pytest.raises(DataError, match=r"has no file coco_pope_\*\.json"):
        list(evaluator.records())
