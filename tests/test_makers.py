"""Makers: what they ask, what they make, why they drop, and that they take records one after another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fixed_writers import FixedWriter, always

from graftwork.config.settings import parse
from graftwork.conformance import examine
from graftwork.contracts import (
    BadRecord,
    Choice,
    DataMaker,
    Image,
    ModelSpec,
    Plan,
    Record,
    Reply,
    RunContext,
    Turn,
)
from graftwork.data import affirms, ask_about, fill, mistakes_in_words
from graftwork.errors import DataError, RunFileError
from graftwork_makers import AnswerQuestions, AskTemplates, Describe, QuestionAnswer
from graftwork_makers.texts import pairs_in

TEMPLATES = {
    "colour": {
        "question": ["What colour is it?", "Which colour does it have?"],
        "ask": "Is it {value}?",
        "values": ["red", "blue", "green"],
        "answer": "It is {value}.",
    }
}


def maker(cls: type[DataMaker[Any]], **settings: Any) -> DataMaker[Any]:
    return cls(parse(cls.Settings, settings, where=cls.name, folder=Path.cwd()))


def bare(id: str, *, image: str | None = None, question: str = "<image>") -> Record:
    return Record(id, (Turn("user", question),), (Image(Path(image or f"{id}.png")),), "photo", where=f"files:{id}")


def answered(id: str, **options: Any) -> Record:
    record = bare(id, question="<image>\nWhat is it?", **options)
    return replace(record, turns=(*record.turns, Turn("assistant", "A cat.")))


def apply(made_by: DataMaker[Any], records: list[Record], writer: FixedWriter) -> list[Record | BadRecord]:
    return list(made_by.apply(iter(records), seed=3, writer=writer))


def made(items: list[Record | BadRecord], given: list[Record]) -> list[Record | BadRecord]:
    """What is not among the records that were given, all of which are there."""
    assert [item for item in items if item in given] == given
    return [item for item in items if item not in given]


def dropped(made_by: DataMaker[Any], reply: str | Reply) -> str:
    """Why nothing is made of a reply."""
    given = [bare("a", question="<image>\nWhat is it?")]
    (bad,) = made(apply(made_by, given, FixedWriter(lambda prompt: reply)), given)
    assert isinstance(bad, BadRecord) and bad.id.startswith("a/") and bad.where == "files:a"
    return bad.why


# What is asked of a writer ----------------------------------------------------------------------------------------------


def test_a_text_is_filled_in_at_once_and_other_braces_stay() -> None:
    assert fill("{question} {x} {answer}", question="{answer}?", answer=r"\1") == r"{answer}? {x} \1"


def test_a_prompt_is_about_the_same_images_and_says_nothing_else() -> None:
    record = replace(
        answered("a"), images=(Image(Path("a")), Image(Path("b"))), reference=("x",), unit="u", meta={"k": 1}
    )
    prompt = ask_about(record, "Same?", id="b")
    assert prompt == Record("b", (Turn("user", "<image>\n<image>\nSame?"),), record.images, "photo", where="files:a")


@pytest.mark.parametrize(
    ("reply", "meant"),
    [
        ("Yes.", True),
        ("  YES, it is", True),
        ("no", False),
        ("No!", False),
        ("", None),
        ("Maybe", None),
        ("nobody", None),
        ("not at all", None),
        ("yes or no", None),
        ("It is red, yes", None),
    ],
)
def test_a_reply_says_yes_or_no_by_its_first_word(reply: str, meant: bool | None) -> None:
    assert affirms(reply) is meant


def test_words_for_yes_and_no_are_settings() -> None:
    assert affirms("Ja, sicher", yes=["ja"], no=["nein", "auf keinen Fall"]) is True
    assert affirms("Auf keinen Fall.", yes=["ja"], no=["nein", "auf keinen Fall"]) is False
    assert list(mistakes_in_words(["ja"], [])) == [
        "'yes' and 'no' need at least one word each; give those that the writer begins with"
    ]
    assert list(mistakes_in_words(["ja", "so"], ["So!"])) == ["'so' is in 'yes' and in 'no'; leave it in one of them"]


# Templates --------------------------------------------------------------------------------------------------------------


def test_templates_ask_about_every_value_and_make_a_record_of_the_one_that_is_affirmed() -> None:
    writer = FixedWriter(lambda prompt: "yes" if "blue" in prompt.question else "no")
    given = [bare("a"), bare("b")]
    items = apply(maker(AskTemplates, templates=TEMPLATES), given, writer)
    assert [item.id for item in items] == ["a", "a/colour", "b", "b/colour"]
    first = items[1]
    assert isinstance(first, Record)
    assert first.turns[0].text in ("<image>\nWhat colour is it?", "<image>\nWhich colour does it have?")
    assert first.turns[1] == Turn("assistant", "It is blue.")
    assert (first.group, first.images, first.where) == ("colour", given[0].images, "files:a")
    assert first.meta == {"made_by": "ask-templates", "of": ["a"]}
    assert [prompt.question for prompt in writer.asked[:3]] == [
        f"<image>\nIs it {v}?" for v in ("red", "blue", "green")
    ]
    assert {prompt.id for prompt in writer.asked[:3]} == {"a/colour"}


def test_phrasings_are_drawn_by_the_seed_and_the_id() -> None:
    records = [bare(str(number)) for number in range(40)]

    def questions(seed: int) -> list[str]:
        writer = FixedWriter(lambda prompt: "yes" if "red" in prompt.question else "no")
        items = maker(AskTemplates, templates=TEMPLATES).apply(records, seed=seed, writer=writer)
        return [item.question for item in items if isinstance(item, Record) and item.meta]

    assert questions(1) == questions(1) != questions(2)
    assert len(set(questions(1))) == 2


@pytest.mark.parametrize(
    ("says", "why", "stats"),
    [
        (lambda text: "no", "none of 3 values is affirmed", {"affirmed": [], "unclear": 0}),
        (
            lambda text: "yes",
            "3 of 3 values are affirmed: red, blue, green",
            {"affirmed": ["red", "blue", "green"], "unclear": 0},
        ),
        (lambda text: "Perhaps", "none of 3 values is affirmed", {"affirmed": [], "unclear": 3}),
        (lambda text: Reply("", "the endpoint answered 500"), "asked about 'red', the endpoint answered 500", {}),
    ],
)
def test_templates_drop_what_is_not_affirmed_of_exactly_one_value(says: Any, why: str, stats: dict[str, Any]) -> None:
    (bad,) = made(apply(maker(AskTemplates, templates=TEMPLATES), [bare("a")], FixedWriter(says)), [bare("a")])
    assert bad == BadRecord("files:a", why, "a/colour", stats)


def test_faulty_templates_are_objected_to() -> None:
    def mistakes(**changes: Any) -> list[str]:
        given = {"colour": TEMPLATES["colour"] | changes}
        return list(maker(AskTemplates, templates=given).validate(Plan(ModelSpec(Choice("model", "m", "m", "m", "0")))))

    assert mistakes() == []
    assert mistakes(ask="Is it?") == ["'templates.colour.ask' has no {value}; write {value} where it is to stand"]
    assert mistakes(answer="It is.") == ["'templates.colour.answer' has no {value}; write {value} where it is to stand"]
    assert mistakes(question=[]) == ["'templates.colour.question' is empty; write what is asked"]
    assert mistakes(question="<image> What?") == [
        "'templates.colour.question' has '<image>', and the image is put in front of it; remove it"
    ]
    few = "give at least two, of which one can be affirmed"
    assert mistakes(values=[]) == [f"'templates.colour.values' has no value; {few}"]
    assert mistakes(values=["red"]) == [f"'templates.colour.values' has one value; {few}"]
    assert mistakes(values=["red", "blue", "Red"]) == ["'templates.colour.values' has 'Red' twice; keep one"]
    assert mistakes(values=["red", " "]) == [
        "'templates.colour.values' has a value that is empty or has '<image>'; remove it"
    ]
    with pytest.raises(RunFileError) as caught:
        mistakes(vals=["red"])
    assert (
        "ask-templates.templates.colour.vals: there is no such setting; did you mean 'values'?" in caught.value.details
    )
    plan = Plan(ModelSpec(Choice("model", "m", "m", "m", "0")))
    assert list(maker(AskTemplates).validate(plan)) == [
        "'templates' is not set; give at least one, with 'question', 'ask' and 'values'"
    ]


# Texts ------------------------------------------------------------------------------------------------------------------


def test_given_questions_are_answered_about_every_image_with_another_prompt() -> None:
    writer = always("A dog ")
    answering = maker(
        AnswerQuestions, questions={"animal": "Which animal?", "place": ["Where?"]}, prompt="{question}\nBriefly."
    )
    items = made(apply(answering, [bare("a")], writer), [bare("a")])
    assert [item.id for item in items] == ["a/animal", "a/place"]
    assert isinstance(items[0], Record)
    assert items[0].turns == (Turn("user", "<image>\nWhich animal?"), Turn("assistant", "A dog "))
    assert (items[0].group, items[0].meta) == ("animal", {"made_by": "answer-questions", "of": ["a"]})
    assert [prompt.question for prompt in writer.asked] == [
        "<image>\nWhich animal?\nBriefly.",
        "<image>\nWhere?\nBriefly.",
    ]


def test_without_questions_the_records_own_are_answered() -> None:
    writer = always("A dog")
    own = bare("a", question="<image>\nWhat is it?")
    later = replace(answered("b"), turns=(*answered("b").turns, Turn("user", "How old is <image> it?")))
    given = [own, replace(own, id="again"), bare("nothing asked"), answered("c"), later]
    items = made(apply(maker(AnswerQuestions, prompt="{question} Briefly."), given, writer), given)
    assert [item.id for item in items] == ["a/answer", "again/answer", "b/answer"]
    assert isinstance(items[0], Record) and isinstance(items[2], Record)
    assert items[0].turns == (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A dog"))
    assert (items[0].group, items[0].meta["of"]) == ("photo", ["a"])
    assert items[2].turns == (*later.turns, Turn("assistant", "A dog"))
    assert [prompt.question for prompt in writer.asked] == [
        "<image>\nWhat is it? Briefly.",
        "<image>\nWhat is it? Briefly.",
        "How old is <image> it? Briefly.",
    ]


def test_only_the_answers_that_there_may_be_are_made_and_are_written_so() -> None:
    given, replies = [bare("a"), bare("b")], {"a/shape": "A Circle.", "b/shape": "Blue"}
    settings = {"questions": {"shape": "What shape?"}, "answers": {"shape": ["a circle", "a square"]}}
    items = apply(maker(AnswerQuestions, **settings), given, FixedWriter(lambda prompt: replies[prompt.id]))
    good, bad = made(items, given)
    assert isinstance(good, Record) and good.turns[-1].text == "a circle"
    assert isinstance(bad, BadRecord)
    assert bad.why == "the reply is none of the answers that 'shape' may have: 'Blue'"
    wrong = maker(AnswerQuestions, **{**settings, "answers": {"colour": ["red"]}})
    plan = Plan(ModelSpec(Choice("model", "m", "m", "m", "0")), RunContext())
    assert list(wrong.validate(plan)) == ["'answers.colour' is for a group that 'questions' does not name; correct it"]


def test_descriptions_are_short_or_dropped() -> None:
    writer = FixedWriter(lambda prompt: "one two three" if prompt.id == "a/describe" else "one two three four")
    given = [bare("a"), bare("b")]
    good, bad = made(apply(maker(Describe, max_words=3, question=["Describe it."]), given, writer), given)
    assert isinstance(good, Record)
    assert good.turns == (Turn("user", "<image>\nDescribe it."), Turn("assistant", "one two three"))
    assert good.group == "describe" and good.meta == {"made_by": "describe", "of": ["a"]}
    assert bad == BadRecord("files:b", "the description has 4 words, more than 3", "b/describe", {"words": 4})
    assert writer.asked[0].question == "<image>\nDescribe the image in one sentence of at most 30 words."


@pytest.mark.parametrize(
    "reply",
    [
        "[question] What is it? [answer] A cat",
        "[Question]\nWhat is it?\n[Answer]\nA cat\n",
        "Question: What is it?\nAnswer: A cat",
        "Here you are:\n**Question:** What is it?\n**Answer:** A cat",
    ],
)
def test_a_question_and_its_answer_are_read_from_a_reply(reply: str) -> None:
    (item,) = made(apply(maker(QuestionAnswer), [bare("a")], always(reply)), [bare("a")])
    assert isinstance(item, Record)
    assert item.turns == (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A cat"))
    assert (item.id, item.group) == ("a/question-answer", "question-answer")
    assert item.meta == {"made_by": "question-answer", "of": ["a"]}


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("A cat on a table", "the reply is not one, and '[question] … [answer] …' is wanted: 'A cat on a table'"),
        ("[question] What? [answer]", "the reply is not one, and"),
        ("[answer] A cat [question] What?", "the reply is not one, and"),
        ("[question] A? [answer] b [question] C? [answer] d", "the reply holds 2 questions with answers, and"),
        (
            "[question] What is on the table? [answer] a cup.",
            "the reply repeats the example of the prompt: 'What is on the",
        ),
    ],
)
def test_what_is_no_question_with_an_answer_or_the_example_is_dropped(reply: str, why: str) -> None:
    assert dropped(maker(QuestionAnswer), reply).startswith(why)


@pytest.mark.parametrize("cls", [AnswerQuestions, Describe, QuestionAnswer])
@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (Reply("", "the endpoint answered 500"), "the endpoint answered 500"),
        (Reply("A cat", ended=False), "the reply was cut off at 7 tokens; raise 'max_new_tokens', or ask for less"),
        (" ", "the reply is empty"),
        ("A <image> cat", "the reply has '<image>', which marks turns or images, or is no text"),
        ("A cat\nUSER: and now?", "the reply has 'USER:', which marks turns or images, or is no text"),
        ("A cat<|im_end|>", "the reply has '<|im_end|>', which marks turns or images, or is no text"),
        ("A cat<end_of_turn>", "the reply has '<end_of_turn>', which marks turns or images, or is no text"),
    ],
)
def test_a_reply_that_is_no_text_of_a_turn_is_dropped(cls: type[DataMaker[Any]], reply: str | Reply, why: str) -> None:
    assert dropped(maker(cls, max_new_tokens=7), reply) == why


def test_the_prompt_is_a_file_that_anyone_can_edit(tmp_path: Path) -> None:
    plan: Any = Plan(ModelSpec(Choice("model", "m", "m", "m", "0")))
    file = tmp_path / "prompt.txt"
    asking = maker(QuestionAnswer, prompt=str(file))
    assert list(asking.validate(plan)) == [f"there is no file '{file}'; correct 'prompt'"]
    file.write_text(" \n")
    assert list(asking.validate(plan)) == [f"the prompt in '{file}' is empty; write what the writer is to do"]
    file.write_bytes(b"\xff")
    assert list(asking.validate(plan)) == [f"'{file}' is not UTF-8 text; is it the right file?"]
    file.write_text("<image>")
    assert list(asking.validate(plan)) == [
        f"the prompt in '{file}' has '<image>', and the image is put in front of it; remove it"
    ]
    file.write_text("Ask about the sky.\n")
    assert (list(asking.validate(plan)), asking.files()) == ([], (file,))
    writer = always("[question] What is on the table? [answer] A cup")
    assert isinstance(apply(asking, [bare("a")], writer)[1], Record), "that is no example of this prompt"
    assert writer.asked[0].question == "<image>\nAsk about the sky."


def test_the_prompt_that_comes_with_the_plugin_has_one_example() -> None:
    asking = maker(QuestionAnswer)
    (file,) = asking.files() or ()
    assert list(pairs_in(file.read_text())) == [("What is on the table?", "A cup")]
    assert not list(asking.validate(Plan(ModelSpec(Choice("model", "m", "m", "m", "0")))))


# All --------------------------------------------------------------------------------------------------------------------


def test_an_image_is_asked_about_once_and_answered_ones_only_where_that_is_set() -> None:
    text_only = Record("text", (Turn("user", "Hello?"),))
    given = [answered("a"), bare("b", image="a.png"), bare("c", image="a.png"), text_only, bare("d")]
    items = made(apply(maker(Describe), given, always("A cat.")), given)
    assert [item.id for item in items] == ["b/describe", "d/describe"]
    items = made(apply(maker(Describe, also_answered=True), given, always("A cat.")), given)
    assert [item.id for item in items] == ["a/describe", "d/describe"]


def test_records_come_out_as_soon_as_the_writer_has_replied() -> None:
    taken = 0

    def many() -> Iterator[Record]:
        nonlocal taken
        for taken in range(1, 5000):
            yield bare(str(taken))

    items = maker(Describe).apply(many(), seed=0, writer=always("A cat."))
    assert [item.id for item in itertools.islice(items, 10)] == [
        f"{n}{e}" for n in range(1, 6) for e in ("", "/describe")
    ]
    assert taken <= 6


def test_records_that_nothing_is_made_of_do_not_pile_up() -> None:
    taken = 0

    def many() -> Iterator[Record]:
        nonlocal taken
        for taken in range(1, 5000):
            yield answered(str(taken))

    items = maker(Describe).apply(many(), seed=0, writer=always("A cat."))
    assert len(list(itertools.islice(items, 2500))) == 2500
    assert taken <= 3000


def test_without_a_writer_a_maker_says_so() -> None:
    with pytest.raises(DataError, match="'describe' asks a writer, and there is none; use graftwork data synthesize"):
        list(maker(Describe).apply([], seed=0))


def test_makers_whose_records_would_have_the_same_ids_are_objected_to() -> None:
    def mistakes(*operators: tuple[str, dict[str, Any]]) -> list[str]:
        choices = [Choice("data_operator", name, name, "d", "0", settings) for name, settings in operators]
        plan = Plan(ModelSpec(Choice("model", "m", "m", "m", "0")), RunContext(operators=choices))
        return list(maker(Describe).validate(plan))

    same = "several makers make records whose ids end in '/describe'; call one of them otherwise"
    assert mistakes(("describe", {"group": "describe"})) == []
    assert mistakes(("describe", {"group": "describe"}), ("describe", {"group": "long"})) == []
    assert mistakes(("describe", {"group": "describe"}), ("describe", {"group": "describe"})) == [same]
    assert mistakes(("describe", {"group": "describe"}), ("ask-templates", {"templates": {"describe": {}}})) == [same]
    assert mistakes(("answer-questions", {"questions": {}}), ("answer-questions", {"questions": {}})) == []


@pytest.mark.parametrize("settings", [{"templates": TEMPLATES}])
def test_templates_pass_the_kit(settings: dict[str, Any]) -> None:
    outcomes = {outcome.check: outcome for outcome in examine(AskTemplates, settings=settings)}
    assert not [outcome for outcome in outcomes.values() if outcome.state == "failed"]
    assert outcomes["a maker keeps what it is given"].state == "passed"
