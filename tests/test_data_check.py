"""`graftwork data check`: what is found in a data set, what is said of it, and the exit status."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pictures import picture, saved
from PIL import Image as PILImage
from tiny_runs import COMPONENTS, run_table

from graftwork.cli import main
from graftwork.contracts import DictLookup
from graftwork.errors import PlanRefused
from graftwork.jobs.data_check import CheckedData, check_data

LOOKUP = DictLookup(*COMPONENTS)


def write(folder: Path, rows: list[tuple[str | None, str, str]]) -> Path:
    """A data set of image names, questions and answers."""
    records = [
        {
            "id": str(number),
            **({"image": image} if image else {}),
            "conversations": [
                {"from": "human", "value": "<image>\n" * bool(image) + question},
                {"from": "gpt", "value": answer},
            ],
        }
        for number, (image, question, answer) in enumerate(rows)
    ]
    file = folder / "data.json"
    file.write_text(json.dumps(records))
    return file


@pytest.fixture
def good(tmp_path: Path) -> list[tuple[str | None, str, str]]:
    """Rows of a data set in which nothing is wrong, with their images."""
    for number in range(6):
        saved(picture(number, (80, 64)), tmp_path / f"{number}.png")
    return [
        (f"{n}.png", question, f"{question[0]}{n % 3}") for n in range(6) for question in ("What is it?", "Who is it?")
    ]


def checked(file: Path, **options: Any) -> CheckedData:
    return check_data(file, out=file.parent / "page", lookup=LOOKUP, **options)


def whats(found: CheckedData, level: str) -> list[str]:
    return [finding.what for finding in found.report.findings if finding.level == level]


def test_data_in_which_nothing_is_wrong_is_said_to_be_so(tmp_path: Path, good: list[Any]) -> None:
    found = checked(write(tmp_path, good))
    facts = found.report.facts
    assert found.ok and not found.report.findings and found.report.verdict == "Nothing is wrong."
    assert (facts.records, facts.images.distinct, facts.answers.distinct_questions) == (12, 6, 2)
    assert facts.images.width and (facts.images.width.least, facts.images.width.most) == (80, 80)
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"report.html", "report.md", "report.json"}
    assert json.loads((tmp_path / "page" / "report.json").read_text())["facts"]["words"]["mean"] == 4


def test_what_must_not_be_and_what_should_be_looked_at_is_found(tmp_path: Path, good: list[Any]) -> None:
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
    saved(picture(0, (80, 64)), tmp_path / "equal.bmp")
    saved(picture(1, (160, 128)), tmp_path / "near.png")
    saved(PILImage.new("RGB", (20, 30), "red"), tmp_path / "tiny.png")
    saved(PILImage.new("RGB", (900, 30), "blue"), tmp_path / "long.png")
    rows = [
        *((f"{name}", "Is it right?", f"answer {name}") for name in ("broken.png", "tiny.png", "long.png")),
        ("equal.bmp", "what is it", "w0"),
        ("near.png", "Who is it?", "Nobody."),
        ("none.png", "Is it there?", "no"),
        (None, "Say it.", "<div>it</div>"),
    ]
    found = checked(write(tmp_path, [*good, *rows]))
    assert not found.ok
    assert whats(found, "must") == ["1 record that cannot be read", "1 image, of 1 record, that cannot be opened"]
    assert whats(found, "should") == [
        "1 image with the pixels of an earlier one, and 1 near to one",
        "1 image of less than 28 pixels on the shorter side",
        "1 image more than 8 times as long as wide",
        "1 record with another answer to an earlier question about the same image",
        "1 record with the question and the answer of an earlier one about the same image",
        "1 record: it holds HTML",
    ]
    (unread,) = found.report.findings[0].examples
    assert unread.startswith(f"{tmp_path / 'data.json'}:1 (record 18): there is no image '{tmp_path / 'none.png'}'")
    reasons = {odd.id: odd.why for odd in found.report.facts.odd}
    assert reasons["12"].startswith("its image cannot be opened")
    assert reasons["16"].startswith("it answers an earlier question about the same image otherwise")
    assert len(reasons) == 18 and "" in reasons.values()


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (
            [("0.png", "What?", "yes")] * 20,
            "all 20 questions ask the same of the same image, so that no answer can depend on it",
        ),
        (
            [(f"{n % 6}.png", f"What is {n}?", "yes") for n in range(20)],
            "20 of 20 answers are the same, 'yes', and no other can be learned",
        ),
    ],
)
def test_data_from_which_one_answer_is_learned_must_not_be(
    tmp_path: Path, good: list[Any], rows: list[Any], what: str
) -> None:
    assert whats(checked(write(tmp_path, rows)), "must") == [what]


def test_a_blind_guess_that_is_mostly_right_should_be_looked_at(tmp_path: Path, good: list[Any]) -> None:
    rows = [(f"{n}.png", f"Is it {word}?", word) for n in range(6) for word in ("red", "blue", "big", "small", "old")]
    (what,) = whats(checked(write(tmp_path, rows)), "should")
    assert re.fullmatch(
        r"who sees no image and guesses each question's commonest answer is right \d+% of the time", what
    )


def easy_vqa_table() -> dict[str, Any]:
    return {"data": {"source": [{"use": "easy-vqa", "pictures": 40}]}, "evaluate": {"on": ["easy-vqa"]}}


def test_the_splits_of_easy_vqa_do_not_leak_and_a_split_leaks_into_itself(tmp_path: Path) -> None:
    pytest.importorskip("easy_vqa")
    table = easy_vqa_table()
    found = check_data(table, out=tmp_path, lookup=LOOKUP)
    leaks = found.report.facts.leaks
    assert [(each.evaluator, each.questions, each.images) for each in leaks.compared] == [("easy-vqa", 9_673, 1_000)]
    assert (leaks.images, leaks.questions, leaks.rare, found.ok) == (0, 0, 0, True)
    table["data"]["source"][0] |= {"split": "test"}
    table["evaluate"]["easy-vqa"] = {"limit": 100}
    itself = check_data(table, out=tmp_path, lookup=LOOKUP)
    seen, asked = itself.report.facts.leaks.images, itself.report.facts.leaks.questions
    assert seen > asked >= 4
    assert whats(itself, "must") == [f"{seen} records with images of 'easy-vqa', and {asked} with its questions"]


def test_an_evaluator_is_named_or_set_by_a_run_file(tmp_path: Path, good: list[Any]) -> None:
    pytest.importorskip("easy_vqa")
    file = write(tmp_path, good)
    (tmp_path / "exam.toml").write_text('[evaluate]\non = ["easy-vqa"]\n[evaluate.easy-vqa]\nlimit = 7\n')
    found = checked(file, against=[str(tmp_path / "exam.toml")])
    assert [each.questions for each in found.report.facts.leaks.compared] == [7]
    with pytest.raises(PlanRefused, match="the data cannot be compared with test sets, for 1 reason") as caught:
        checked(file, against=["easy-vaq"])
    assert "easy-vaq: nothing is called 'easy-vaq'" in caught.value.details[0]


def test_a_run_with_a_model_measures_tokens(base: Path, tmp_path: Path) -> None:
    table = run_table(base)
    table["data"]["source"] = [{"use": "shapes", "count": 12, "long": [3]}]
    table["train"]["max_length"] = 100
    found = check_data({**table, "out": str(tmp_path)}, out=tmp_path, lookup=LOOKUP)
    lengths = found.report.facts.lengths
    assert lengths and lengths.tokens and lengths.tokens.count == 12
    assert lengths.too_long == 1 and lengths.tokens_cut == lengths.tokens.most - 100
    assert len(lengths.image_tokens) == 1 and lengths.image_tokens[0] > 0
    assert "1 record of more than 100 tokens" in whats(found, "should")


def test_a_run_whose_model_is_not_there_is_measured_in_words(tmp_path: Path) -> None:
    table = run_table(tmp_path / "nowhere")
    found = check_data(table, out=tmp_path, lookup=LOOKUP)
    assert found.report.facts.lengths is None
    assert found.report.notes[0].startswith("Lengths are in words, as there is no processor of the run's model: ")


def test_the_page_needs_no_other_file_and_shows_odd_records_first(tmp_path: Path, good: list[Any]) -> None:
    rows = [*good, ("0.png", "<script>alert(1)</script>", "as an AI language model, I can not")]
    found = checked(write(tmp_path, rows))
    page = (tmp_path / "page" / "report.html").read_text()
    assert "<script" not in page and 'src="data:image/' in page and not re.search(r'(?:src|href)="(?!data:)', page)
    articles = page.split("<article>")[1:]
    assert len(articles) == 13 and "It speaks of being a language model" in articles[0]
    assert str(found) == (tmp_path / "page" / "report.md").read_text()
    assert found._repr_html_().startswith('<div class="graftwork">')


def test_the_command_prints_facts_and_ends_with_1_where_something_must_not_be(tmp_path: Path, good: list[Any]) -> None:
    arguments = ["data", "check", str(write(tmp_path, good)), "-o", str(tmp_path / "page")]
    ran = CliRunner().invoke(main, arguments)
    assert (ran.exit_code, ran.output.splitlines()[-3]) == (0, "Nothing is wrong.")
    write(tmp_path, [*good, ("none.png", "What?", "no")])
    ran = CliRunner().invoke(main, arguments)
    assert ran.exit_code == 1
    assert "- 1 record that cannot be read: correct the file" in ran.output
    assert ran.output.splitlines()[-1] == f"page: {tmp_path / 'page' / 'report.html'}"
    ran = CliRunner().invoke(main, [*arguments, "--json"])
    assert (ran.exit_code, json.loads(ran.stdout)["ok"]) == (1, False)
