"""MMBench: upstream's prompts and submission, and a question right only if right in every rotation."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from graftwork.contracts import BadRecord, Prediction, Record, Score, missing_packages
from graftwork.data import image_size
from graftwork.errors import DataError, GraftworkError
from graftwork.evaluate.questions import read_questions
from graftwork.evaluate.scores import tabulate
from graftwork_mmbench import MmBench, MmBenchSettings, Pass, choose
from graftwork_mmbench.answers import choose_cautiously

GOLDEN = Path(__file__).parent / "golden_eval" / "mmbench"
FILE = GOLDEN / "mmbench_dev_tiny.tsv"
BRANCH = "l2: finegrained_perception (instance-level)"
ENDING = "Answer with the option's letter from the given choices directly."


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / name).read_text(encoding="utf-8").splitlines()]


FAKE = {str(line["question_id"]): line["text"] for line in lines("fake.jsonl")}


def mmbench(path: Path = FILE, **changes: Any) -> MmBench:
    return MmBench(MmBenchSettings(path, **changes))


def asked(evaluator: MmBench) -> list[Record]:
    found = list(evaluator.records())
    assert not [one for one in found if isinstance(one, BadRecord)]
    return [one for one in found if isinstance(one, Record)]


def answered(evaluator: MmBench, answer: Callable[[Record], str]) -> list[Prediction]:
    return [
        Prediction(record, {"adapter": text}, {"adapter": evaluator.score(record, text)}, {}, 0)
        for record in asked(evaluator)
        for text in [answer(record)]
    ]


def totals(evaluator: MmBench, answer: Callable[[Record], str]) -> Mapping[str, float]:
    return evaluator.total([one.scores["adapter"] for one in answered(evaluator, answer)])


def table() -> tuple[list[str], list[list[str]]]:
    with FILE.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    return header, rows


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([header, *rows])
    return path


def test_prompts_are_upstreams() -> None:
    ours = {record.id: record.question for record in asked(mmbench())}
    upstream = {
        str(line["question_id"]): f"<image>\n{line['prompt']}\n{ENDING}"
        for line in lines("upstream_model_answers_full.jsonl")
    }
    assert ours == upstream
    assert "<image>\nLook closely.\nWhat shape" in ours["2"]
    assert asked(mmbench(language="cn"))[0].question.endswith("\n请直接回答选项字母。")


def test_questions_come_with_their_rounds_side_by_side() -> None:
    ids = [record.id for record in asked(mmbench())]
    assert ids[:6] == ["1", "1000001", "2000001", "3000001", "2", "1000002"]
    first = asked(mmbench())[0]
    assert (first.group, first.reference, first.where) == ("count", ("A",), f"{FILE}:2")
    assert image_size(first.images[0]) == (96, 64)


def test_the_strict_score_is_the_toolkits_and_the_circular_one_reads_the_letters() -> None:
    found = totals(mmbench(), lambda record: FAKE[record.id])
    assert found["strict"] == 0.5
    assert found["accuracy"] == 0.75, "'C.' is a C"
    assert found["vanilla"] == 1.0
    assert [*found] == ["accuracy", "vanilla", "cautious", "strict", BRANCH, "attr", "count"]
    assert (found[BRANCH], found["attr"], found["count"]) == (0.75, 0.5, 1.0)


def test_made_rounds_are_those_of_the_file() -> None:
    from_file, made = asked(mmbench()), asked(mmbench(circular="make"))
    assert [(r.id, r.question, r.reference, r.meta, r.images) for r in made] == [
        (r.id, r.question, r.reference, r.meta, r.images) for r in from_file
    ]


def test_without_rounds_only_the_first_rows_are_asked() -> None:
    evaluator = mmbench(circular="off")
    found = totals(evaluator, lambda record: FAKE[record.id])
    assert [record.id for record in asked(evaluator)] == ["1", "2", "3", "4"]
    assert (found["accuracy"], found["vanilla"], found["strict"]) == (1.0, 1.0, 0.75)


def test_a_round_that_was_not_answered_is_not_right() -> None:
    evaluator = mmbench()
    ones = answered(evaluator, lambda record: record.reference[0])
    scores = [one.scores["adapter"] for one in ones if one.record.id != "2000003"]
    found = evaluator.total(scores)
    assert (found["accuracy"], found["strict"], found["vanilla"]) == (0.75, 0.75, 1.0)


@pytest.mark.parametrize("circular", ["file", "make", "off"])
@pytest.mark.parametrize(("limit", "questions"), [(1, 1), (3, 3), (4, 4), (10, 4)])
def test_right_answers_score_all_at_any_limit(circular: str, limit: int, questions: int) -> None:
    evaluator = mmbench(circular=circular)
    records, _ = read_questions(evaluator, limit=limit)
    assert len({record.unit for record in records}) == questions
    found = evaluator.total([evaluator.score(record, record.reference[0]) for record in records])
    assert set(found.values()) == {1.0}


def test_a_resample_counts_a_question_as_often_as_it_was_drawn() -> None:
    evaluator = mmbench()
    right = [Score(1.0, "x", Pass(1, n, 2, "", True)) for n in range(2)]
    half = [Score(float(n == 0), "y", Pass(2, n, 2, "", False)) for n in range(2)]
    found = evaluator.total([*right, *half, *right, *right])
    assert found == {"accuracy": 0.75, "vanilla": 1.0, "cautious": 0.0, "strict": 0.75, "x": 1.0, "y": 0.0}
    assert evaluator.total(half + half)["accuracy"] == 0


def test_every_number_has_an_interval_and_its_own_questions() -> None:
    evaluator = mmbench()
    rows = {row.name: row for row in tabulate(evaluator, answered(evaluator, lambda record: FAKE[record.id]))}
    assert {name: row.records for name, row in rows.items()} == {
        "accuracy": 13,
        "vanilla": 4,
        "cautious": 13,
        "strict": 13,
        BRANCH: 13,
        "attr": 6,
        "count": 7,
    }
    score = rows["accuracy"].scores["adapter"]
    assert (score.low, score.high) == (0.25, 1.0)


OPTIONS = ("a cat", "two dogs", "Apple")


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        *[("B", "B"), ("B.", "B"), ("(C) Apple", "C"), ("Answer: B", "B"), ("**B**", "B")],
        *[("A", "A"), ("A.", "A"), ("The correct answer is A.", "A"), ("An image of two dogs", "B")],
        *[("b", None), ("A or B", None), ("D", None), ("", None), ("apples", "C"), ("a cat, two dogs", None)],
        *[("I can't process this file.", "Z"), ("B, as the picture shows it", None), ("Apple " + "x" * 31, None)],
    ],
)
def test_a_choice_is_told_by_its_letter_or_else_by_its_text(answer: str, choice: str | None) -> None:
    assert choose(answer, OPTIONS) == choice


def test_the_cautious_reading_takes_an_a_for_the_article_and_a_letter_anywhere() -> None:
    assert choose_cautiously("The correct answer is A.", OPTIONS) is None
    assert choose_cautiously("It is A", OPTIONS) == "A"
    assert choose_cautiously("B, as the picture shows it", OPTIONS) == "B"
    found = totals(mmbench(), lambda record: f"The correct answer is {record.reference[0]}.")
    assert (found["accuracy"], found["cautious"], found["strict"]) == (1.0, 0.0, 0.0)


def test_choices_are_those_that_vlmevalkit_tells() -> None:
    cases = json.loads((GOLDEN / "choices.json").read_text(encoding="utf-8"))
    assert len(cases) == 400
    assert len({choice for _, _, choice in cases}) > 6
    assert [choose(answer, options) for answer, options, _ in cases] == [choice for _, _, choice in cases]


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("vlmeval"), reason="needs ms-vlmeval, installed without its dependencies"
)
def test_choices_and_groups_are_those_of_an_installed_vlmevalkit() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "mmbench_matching.py"
    command = [sys.executable, str(script), "--answers", "1000000", "--groups", "50000"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "1,000,000 answers, 0 taken for another choice" in printed
    assert "50,000 groups of rotations, 0 with another verdict" in printed


def test_the_submission_is_that_of_upstreams_converter(tmp_path: Path) -> None:
    evaluator = mmbench()
    evaluator.write(answered(evaluator, lambda record: FAKE[record.id]), tmp_path)
    ours = openpyxl.load_workbook(tmp_path / "submission-adapter.xlsx")
    upstream = openpyxl.load_workbook(GOLDEN / "fake.xlsx")
    assert ours.sheetnames == upstream.sheetnames
    assert list(ours.active.values) == list(upstream.active.values)
    assert next(ours.active.values) == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")


def test_only_the_submission_needs_openpyxl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    evaluator = mmbench()
    assert not missing_packages(evaluator.requires)
    ones = answered(evaluator, lambda record: FAKE[record.id])
    with pytest.raises(GraftworkError, match=r'not written, which needs openpyxl>=3.1: pip install "openpyxl>=3.1"$'):
        evaluator.write(ones, tmp_path)


def test_odd_answers_are_submitted_as_text_and_missing_ones_left_empty(tmp_path: Path) -> None:
    evaluator = mmbench()
    said = {"1": "=1+1", "2": "a\x00b\nNone", "3": "None"}
    ones = [one for one in answered(evaluator, lambda record: said.get(record.id, "A")) if one.record.id != "4"]
    evaluator.write(ones, tmp_path)
    rows = openpyxl.load_workbook(tmp_path / "submission-adapter.xlsx").active.iter_rows()
    cells = [row[6] for row in rows][1:5]
    assert [cell.value for cell in cells] == ["=1+1", "ab\nNone", "None", None]
    assert cells[0].data_type == "s"


def test_made_rounds_are_not_submitted_as_the_files(tmp_path: Path) -> None:
    evaluator = mmbench(circular="make")
    evaluator.write(answered(evaluator, lambda record: "A"), tmp_path)
    values = list(openpyxl.load_workbook(tmp_path / "submission-adapter.xlsx").active.values)
    assert [row[6] for row in values] == ["prediction", *"AAAA", *[None] * 9]


def test_newer_files_name_the_row_of_an_image_and_lack_columns(tmp_path: Path) -> None:
    header, rows = table()
    image = header.index("image")
    for row in rows[4:]:
        row[image] = str(int(row[0]) % 1_000_000)
    rows = rows[4:] + rows[:4]  # The row with the image may come later.
    kept = [place for place, name in enumerate(header) if name not in ("comment", "source")]
    names = [header[place].upper() if header[place] == "image" else header[place] for place in kept]
    file = write(tmp_path / "MMBench_DEV_EN.TSV", names, [[row[place] for place in kept] for row in rows])
    newer, legacy = asked(mmbench(file)), asked(mmbench())
    assert sorted((r.id, r.question, r.images) for r in newer) == sorted((r.id, r.question, r.images) for r in legacy)
    evaluator = mmbench(file)
    evaluator.write(answered(evaluator, lambda record: "A"), tmp_path)
    assert openpyxl.load_workbook(tmp_path / "submission-adapter.xlsx").active.max_column == 9


def test_equal_images_of_a_question_are_held_once() -> None:
    first, second, *_ = asked(mmbench())
    assert first.images[0].data is second.images[0].data


@pytest.mark.parametrize(
    ("option", "letters"),
    [("nan", "ABD"), ("None", "ABD"), ("N/A", "ABD"), ("none", "ABCD"), ("null hypothesis", "ABCD")],
)
def test_an_option_is_missing_where_upstream_reads_nothing(tmp_path: Path, option: str, letters: str) -> None:
    header, rows = table()
    rows[0][header.index("C")] = option
    rows[0][header.index("answer")] = "D"
    file = write(tmp_path / "x.tsv", header, rows[:1])
    records = asked(mmbench(file, circular="make"))
    shown = [[line[0] for line in record.question.split("\n") if line[1:3] == ". "] for record in records]
    assert shown == [list(letters)] * len(letters)
    assert [record.reference[0] for record in records] == list(letters)[::-1]
    assert {line for record in records for line in record.question.split("\n") if line[3:] == "cross"} == {
        f"{letter}. cross" for letter in letters
    }
    assert [choose(f"{letter}.", records[0].meta["options"]) == letter for letter in "ABCD"] == [
        letter in letters for letter in "ABCD"
    ]


def test_options_beyond_d_are_asked(tmp_path: Path) -> None:
    header, rows = table()
    names = [*header, "E", "F"]
    first = [*rows[0], "star", ""]
    first[header.index("answer")] = "E"
    file = write(tmp_path / "x.tsv", names, [first, *([*row, "", ""] for row in rows[1:4])])
    records = asked(mmbench(file, circular="make"))
    assert [record.reference[0] for record in records[:5]] == list("EDCBA")
    assert records[0].question.split("\n")[5:7] == ["D. cross", "E. star"]
    assert totals(mmbench(file, circular="make"), lambda record: record.reference[0])["accuracy"] == 1.0


def test_images_may_be_data_uris(tmp_path: Path) -> None:
    header, rows = table()
    image = header.index("image")
    for row in rows:
        row[image] = f"data:image/png;base64,{row[image]}"
    assert [r.images for r in asked(mmbench(write(tmp_path / "x.tsv", header, rows)))] == [
        r.images for r in asked(mmbench())
    ]
    rows[0][image] = "data:image/png," + "x" * 99
    (bad,) = (one for one in mmbench(write(tmp_path / "y.tsv", header, rows)).records() if isinstance(one, BadRecord))
    assert bad.why == "the image's data URI is not base64"


def test_a_cell_may_be_long_and_have_line_ends_and_the_limit_of_csv_is_left_alone(tmp_path: Path) -> None:
    header, rows = table()
    limit = csv.field_size_limit()
    rows[0][header.index("question")] = 'He said "what"\tis it?\n' + "x" * limit
    file = write(tmp_path / "x.tsv", header, rows)
    assert '"what"\tis it?\nxxx' in asked(mmbench(file))[0].question
    assert csv.field_size_limit() == limit


def test_what_cannot_be_asked_says_where_and_why(tmp_path: Path) -> None:
    header, rows = table()
    place = {name: number for number, name in enumerate(header)}
    rows[0][place["image"]] = "a" * 101
    rows[1][place["answer"]] = "C"
    rows[2][place["A"]] = ""
    rows[3][0] = "four"
    rows[4].pop()
    rows[5][place["image"]] = "77"
    rows[6][place["image"]] = ""
    file = write(tmp_path / "x.tsv", header, rows)
    bad = {one.where: one.why for one in mmbench(file).records() if isinstance(one, BadRecord)}
    expected = {
        2: "not base64",
        3: "the answer 'C' is none of the 2",
        4: "no option A",
        5: "'four' is not a number",
        6: "13 cells, not 14",
        7: "no image in row 77",
        8: "the row has no image",
    }
    assert bad.keys() == {f"{file}:{line}" for line in expected}
    for line, why in expected.items():
        assert why in bad[f"{file}:{line}"]


def test_a_question_with_a_malformed_round_cannot_be_right(tmp_path: Path) -> None:
    header, rows = table()
    rows[-1][header.index("image")] = "a" * 101
    evaluator = mmbench(write(tmp_path / "x.tsv", header, rows))
    good = [one for one in evaluator.records() if isinstance(one, Record)]
    found = evaluator.total([evaluator.score(record, record.reference[0]) for record in good])
    assert (found["accuracy"], found["vanilla"]) == (0.75, 1.0)


def test_files_of_another_kind_are_one_sentence(tmp_path: Path) -> None:
    header, rows = table()
    assert list(MmBench(MmBenchSettings()).validate(None)) == ["'path' is not set"]
    with pytest.raises(DataError, match="has no rotated rows; set 'circular'"):
        list(mmbench(write(tmp_path / "a.tsv", header, rows[:4])).records())
    with pytest.raises(DataError, match="has no column a, answer, image, index, question"):
        list(mmbench(GOLDEN / "fake.jsonl").records())
    with pytest.raises(DataError, match="is not tab separated UTF-8 text"):
        list(mmbench(GOLDEN / "fake.xlsx").records())
    for row in rows:
        row[header.index("answer")] = ""
    with pytest.raises(DataError, match="has no answers, so it is a test split"):
        list(mmbench(write(tmp_path / "b.tsv", header, rows)).records())
