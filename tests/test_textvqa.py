"""TextVQA: the same normalisation, scores and questions as the published scripts, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwork.contracts import BadRecord, Record, Score, plain_sum
from graftwork.errors import DataError
from graftwork_textvqa import CONTRACTIONS, TextVqa, TextVqaSettings, find_question, normalise, score_answers

GOLDEN = Path(__file__).parent / "golden_eval"
QUESTIONS, ANNOTATIONS = "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"
CASES = json.loads((GOLDEN / "textvqa_golden.json").read_text(encoding="utf-8"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(8):
        (tmp_path / f"{number:04}.png").touch()
    return tmp_path


def textvqa(images: Path, **changes: Any) -> TextVqa:
    files = {"questions": GOLDEN / "textvqa" / QUESTIONS, "annotations": GOLDEN / "textvqa" / ANNOTATIONS}
    return TextVqa(TextVqaSettings(**{**files, "images": images, **changes}))


def records(evaluator: TextVqa) -> list[Record]:
    found = list(evaluator.records())
    assert not [one for one in found if isinstance(one, BadRecord)]
    return [one for one in found if isinstance(one, Record)]


@pytest.mark.parametrize("case", CASES["normalise"], ids=lambda case: repr(case["in"])[:40])
def test_answers_are_normalised_as_upstream_does(case: dict[str, str]) -> None:
    assert normalise(case["in"]) == case["out"]


def test_predictions_have_exactly_upstreams_scores_on_every_python() -> None:
    scores = [score_answers(case["gt_answers"]).get(normalise(case["pred_answer"]), 0.0) for case in CASES["scores"]]
    assert scores == [case["score"] for case in CASES["scores"]]
    assert TextVqa(TextVqaSettings()).total([Score(score) for score in scores]) == {"accuracy": CASES["overall"]}
    assert plain_sum([1.0, *[1e-16] * 9]) == 1.0, "`sum` gives 1.0000000000000009 from Python 3.12 on"


def test_the_table_of_contractions_is_that_of_the_challenge() -> None:
    assert len(CONTRACTIONS) == 114, "120, less the four that begin with a capital and the two that change nothing"
    assert CONTRACTIONS["'ows'at"] == CONTRACTIONS["ow's'at"] == CONTRACTIONS["'ow'sat"] == "'ow's'at"
    assert CONTRACTIONS["yall'd've"] == "y'all'd've"
    assert not {"im", "ive", "lets", "shes", "youdve"} & CONTRACTIONS.keys()


@given(st.text(), st.lists(st.sampled_from(["red", "Red.", "the red", "blue", ""]), min_size=10, max_size=10))
def test_any_answer_scores_what_the_number_of_people_who_gave_it_is_worth(answer: str, people: list[str]) -> None:
    agree = [normalise(one) for one in people].count(normalise(answer))
    worth = [0, 0.3, 0.6, 0.9, 1][min(agree, 4)]
    assert score_answers(people).get(normalise(answer), 0.0) == pytest.approx(worth)


def test_the_question_is_told_from_the_prompt_as_upstream_does() -> None:
    for case in json.loads((GOLDEN / "textvqa_prompt_golden.json").read_text(encoding="utf-8")):
        assert find_question(case["prompt"]) == case["question"]
    for prompt in ["what?", "what\nis\nthis?", "OCR tokens: A. What? Short answer:"]:
        with pytest.raises(DataError, match="cannot be told"):
            find_question(prompt)


@pytest.mark.parametrize(("file", "accuracy"), [("answers.jsonl", 56.25), ("upstream_model_answers_full.jsonl", 7.5)])
def test_a_file_of_answers_scores_what_upstream_prints(images: Path, file: str, accuracy: float) -> None:
    evaluator = textvqa(images)
    lines = (GOLDEN / "textvqa" / file).read_text(encoding="utf-8").splitlines()
    asked = records(evaluator)
    answers = [json.loads(line) for line in lines]
    assert [f"<image>\n{one['prompt']}" for one in answers] == [record.question for record in asked]
    scores = [evaluator.score(record, one["text"]) for record, one in zip(asked, answers, strict=True)]
    assert round(100 * evaluator.total(scores)["accuracy"], 2) == accuracy


def test_the_words_read_by_an_ocr_system_can_be_left_out(images: Path) -> None:
    with_words, without = records(textvqa(images))[3], records(textvqa(images, with_ocr=False))[3]
    assert "\nReference OCR token: RED, STOP, 3\n" in with_words.question
    assert without.question == "<image>\nWhich number is written?\nAnswer the question using a single word or phrase."
    assert (without.id, without.reference) == (with_words.id, with_words.reference)
    assert with_words.id == "0000000000000003/1"


def test_questions_are_grouped_where_the_file_groups_them(images: Path, tmp_path: Path) -> None:
    lines = (GOLDEN / "textvqa" / QUESTIONS).read_text(encoding="utf-8").splitlines()
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join([lines[0].replace('"default"', '"signs"'), lines[1]]), encoding="utf-8")
    assert [record.group for record in records(textvqa(images, questions=file))] == ["signs", ""]


def test_what_cannot_be_asked_says_where_and_why(images: Path, tmp_path: Path) -> None:
    lines = (GOLDEN / "textvqa" / QUESTIONS).read_text(encoding="utf-8").splitlines()
    annotations = json.loads((GOLDEN / "textvqa" / ANNOTATIONS).read_text(encoding="utf-8"))
    annotations["data"][4]["answers"].pop()
    few = tmp_path / "few.json"
    few.write_text(json.dumps(annotations), encoding="utf-8")
    (images / "0005.png").unlink()
    lines[0] = lines[0].replace("Which", "Whose")
    lines[1] = lines[1].replace("is written?", "is\\nwritten?")
    lines[2] = lines[2][:-1]
    lines[3] = lines[3].replace('"text"', '"words"')
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    found = list(textvqa(images, questions=file, annotations=few).records())
    bad = [one for one in found if isinstance(one, BadRecord)]
    assert [one.where for one in bad] == [f"{file}:{number}" for number in range(1, 7)]
    for one, why in zip(
        bad,
        ["no question 'whose number", "cannot be told", "not JSON", "'text' is missing", "10 answers", "no image"],
        strict=True,
    ):
        assert why in one.why
    assert len(found) == 8


def test_a_missing_file_is_objected_to_and_one_sentence(images: Path, tmp_path: Path) -> None:
    assert list(TextVqa(TextVqaSettings()).validate(None)) == [
        "'questions' is not set",
        "'annotations' is not set",
        "'images' is not set",
    ]
    assert list(textvqa(images).validate(None)) == []
    with pytest.raises(DataError, match=r"'annotations' is '.*gone.json', which does not exist"):
        list(textvqa(images, annotations=tmp_path / "gone.json").records())
    with pytest.raises(DataError, match="no list of objects under 'data'"):
        list(textvqa(images, annotations=GOLDEN / "textvqa_golden.json").records())
