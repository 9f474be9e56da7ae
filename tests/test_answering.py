"""Questions and answers: what is common, what is repeated, and how far one gets without the image."""

from __future__ import annotations

import pytest
from pictures import about

from graftwork.contracts import Record, Turn
from graftwork.data.answering import AnswerFacts, Answers, pairs_of, plain
from graftwork.data.languages import language_of


def facts_of(records: list[Record], images: list[list[int]] | None = None) -> AnswerFacts:
    answers = Answers()
    for place, record in enumerate(records):
        answers.add(place, record, images[place] if images else [place])
    return answers.facts(records)


def test_a_question_with_one_answer_is_guessed_and_one_with_two_is_half_the_time() -> None:
    records = [about(f"s{n}", question="Is the sky up?", answer="yes", group="sky") for n in range(100)]
    records += [about(f"c{n}", question="Heads?", answer="yes" if n % 2 else "no", group="coin") for n in range(400)]
    shares = {share.name: share for share in facts_of(records).blind}
    assert (shares["sky"].blind, shares["sky"].questions) == (1.0, 100)
    # Answers that alternate are as hard to guess as others: leaving one out would make it 0, every second one would make it 0 or 1.
    assert 0.4 < shares["coin"].blind < 0.6
    assert shares["all"].blind == pytest.approx((100 + 400 * shares["coin"].blind) / 500)


def test_questions_that_are_asked_once_are_guessed_by_the_commonest_answer_of_all() -> None:
    records = [about(str(n), question=f"Number {n}?", answer="no" if n % 4 == 0 else "yes") for n in range(200)]
    (share,) = facts_of(records).blind
    assert share.blind == share.majority == 0.75


def test_spelling_does_not_make_another_question() -> None:
    assert plain("<image>\nWhat  COLOUR is it?") == plain("what colour is it") != plain("What colour is that?")
    assert plain("?!") == "?!"
    facts = facts_of(
        [about("1", question="What is it?"), about("2", question="what is it"), about("3", question="Who?")]
    )
    assert (facts.questions, facts.distinct_questions, facts.spellings) == (3, 2, 3)


def test_what_is_asked_again_about_the_same_image_is_told_by_its_answer() -> None:
    records = [
        about("1", answer="A cat."),
        about("2", answer="a cat"),
        about("3", answer="A dog."),
        about("4", answer="A dog."),
        about("5", question="Where?", answer="There."),
    ]
    facts = facts_of(records, [[0], [0], [0], [1], [0]])
    assert (facts.repeated, facts.contradicting, facts.asked) == ((1,), (2,), 3)


def test_without_an_image_what_was_said_before_tells_questions_apart() -> None:
    def talk(first: str) -> Record:
        turns = [Turn("user", first), Turn("assistant", "Yes."), Turn("user", "Why?"), Turn("assistant", f"{first}!")]
        return Record(first, tuple(turns))

    facts = facts_of([talk("Is it warm?"), talk("Is it cold?"), talk("Is it warm?")], [[], [], []])
    assert (facts.repeated, facts.contradicting) == ((2,), ())


def test_the_commonest_are_named_with_the_words_of_the_data() -> None:
    records = [about(str(n), question="Which?", answer="This." if n < 3 else "That.") for n in range(5)]
    records.append(about("5", question="How?", answer="So."))
    facts = facts_of(records)
    assert facts.commonest_answers == (("This.", 3), ("That.", 2), ("So.", 1))
    first = facts.commonest_questions[0]
    assert (first.question, first.times, first.answers, first.majority, first.share) == ("Which?", 5, 2, "This.", 0.6)


def test_pairs_are_the_questions_of_a_conversation_that_are_answered() -> None:
    turns = (Turn("system", "Be brief."), Turn("user", "<image>\nA?"), Turn("assistant", "B"), Turn("user", "C?"))
    assert [*pairs_of(Record("1", turns))] == [("A?", "B")]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the colour of the shape? It is red.", "en"),
        ("is there a circle? no", "en"),
        ("Was ist auf dem Bild zu sehen? Das ist eine Katze.", "de"),
        ("Quelle est la couleur de la forme dans cette image ?", "fr"),
        ("¿Cuál es el color de la figura y dónde está?", "es"),
        ("这是什么？一只猫。", "zh"),
        ("これは何ですか。猫です。", "ja"),
        ("이것은 무엇입니까?", "ko"),
        ("Что это?", "Cyrillic script"),
        ("Xylophon", "undetermined"),
        ("42", "undetermined"),
    ],
)
def test_languages_are_told_by_letters_and_common_words(text: str, language: str) -> None:
    assert language_of(text) == language
