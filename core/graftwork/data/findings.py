"""What is wrong with a data set: what must not be, and what should be looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from graftwork.data.facts import MAX_NAMED, DataFacts
from graftwork.data.oddities import EXTREME, TINY, TRACES
from graftwork.data.training_data import ONE_ANSWER

BLIND = 0.8
"""The share of questions from which a guess that sees no image says that images hardly matter."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    level: Literal["must", "should"]
    """Whether it must not be, or should be looked at."""
    what: str
    """A clause that says what was found, with numbers."""
    remedy: str
    """What to do, as a clause."""
    examples: tuple[str, ...] = ()


def findings_of(facts: DataFacts, unread: int, examples: Sequence[str] = ()) -> list[Finding]:
    """What is wrong, the worst first. `unread` records could not be read by their source, `examples` say of some where and why."""
    found = [
        *_on_records(facts, unread, examples),
        *_on_images(facts),
        *_on_leaks(facts),
        *_on_answers(facts),
        *_on_texts(facts),
    ]
    return sorted(found, key=lambda finding: finding.level != "must")


def _on_records(facts: DataFacts, unread: int, examples: Sequence[str]) -> Iterator[Finding]:
    if unread:
        remedy = "correct the file, or the setting that says where its images are"
        yield Finding("must", f"{_count(unread, 'record')} that cannot be read", remedy, tuple(examples[:MAX_NAMED]))
    if facts.misplaced:
        what = f"{_count(facts.misplaced, 'record')} with boxes or points outside their image, or of which it is not said what they count"
        yield Finding(
            "must", what, "set coordinates of their source, and correct what lies outside", facts.misplaced_examples
        )
    if facts.lengths and facts.lengths.unfit:
        what = f"{_count(facts.lengths.unfit, 'record')} without a place in the model's template"
        yield Finding("must", what, "change them, or leave them out", facts.lengths.refusals)
    if facts.lengths and facts.lengths.too_long:
        what = f"{_count(facts.lengths.too_long, 'record')} of more than {facts.lengths.max_length:,} tokens"
        yield Finding("should", what, "raise train.max_length, split them, or see that leaving them out is meant")


def _on_images(facts: DataFacts) -> Iterator[Finding]:
    images = facts.images
    if images.broken:
        what = f"{_count(images.broken, 'image')}, of {_count(images.broken_records, 'record')}, that cannot be opened"
        yield Finding("must", what, "replace them, or leave their records out", images.examples)
    if images.equal or images.near:
        what = f"{_count(images.equal, 'image')} with the pixels of an earlier one, and {images.near:,} near to one"
        yield Finding("should", what, "keep one of each, unless their questions differ")
    if images.tiny:
        yield Finding(
            "should", f"{_count(images.tiny, 'image')} of less than {TINY} pixels on the shorter side", "look at some"
        )
    if images.extreme:
        what = f"{_count(images.extreme, 'image')} more than {EXTREME:g} times as long as wide"
        yield Finding("should", what, "look at some: a model sees them squeezed or padded")


def _on_leaks(facts: DataFacts) -> Iterator[Finding]:
    leaks = facts.leaks
    examples = tuple(f"{where}: {leak.sentence}" for where, leak in leaks.pairs)
    names = ", ".join(f"'{each.evaluator}'" for each in leaks.compared)
    if leaks.records:
        what = f"{_count(leaks.images, 'record')} with images of {names}, and {leaks.questions:,} with its questions"
        yield Finding("must", what, "leave them out, or its scores mean nothing", examples)
    if leaks.rare:
        what = f"{_count(leaks.rare, 'record')} with a long question that {names} asks once, about another image"
        yield Finding("should", what, "look whether the image is the same, cut or mirrored")
    for each in leaks.compared:
        if each.unreadable:
            what = (
                f"{each.unreadable:,} questions or images of '{each.evaluator}' cannot be read, and were not compared"
            )
            yield Finding("should", what, "complete the evaluator's data")


def _on_answers(facts: DataFacts) -> Iterator[Finding]:
    answers = facts.answers
    if not answers.questions:
        yield Finding("must", "no record has an answer", "give a source whose records have answers")
        return
    answer, times = answers.commonest_answers[0]
    if answers.asked == 1:
        what = f"all {answers.questions:,} questions ask the same of the same image, so that no answer can depend on it"
        yield Finding("must", what, "give other questions, or other images")
    elif times >= ONE_ANSWER * answers.questions:
        what = f"{times:,} of {answers.questions:,} answers are the same, '{answer[:40]}', and no other can be learned"
        yield Finding("must", what, "balance the answers")
    if answers.contradicting:
        what = f"{_count(len(answers.contradicting), 'record')} with another answer to an earlier question about the same image"
        yield Finding("should", what, "keep one answer, unless several are right")
    if answers.repeated:
        what = f"{_count(len(answers.repeated), 'record')} with the question and the answer of an earlier one about the same image"
        yield Finding("should", what, "keep one of each")
    if answers.blind[0].blind >= BLIND and facts.without_image < facts.records:
        what = f"who sees no image and guesses each question's commonest answer is right {answers.blind[0].blind:.0%} of the time"
        yield Finding(
            "should", what, "balance the answers of each question, or the image is not learned to be looked at"
        )


def _on_texts(facts: DataFacts) -> Iterator[Finding]:
    for reason in TRACES:
        if number := facts.oddities.get(reason, 0):
            yield Finding("should", f"{_count(number, 'record')}: {reason}", "look at some")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
