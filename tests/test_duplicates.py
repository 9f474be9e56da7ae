"""The operators on what is there twice or in a test set, and those that choose among records."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pictures import about, encoded, picture, saved
from tiny_runs import COMPONENTS

from graftwork.config.datafile import resolve_data
from graftwork.contracts import BadRecord, DictLookup, Evaluator, Image, Record, Score, Turn
from graftwork.data.pipeline import read_records
from graftwork.errors import DataError, PlanRefused
from graftwork_duplicates import (
    DuplicateQuestions,
    DuplicateQuestionsSettings,
    Leaks,
    LeaksSettings,
    NearDuplicateImages,
    NearSettings,
)
from graftwork_selection import Balance, BalanceSettings, Sample, SampleSettings


def split(items: Any) -> tuple[list[str], dict[str, BadRecord]]:
    """The ids that are kept, and what is dropped by its id."""
    found = list(items)
    dropped = {item.id: item for item in found if isinstance(item, BadRecord)}
    return [item.id for item in found if isinstance(item, Record)], dropped


def test_of_near_duplicates_the_records_of_the_first_are_kept(tmp_path: Path) -> None:
    first = saved(picture(1), tmp_path / "first.png")
    half = saved(picture(1).resize((160, 128)), tmp_path / "half.png")
    other, broken = encoded(picture(2)), Image(data=b"none")
    records = [
        about("1", first),
        about("2", half),
        about("3", other),
        about("4", first),
        about("5", half),
        about("6", broken),
        about("7"),
    ]
    kept, dropped = split(NearDuplicateImages(NearSettings()).apply(records, seed=0))
    assert kept == ["1", "3", "4", "7"]
    assert dropped["2"].why.startswith(f"its image is a near duplicate of '{tmp_path / 'first.png'}', 0 bits and 0.")
    assert dropped["2"].stats["distance"] == 0 and 0 < dropped["2"].stats["difference"] < 2.5
    assert dropped["5"].why == dropped["2"].why
    assert "is not an image" in dropped["6"].why
    strict = NearDuplicateImages(NearSettings(max_distance=0, max_difference=0.0))
    assert split(strict.apply(records, seed=0))[0] == ["1", "2", "3", "4", "5", "7"]


def test_a_question_that_is_repeated_about_the_same_image_is_dropped() -> None:
    one, two = encoded(picture(1)), encoded(picture(2))
    records = [
        about("1", one, answer="A cat."),
        about("2", one, question="what  is it", answer="a cat"),
        about("3", one, answer="A dog."),
        about("4", two, answer="A dog."),
        about("5", one, question="Who?"),
        about("6", question="Why?", answer="So."),
        about("7", question="Why?", answer="So!"),
    ]
    kept, dropped = split(DuplicateQuestions(DuplicateQuestionsSettings()).apply(records, seed=0))
    assert kept == ["1", "4", "5", "6"]
    assert dropped["2"] == BadRecord.of(
        records[1], "it repeats what was asked about the same image", questions=1, answered_otherwise=0
    )
    assert dropped["3"].why.endswith(", and answers 1 of 1 otherwise")
    both = DuplicateQuestions(DuplicateQuestionsSettings(contradictions="keep all"))
    assert split(both.apply(records, seed=0))[0] == ["1", "3", "4", "5", "6"]


def test_a_conversation_with_something_new_is_kept() -> None:
    image = encoded(picture(1))
    more = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "x"), Turn("user", "Who?"), Turn("assistant", "y"))
    records = [about("1", image), Record("2", more, (image,)), Record("3", more, (image,))]
    assert split(DuplicateQuestions(DuplicateQuestionsSettings()).apply(records, seed=0))[0] == ["1", "2"]


def leaks(*questions: Record | BadRecord, **settings: Any) -> Leaks:
    operator = Leaks(LeaksSettings(against={"exam": {}}, **settings))
    operator.questions = {"exam": lambda: questions}
    return operator


def test_images_and_questions_of_a_test_set_are_dropped_in_every_form_but_no_other() -> None:
    tests = [about(f"q{n}", encoded(picture(n)), question="What is shown?") for n in range(3)]
    tests.append(about("text", question="How many legs does a spider have?"))
    records = [
        about("bytes", tests[0].images[0]),
        about("format", encoded(picture(1), "BMP"), question="what is shown"),
        about("half", encoded(picture(2).resize((160, 128)))),
        about("jpeg", encoded(picture(0), "JPEG", quality=20)),
        about("again", tests[0].images[0]),
        about("question", question="How many legs does a spider have?"),
        about("other image", encoded(picture(50)), question="What is shown?"),
        about("other question", question="How many legs has a dog?"),
        about("with an image", encoded(picture(51)), question="How many legs does a spider have?"),
    ]
    kept, dropped = split(leaks(*tests).apply(records, seed=0))
    assert kept == ["other image", "other question", "with an image"]
    assert dropped["bytes"].why == "it has the same image as 'q0' of 'exam'"
    assert dropped["format"].why == "it has the same image as 'q1' of 'exam', and asks the same"
    assert dropped["half"].why.startswith("it has an image within 0.")
    assert dropped["again"].why == dropped["bytes"].why
    assert dropped["question"].why == "it asks the same without an image as 'text' of 'exam'"
    assert dropped["jpeg"].stats["of"] == "q0" and 0 < dropped["jpeg"].stats["difference"] <= 2.5


def test_a_test_set_that_cannot_be_read_is_not_passed_over() -> None:
    with pytest.raises(
        DataError, match="1 questions or images of 'exam' cannot be read, so that leaks would be missed"
    ):
        list(leaks(about("q", Image(data=b"none"))).apply([], seed=0))


class Exam(Evaluator[LeaksSettings]):
    """Questions about one field"""

    name = "exam"
    Settings = DuplicateQuestionsSettings

    def records(self) -> list[Record]:
        return [about("q", encoded(picture(7)))]

    def score(self, record: Record, answer: str) -> Score:
        return Score(0.0)


def test_a_data_file_lends_the_operator_the_questions_of_evaluators() -> None:
    lookup = DictLookup(*COMPONENTS, Leaks, Exam)
    table: dict[str, Any] = {"data": {"source": [{"use": "shapes", "count": 3}], "operator": [{"use": "leaks"}]}}
    with pytest.raises(PlanRefused) as caught:
        resolve_data(table, lookup)
    assert caught.value.details == (
        "data.operator.0: 'against' names no evaluator; name those that the model will be scored by",
    )
    table["data"]["operator"][0]["against"] = {"exams": {}}
    with pytest.raises(PlanRefused) as caught:
        resolve_data(table, lookup)
    assert "data.operator.0.against.exams: nothing is called 'exams'" in caught.value.details[0]
    table["data"]["operator"][0]["against"] = {"exam": {"contradictions": "keep all"}}
    plan = resolve_data(table, lookup)
    (operator,) = plan.operators
    assert [record.id for record in operator.questions["exam"]()] == ["q"]  # type: ignore[union-attr]
    assert plan.run_context.operators[0].settings["against"] == {"exam": {"contradictions": "keep all"}}
    assert len(read_records(plan.sources, plan.operators, seed=0, strict=True).records) == 3


def grouped(counts: dict[str, int]) -> list[Record]:
    return [about(f"{group}{n}", answer=group, group=group) for group, count in counts.items() for n in range(count)]


def test_a_sample_depends_on_ids_and_the_seed_and_not_on_the_order() -> None:
    records = grouped({"a": 60, "b": 40})
    sample = Sample(SampleSettings(count=30))
    kept, dropped = split(sample.apply(records, seed=1))
    assert len(kept) == 30 and len(dropped) == 70
    assert kept == [record.id for record in records if record.id in kept]
    assert (
        set(split(sample.apply(records[::-1], seed=1))[0]) == set(kept) != set(split(sample.apply(records, seed=2))[0])
    )
    fewer = split(sample.apply([record for record in records if record.id not in dropped or record.id < "a3"], seed=1))[
        0
    ]
    assert fewer == kept
    assert next(iter(dropped.values())).stats == {"kept": 30, "of": 100}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (SampleSettings(share=0.25), 25),
        (SampleSettings(count=10, per_group=True), {"a": 10, "b": 10}),
        (SampleSettings(share=0.5, per_group=True), {"a": 30, "b": 20}),
        (SampleSettings(count=1000), 100),
    ],
)
def test_a_sample_is_of_the_size_that_is_asked_for(settings: SampleSettings, kept: int | dict[str, int]) -> None:
    items = Sample(settings).apply(grouped({"a": 60, "b": 40}), seed=0)
    groups = Counter(item.group for item in items if isinstance(item, Record))
    assert (groups if isinstance(kept, dict) else groups.total()) == kept


@pytest.mark.parametrize("settings", [SampleSettings(), SampleSettings(count=1, share=0.1)])
def test_a_sample_needs_a_count_or_a_share(settings: SampleSettings) -> None:
    assert list(Sample(settings).validate(None)) == ["set either 'count' or 'share'"]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (BalanceSettings(), {"a": 3, "b": 3, "c": 3}),
        (BalanceSettings(at_most=5), {"a": 5, "b": 5, "c": 3}),
        (BalanceSettings(by="answer", at_most=1), {"a": 1, "b": 1, "c": 1}),
    ],
)
def test_groups_or_answers_are_balanced(settings: BalanceSettings, kept: dict[str, int]) -> None:
    items = list(Balance(settings).apply(grouped({"a": 20, "b": 9, "c": 3}), seed=0))
    assert Counter(item.group for item in items if isinstance(item, Record)) == kept
    assert len(items) == 32
    why = next(item.why for item in items if isinstance(item, BadRecord))
    assert why == f"{kept['a']} of group 'a' are kept, and it is not among those drawn"


def test_nothing_is_made_of_nothing() -> None:
    assert (
        list(Balance(BalanceSettings()).apply([], seed=0))
        == list(Sample(SampleSettings(count=1)).apply([], seed=0))
        == []
    )
