"""The round trip: what it keeps and refuses, by which control, and that a writer that cannot tell is found out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fixed_writers import FixedWriter, always, at_random, by_image, by_word

from graftwork.config.settings import parse
from graftwork.conformance import examine
from graftwork.contracts import (
    BadRecord,
    Choice,
    DataOperator,
    Image,
    ModelSpec,
    Plan,
    Record,
    Reply,
    Turn,
    VerifiedGroup,
    Writer,
)
from graftwork.data.pipeline import read_records
from graftwork.errors import DataError
from graftwork_images import Images, ImagesSettings
from graftwork_makers import AskTemplates, Describe
from graftwork_makers.templates import AskTemplatesSettings, Template
from graftwork_makers.texts import DescribeSettings
from graftwork_round_trip import RoundTrip, RoundTripSettings

COLOURS = ("red", "blue", "green", "teal")
ASK = "Is it {answer}?"


def verifier(**settings: Any) -> RoundTrip:
    return RoundTrip(
        parse(RoundTripSettings, {"question": ASK, "min_control": 20} | settings, where="verify", folder=None)
    )


def labelled(number: int, answer: str, **changes: Any) -> Record:
    """A record whose image's name says what colour it has: that of its number."""
    turns = (Turn("user", "<image>\nWhat colour?"), Turn("assistant", answer))
    image = Image(Path(f"{COLOURS[number % 4]}-{number}.png"))
    record = Record(f"r{number}", turns, (image,), "colour", where=f"file:{number}", meta={"made_by": "m", "of": ["x"]})
    return replace(record, **changes)


def right(count: int = 40) -> list[Record]:
    return [labelled(number, COLOURS[number % 4]) for number in range(count)]


def knows(prompt: Record) -> str:
    """Whether the image is of the colour that is asked about."""
    return "Yes." if colour_of(prompt) in prompt.question else "No."


def colour_of(prompt: Record) -> str:
    return str(prompt.images[0]).partition("-")[0]


def run(
    records: Sequence[Record], writer: Writer, *, seed: int = 1, **settings: Any
) -> tuple[list[Record | BadRecord], Sequence[VerifiedGroup]]:
    used = verifier(**settings)
    items = list(used.apply(iter(records), seed=seed, writer=writer))
    assert [item.id for item in items] == [record.id for record in records]
    return items, used.verdicts()


def kept(items: Sequence[Record | BadRecord]) -> list[str]:
    return [item.id for item in items if isinstance(item, Record)]


def test_right_answers_are_kept_and_wrong_ones_are_dropped() -> None:
    records = [*right(), labelled(40, "blue"), labelled(41, "teal")]
    items, (found,) = run(records, FixedWriter(knows))
    assert items[:40] == records[:40]
    numbers = {"affirmed": 40, "of": 42, "control_affirmed": 0, "of_control": 40}
    assert items[40] == BadRecord("file:40", "the writer denies that 'blue' is right", "r40", numbers)
    assert (found.group, found.records, found.affirmed, found.kept) == ("colour", 42, 40, 40)
    assert (found.control, found.control_affirmed, found.unclear, found.why) == (40, 0, 0, "")
    assert found.examples == {
        "kept": [f"'r{n}', 'What colour?': '{COLOURS[n]}'" for n in range(3)],
        "refused": [
            "'r40', 'What colour?': 'blue': the writer denies that 'blue' is right",
            "'r41', 'What colour?': 'teal': the writer denies that 'teal' is right",
        ],
    }


def test_it_asks_in_another_phrasing_and_of_each_group_in_its_own() -> None:
    writer = FixedWriter(knows)
    records = [*right(), labelled(40, "{question}", group="shape")]
    run(records, writer, question="Q: {question} A: {answer}", questions={"colour": ASK})
    asked = {prompt.id: prompt.question for prompt in writer.asked[:41]}
    assert asked["r0"] == "<image>\nIs it red?"
    assert asked["r40"] == "<image>\nQ: What colour? A: {question}"
    assert len(writer.asked) == 41 + 40


