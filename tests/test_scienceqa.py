"""ScienceQA: letters are parsed, and questions with an image scored apart, as the published scripts do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graftwork.contracts import BadRecord, Record
from graftwork.errors import DataError
from graftwork_scienceqa import ScienceQa, ScienceQaSettings, parse

QUESTIONS: list[dict[str, Any]] = [
    {
        "id": str(number),
        **({"image": f"{number}/image.png"} if number % 2 else {}),
        "conversations": [
            {"from": "human", "value": "<image>\n" * (number % 2) + f"Which is {number}?\nOptions: (A) up (B) down"},
            {"from": "gpt", "value": "B"},
        ],
    }
    for number in range(1, 7)
]
PROBLEMS = {str(number): {"choices": ["up", "down"], "answer": 1} for number in range(1, 9)}
SPLITS = {"test": ["1", "2", "3", "4", "8"], "val": ["5", "6"]}


def scienceqa(folder: Path, questions: list[Any] = QUESTIONS, problems: Any = PROBLEMS, **changes: Any) -> ScienceQa:
    for name, content in {"q.json": questions, "problems.json": problems, "pid_splits.json": SPLITS}.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    for number in (1, 3, 5):
        (folder / str(number)).mkdir(exist_ok=True)
        (folder / str(number) / "image.png").touch()
    return ScienceQa(
        ScienceQaSettings(**{"questions": folder / "q.json", "folder": folder, "images": folder} | changes)
    )


def asked(evaluator: ScienceQa) -> list[Record]:
    return [one for one in evaluator.records() if isinstance(one, Record)]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *[("B", "B"), ("B. down", "B"), ("The answer is B.", "B"), ("So. The answer is C, I think", "C")],
        *[
            ("", None),
            ("b", None),
            ("B.", None),
            ("B down", None),
            ("AB", None),
            ("F", None),
            ("The answer is B", None),
        ],
        ("The answer is A. The answer is B.", None),
    ],
)
def test_a_letter_is_told_from_an_answer_as_upstream_does(answer: str, letter: str | None) -> None:
    assert parse(answer) == letter


def test_the_questions_of_the_split_are_asked_with_upstreams_prompts(tmp_path: Path) -> None:
    first, second, *rest = asked(scienceqa(tmp_path))
    ending = "Answer with the option's letter from the given choices directly."
    assert first.question == f"<image>\nWhich is 1?\nOptions: (A) up (B) down\n{ending}"
    assert second.question == f"Which is 2?\nOptions: (A) up (B) down\n{ending}"
    assert (len(first.images), len(second.images)) == (1, 0)
    assert [record.id for record in (first, second, *rest)] == ["1", "2", "3", "4"]
    assert [record.id for record in asked(scienceqa(tmp_path, split="val"))] == ["5", "6"]


def test_questions_with_an_image_are_scored_apart(tmp_path: Path) -> None:
    evaluator = scienceqa(tmp_path)
    answers = ["B", "B. down", "A", "The answer is B."]
    scores = [evaluator.score(record, answer) for record, answer in zip(asked(evaluator), answers, strict=True)]
    assert evaluator.total(scores) == {"accuracy": 0.75, "IMG": 0.5, "no image": 1.0}


def test_what_cannot_be_asked_says_where_and_why(tmp_path: Path) -> None:
    questions = [
        {**QUESTIONS[0], "image": "1/gone.png"},
        {**QUESTIONS[1], "conversations": []},
        QUESTIONS[2],
        "4",
    ]
    problems = {**PROBLEMS, "3": {"choices": ["up"], "answer": 1}}
    found = list(scienceqa(tmp_path, questions, problems).records())
    bad = [one for one in found if isinstance(one, BadRecord)]
    file = tmp_path / "q.json"
    assert [one.where for one in bad] == [
        *(f"{file} (question {number})" for number in range(1, 5)),
        str(file),
        str(file),
    ]
    whys = ["no image", "no first turn", "answer of the problem '3' is 1, and it has 1 choices", "not an object"]
    for one, why in zip(bad, [*whys, "problem '4' of the split", "problem '8' of the split"], strict=True):
        assert why in one.why
    assert found == bad


def test_a_missing_file_or_split_is_one_sentence(tmp_path: Path) -> None:
    assert len(list(ScienceQa(ScienceQaSettings()).validate(None))) == 3
    with pytest.raises(DataError, match="without a list 'trial'"):
        list(scienceqa(tmp_path, split="trial").records())
    evaluator = scienceqa(tmp_path)
    (tmp_path / "problems.json").unlink()
    with pytest.raises(DataError, match=r"problems.json' cannot be read"):
        list(evaluator.records())
