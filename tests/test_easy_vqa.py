"""easy-VQA: the same questions to learn from and to be asked, and exact matching."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from graftwork.contracts import Record, Score, Turn
from graftwork.data import image_size
from graftwork_easy_vqa import EasyVqa, EasyVqaSettings, EasyVqaSource, EasyVqaSourceSettings


def learn(**settings: Any) -> list[Record]:
    return list(EasyVqaSource(EasyVqaSourceSettings(**settings)).records())


def ask(**settings: Any) -> list[Record]:
    return list(EasyVqa(EasyVqaSettings(**settings)).records())


def groups(records: Iterable[Record]) -> Counter[str]:
    return Counter(record.group for record in records)


def test_the_whole_data_set_is_there() -> None:
    assert groups(learn()) == {"yes/no": 28_407, "shape": 5_002, "colour": 5_166}
    assert groups(ask()) == {"yes/no": 7_136, "shape": 1_257, "colour": 1_280}
    assert groups(ask(kind="yes-no")) == {"yes/no": 7_136}
    assert groups(ask(kind="open")) == {"shape": 1_257, "colour": 1_280}


def test_a_record_to_learn_from_has_the_answer_as_a_turn() -> None:
    first = learn(split="test", limit=1)[0]
    assert first.id == "easy-vqa/test/0"
    assert first.turns == (Turn("user", "<image>\nwhat is the red shape?"), Turn("assistant", "triangle"))
    assert first.reference == ()
    assert first.group == "shape"
    assert image_size(first.images[0]) == (64, 64)


def test_the_evaluator_asks_what_the_source_teaches() -> None:
    asked, learned = ask(), learn(split="test")
    assert [record.turns for record in asked] == [record.turns[:1] for record in learned]
    assert [record.reference for record in asked] == [(record.turns[1].text,) for record in learned]
    assert [record.id for record in asked] == [record.id for record in learned]


def test_the_first_images_come_with_all_their_questions() -> None:
    some = learn(pictures=2)
    assert {record.images[0].path.name for record in some if record.images[0].path} == {"0.png", "1.png"}
    assert some == learn(limit=len(some))
    assert learn(pictures=2, limit=3) == some[:3]


def test_few_questions_are_spread_over_groups_and_images() -> None:
    some = ask(per_group=20)
    assert groups(some) == {"yes/no": 20, "shape": 20, "colour": 20}
    assert len({record.images for record in some}) > 50
    assert some == sorted(some, key=lambda record: int(record.id.rsplit("/", 1)[1])) == ask(per_group=20)
    limited = ask(limit=100)
    assert len(limited) == len({record.images for record in limited}) == 100
    assert len(groups(limited)) == 3
    assert len(ask(per_group=20, limit=7)) == 7
    assert ask(limit=10**6) == ask()


def test_answers_match_but_for_case_space_and_full_stop() -> None:
    evaluator = EasyVqa(EasyVqaSettings())
    question = next(record for record in ask() if record.reference == ("gray",))
    for answer in ["gray", " Gray.\n", "GRAY ."]:
        assert evaluator.score(question, answer) == Score(1.0, "colour")
    for answer in ["", ".", "grey", "gray shape", "it is gray", "gray, red"]:
        assert evaluator.score(question, answer) == Score(0.0, "colour")


def test_totals_are_given_for_all_and_for_each_group() -> None:
    evaluator = EasyVqa(EasyVqaSettings(per_group=4))
    scores = [evaluator.score(record, "yes") for record in evaluator.records()]
    totals = evaluator.total(scores)
    assert set(totals) == {"accuracy", "colour", "shape", "yes/no"}
    assert totals["colour"] == totals["shape"] == 0
    assert totals["accuracy"] == pytest.approx(totals["yes/no"] / 3)


def test_neither_torch_nor_the_package_is_imported_to_list_the_questions() -> None:
    code = """
import sys
from graftwork_easy_vqa import EasyVqa, EasyVqaSettings
assert len(list(EasyVqa(EasyVqaSettings(limit=3)).records())) == 3
assert not {"torch", "PIL", "easy_vqa"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