def test_wrong_answers_are_those_of_other_affirmed_records_of_the_group_drawn_by_the_seed() -> None:
    records = [*right(400), *(labelled(n, "purple") for n in range(400, 440)), labelled(440, "a cat", group="animal")]

    def control(seed: int) -> list[tuple[str, str]]:
        writer = FixedWriter(knows)
        run(records, writer, seed=seed)
        return [(prompt.id, prompt.question.split()[-1].rstrip("?")) for prompt in writer.asked[len(records) :]]

    asked = control(1)
    assert [id for id, _ in asked] == [f"r{n}" for n in range(400)], "each once, in order; those that were denied never"
    assert all(answer != COLOURS[int(id[1:]) % 4] for id, answer in asked)
    assert min(Counter(answer for _, answer in asked).values()) > 60 and len({answer for _, answer in asked}) == 4
    assert control(1) == asked != control(2)


def test_a_writer_that_only_sees_whether_an_answer_fits_its_question_vouches_for_nothing() -> None:
    turns = [(Turn("user", f"<image>\nWhich is {n}?"), Turn("assistant", f"number {n}")) for n in range(30)]
    asked = [labelled(n, "", turns=each) for n, each in enumerate(turns)]

    def fits(prompt: Record) -> str:
        wanted, given = re.findall(r"\d+", prompt.question)
        return "yes" if wanted == given else "no"

    _, (found,) = run(asked, FixedWriter(fits), questions={"colour": "{question} {answer}"})
    assert (found.affirmed, found.control, found.control_affirmed, found.kept) == (30, 30, 30, 0)
    assert "the writer cannot tell" in found.why


def test_a_wrong_answer_is_one_to_the_same_question_where_there_is_one() -> None:
    size = (Turn("user", "<image>\nHow large?"), Turn("assistant", "small"))
    records = [
        *right(),
        *(labelled(n, "", turns=(size[0], Turn("assistant", s))) for n, s in ((40, "small"), (41, "big"))),
    ]
    odd = labelled(42, "", turns=(Turn("user", "<image>\nHow many?"), Turn("assistant", "two")))
    writer = FixedWriter(lambda prompt: "yes" if prompt.id in ("r40", "r41", "r42") else knows(prompt))
    run([*records, odd], writer)
    control = {prompt.id: prompt.question for prompt in writer.asked[43:]}
    assert (control["r40"], control["r41"]) == ("<image>\nIs it big?", "<image>\nIs it small?")
    (moved,) = (prompt for prompt in writer.asked[43:] if prompt.id == "r42")
    assert control["r42"] == "<image>\nIs it two?" and moved.images != odd.images, "nobody else is asked how many"


def test_small_groups_are_asked_about_several_wrong_answers_each() -> None:
    writer = FixedWriter(knows)
    items, (found,) = run(right(8), writer)
    assert (found.control, found.why, len(kept(items))) == (24, "", 8)
    control = Counter((prompt.id, prompt.question) for prompt in writer.asked[8:])
    assert set(control.values()) == {1} and set(Counter(id for id, _ in control).values()) == {3}
    items, (found,) = run(right(5), writer)
    assert (found.control, kept(items)) == (15, [])
    assert found.why == "only 15 wrong answers could be asked about, fewer than 20"
    assert len(kept(run(right(5), writer, min_control=15)[0])) == 5


@pytest.mark.parametrize(
    ("writer", "why"),
    [
        (always("yes"), "the writer cannot tell: of 40 wrong answers it affirmed 40 \\(100.0%\\), more than 5.0%"),
        (always("no"), "the writer affirmed none of 40 answers, so nothing shows that it can tell"),
        (
            always("13 letters"),
            "the writer affirmed none of 40 answers, so nothing shows that it can tell, and 40 of its replies say neither yes nor no",
        ),
        (at_random(0.5), "the writer cannot tell: of .* wrong answers it affirmed"),
        (at_random(0.9), "the writer cannot tell: of .* wrong answers it affirmed"),
        (by_image(), "the writer cannot tell: of .* wrong answers it affirmed .* \\(100.0%\\)"),
        (by_word("red"), "no wrong answer could be asked about: all 10 that the writer affirmed say the same"),
        (by_word("red", "teal"), "the writer cannot tell: of 20 wrong answers it affirmed 20 \\(100.0%\\)"),
        (by_word("colour"), "the writer affirmed none"),
    ],
)
def test_of_a_writer_that_cannot_tell_nothing_is_kept(writer: FixedWriter, why: str) -> None:
    items, (found,) = run(right(), writer)
    assert (kept(items), found.kept) == ([], 0)
    assert re.match(why, found.why), found.why
    assert all(
        item.why == f"nothing of group 'colour' is vouched for: {found.why}"
        for item in items
        if isinstance(item, BadRecord)
    )


def test_of_a_writer_that_always_writes_the_same_nothing_is_kept() -> None:
    """Whatever a maker's writer says, it may be right about all; but nobody could tell."""
    items, (found,) = run([labelled(4 * n, "red") for n in range(30)], FixedWriter(knows))
    assert kept(items) == []
    assert found.why == "no wrong answer could be asked about: all 30 that the writer affirmed say the same"


def test_a_writer_that_hardly_affirms_more_than_wrong_answers_is_refused() -> None:
    records = [*right(100), *(labelled(n, COLOURS[(n + 1) % 4]) for n in range(100, 700))]
    items, (found,) = run(records, FixedWriter(knows))
    assert kept(items) == []
    assert found.why == (
        "the writer can hardly tell: it affirmed 100 of 700 answers (14.3%), and of 100 wrong answers it affirmed 0 (0.0%), "
        "less than 20% apart"
    )
    assert len(kept(run(records, FixedWriter(knows), min_gap=0.1)[0])) == 100


def test_groups_are_judged_each_by_itself() -> None:
    others = [replace(record, id=f"s{record.id}", group="") for record in right()]
    writer = FixedWriter(lambda prompt: "yes" if prompt.id.startswith("s") else knows(prompt))
    items, (colour, rest) = run([*right(), *others], writer)
    assert kept(items) == [record.id for record in right()]
    assert (colour.why, colour.kept, rest.kept) == ("", 40, 0)
    assert (
        isinstance(items[-1], BadRecord) and items[-1].why == rest.why and rest.why.startswith("the writer cannot tell")
    )


def test_an_answer_that_is_affirmed_where_it_is_wrong_is_refused_by_itself() -> None:
    names = [f"c{n}" for n in range(30)]

    def says(prompt: Record) -> str:
        return "yes" if "c7?" in prompt.question or f"{colour_of(prompt)}?" in prompt.question else "no"

    records = [labelled(n, names[n % 30], images=(Image(Path(f"{names[n % 30]}-{n}.png")),)) for n in range(900)]
    items, (found,) = run(records, FixedWriter(says))
    assert found.why == "" and 0.02 < found.control_affirmed / found.control <= 0.05
    assert not [item for item in items if isinstance(item, Record) and item.turns[-1].text == "c7"]
    (bad, *_) = [item for item in items if item.id == "r7"]
    assert isinstance(bad, BadRecord) and bad.why == "the writer affirms 'c7' too often where it is wrong"
    assert "'c7' was affirmed about" in found.examples["control affirmed"][0]
    affirmed_wrongly = [
        item for item in items if isinstance(item, BadRecord) and item.id != "r7" and "also affirmed" in item.why
    ]
    assert len(affirmed_wrongly) == found.control_affirmed, "and whoever was asked about it is not certain"
    assert found.kept == len(kept(items)) == 900 - 30 - found.control_affirmed


@pytest.mark.parametrize(
    ("reply", "why", "unclear"),
    [
        (Reply("", "the endpoint answered 500"), "asked about 'red', the endpoint answered 500", 0),
        (Reply("It may be."), "asked about 'red', the writer said neither yes nor no but 'It may be.'", 1),
    ],
)
def test_what_got_no_clear_reply_is_dropped_and_counted(reply: Reply, why: str, unclear: int) -> None:
    writer = FixedWriter(lambda prompt: reply if prompt.id == "r0" else knows(prompt))
    items, (found,) = run(right(), writer)
    assert isinstance(items[0], BadRecord) and items[0].why == why
    assert (found.affirmed, found.kept, found.unclear) == (39, 39, unclear)


def test_a_control_without_a_reply_drops_its_record_and_does_not_count() -> None:
    def says(prompt: Record) -> str | Reply:
        return Reply("", "the endpoint answered 500") if prompt.id == "r0" and knows(prompt) == "No." else knows(prompt)

    items, (found,) = run(right(), FixedWriter(says))
    assert isinstance(items[0], BadRecord) and items[0].why.endswith(", the endpoint answered 500")
    assert (found.affirmed, found.control, found.kept) == (40, 39, 39)


def test_records_that_nobody_made_pass_unless_they_are_given_to_verify_and_those_without_an_answer_are_dropped() -> (
    None
):
    own = labelled(99, "purple", meta={})
    bare = Record("bare", (Turn("user", "<image>"),), own.images)
    writer = FixedWriter(knows)
    items, _ = run([own, bare, *right()], writer)
    assert items[0] == own
    assert items[1] == BadRecord("record 'bare'", "its question has no answer", "bare")
    assert "r99" not in {prompt.id for prompt in writer.asked}
    items, _ = run([own, *right()], writer, given=True)
    assert kept(items) == kept(right())


def test_all_answers_of_a_conversation_must_be_affirmed() -> None:
    def talk(number: int, *answers: str) -> Record:
        turns = [Turn("user", "<image>\nWhat colour?"), Turn("assistant", answers[0])]
        turns += [Turn("user", "Sure?"), Turn("assistant", answers[1])]
        return labelled(number, "", turns=tuple(turns))

    records = [*right(), talk(40, "red", "red"), talk(41, "blue", "red"), talk(42, "red", "green")]
    writer = FixedWriter(knows)
    items, (found,) = run(records, writer)
    assert kept(items) == [*kept(right()), "r40"]
    assert (found.records, found.affirmed, found.control, found.kept) == (43, 41, 42, 41)
    assert isinstance(items[41], BadRecord) and items[41].why == "the writer denies that 'red' is right"


def test_the_same_records_and_seed_give_the_same_and_nothing_is_nothing() -> None:
    records = right(60)
    Random(2).shuffle(records)
    assert run(records, FixedWriter(knows)) == run(records, FixedWriter(knows))
    assert run([], always("yes")) == ([], [])


def test_faulty_settings_are_objected_to() -> None:
    plan: Any = Plan(ModelSpec(Choice("model", "m", "m", "m", "0")))
    assert list(RoundTrip(RoundTripSettings()).validate(plan)) == []
    assert list(verifier(question="Right?", questions={"a": "<image> {answer}"}, yes=[]).validate(plan)) == [
        "'question' has no {answer}; write {answer} where it is to stand",
        "'questions.a' has '<image>', and the image is put in front of it; remove it",
        "'yes' and 'no' need at least one word each; give those that the writer begins with",
    ]
    with pytest.raises(DataError, match="'round-trip' asks a writer, and there is none; use graftwork data synthesize"):
        list(verifier().apply([], seed=0))


def test_it_passes_the_kit() -> None:
    outcomes = {outcome.check: outcome for outcome in examine(RoundTrip)}
    assert not [outcome for outcome in outcomes.values() if outcome.state == "failed"]
    assert outcomes["a verifier gives verdicts"].state == "passed"


def test_images_become_a_verified_data_set_stage_by_stage(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{COLOURS[number % 4]}-{number}.png").touch()

    def says(prompt: Record) -> str:
        name = Path(str(prompt.images[0])).name.partition("-")[0]
        if "Describe" in prompt.question:
            return f"A {name} thing, that is what it is"
        if prompt.id.startswith("red-0.png"):
            return "maybe"
        return "yes" if name in prompt.question else "no"

    template = Template("What colour?", "Is it {value}?", COLOURS)
    operators: list[DataOperator[Any]] = [
        AskTemplates(AskTemplatesSettings(templates={"colour": template})),
        Describe(DescribeSettings(max_words=7)),
        verifier(),
    ]

    def lend(operator: object, folder: Path) -> AbstractContextManager[Writer]:
        return nullcontext(FixedWriter(says))

    result = read_records([Images(ImagesSettings(tmp_path))], operators, seed=1, strict=True, lend=lend)
    assert [(stage.name, stage.read, stage.made, stage.kept, stage.dropped) for stage in result.stages] == [
        ("images", 40, 0, 40, 0),
        ("ask-templates", 40, 40, 79, 1),
        ("describe", 79, 40, 79, 40),
        ("round-trip", 79, 0, 39, 40),
    ]
    assert {record.group for record in result.records} == {"colour"}
    assert [each["group"] for each in result.stages[-1].verdicts] == ["colour"]
    assert Counter(bad.why for bad in result.bad) == {
        "none of 4 values is affirmed": 1,
        "the description has 8 words, more than 7": 40,
        "its question has no answer": 40,
    }
