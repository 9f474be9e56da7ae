"""How facts about data are worded: the same rows on the page, in Markdown and in a terminal."""

from __future__ import annotations

from graftwork.data.answering import Asked, Share
from graftwork.data.facts import DataFacts, Spread
from graftwork.report.wording import text

SPREAD_HEADERS = ("", "number", "least", "5%", "median", "mean", "95%", "most")
ANSWER_HEADERS = ("commonest answers", "times", "share")
QUESTION_HEADERS = ("commonest questions", "times", "different answers", "commonest answer", "share of it")
SHARE_HEADERS = ("", "questions", "blind guess", "always the commonest answer")
LEAK_HEADERS = ("compared with", "questions", "images", "unreadable")


def tiles(facts: DataFacts) -> dict[str, str]:
    """The numbers that come first."""
    found = {"records": f"{facts.records:,}", "images": f"{facts.images.distinct:,}"}
    found["questions"] = f"{facts.answers.questions:,}"
    if facts.answers.blind:
        found["right without an image"] = f"{facts.answers.blind[0].blind:.1%}"
    if facts.leaks.compared:
        found["records that leak"] = f"{facts.leaks.records:,}"
    return found


CHANGE_HEADERS = ("", "before", "after")


def change_rows(before: DataFacts, after: DataFacts) -> list[tuple[str, str, str]]:
    """What operators have made of a data set, under `CHANGE_HEADERS`: the numbers that come first, and those about images."""
    found = [{**tiles(facts), **dict(image_facts(facts))} for facts in (before, after)]
    names = [name for name in found[0] if name in found[1] and name != "distinct images"]  # They are the images.
    return [(name, found[0][name], found[1][name]) for name in names]


def spread_rows(facts: DataFacts) -> list[tuple[str, ...]]:
    """Lengths and sizes, under `SPREAD_HEADERS`."""
    measured = {
        "words": facts.words,
        "tokens": facts.lengths.tokens if facts.lengths else None,
        "image width": facts.images.width,
        "image height": facts.images.height,
    }
    return [_spread_row(name, found) for name, found in measured.items() if found]


def _spread_row(name: str, found: Spread) -> tuple[str, ...]:
    numbers = (found.least, found.p5, found.median, found.mean, found.p95, found.most)
    return (name, f"{found.count:,}", *(f"{number:,.0f}" if number >= 10 else f"{number:.3g}" for number in numbers))


def share_row(share: Share) -> tuple[str, ...]:
    """A row under `SHARE_HEADERS`."""
    return share.name, f"{share.questions:,}", f"{share.blind:.1%}", f"{share.majority:.1%}"


def question_row(asked: Asked) -> tuple[str, ...]:
    """A row under `QUESTION_HEADERS`."""
    return (
        shortened(asked.question, 80),
        f"{asked.times:,}",
        f"{asked.answers:,}",
        shortened(asked.majority, 60),
        f"{asked.share:.0%}",
    )


def answer_rows(facts: DataFacts) -> list[tuple[str, ...]]:
    """The commonest answers, under `ANSWER_HEADERS`."""
    total = facts.answers.questions
    return [
        (shortened(answer, 80), f"{times:,}", f"{times / total:.1%}")
        for answer, times in facts.answers.commonest_answers
    ]


def length_facts(facts: DataFacts) -> list[tuple[str, str]]:
    """What `max_length` does; empty without a model."""
    lengths = facts.lengths
    if lengths is None:
        return []
    return [
        ("max_length", f"{lengths.max_length:,} tokens"),
        ("longer", f"{lengths.too_long:,} records, with {lengths.tokens_cut:,} tokens beyond it"),
        ("tokens of an image", text(lengths.image_tokens)),
    ]


def image_facts(facts: DataFacts) -> list[tuple[str, str]]:
    """Counts of images."""
    images = facts.images
    return [
        ("distinct images", f"{images.distinct:,}"),
        ("cannot be opened", f"{images.broken:,}, of {images.broken_records:,} records"),
        ("tiny", f"{images.tiny:,}"),
        ("extremely long", f"{images.extreme:,}"),
        ("same pixels as an earlier one", f"{images.equal:,}"),
        ("near duplicates of an earlier one", f"{images.near:,}"),
    ]


def count_facts(facts: DataFacts) -> list[tuple[str, str]]:
    """Counts of records, questions and answers."""
    answers = facts.answers
    groups = {name or "none": number for name, number in facts.groups.items()}
    return [
        ("records without an image", f"{facts.without_image:,}"),
        ("of several questions", f"{facts.conversations:,}"),
        ("groups", text(groups) if len(groups) > 1 or "none" not in groups else "–"),
        ("languages", ", ".join(f"{name} {number / facts.records:.1%}" for name, number in facts.languages.items())),
        ("different questions", f"{answers.distinct_questions:,}, in {answers.spellings:,} spellings"),
        ("different answers", f"{answers.distinct_answers:,}"),
        ("asked again, answered alike", f"{len(answers.repeated):,} records"),
        ("asked again, answered otherwise", f"{len(answers.contradicting):,} records"),
    ]


def leak_rows(facts: DataFacts) -> list[tuple[str, ...]]:
    """What was compared, under `LEAK_HEADERS`."""
    rows = facts.leaks.compared
    return [(each.evaluator, f"{each.questions:,}", f"{each.images:,}", f"{each.unreadable:,}") for each in rows]


def leak_sentence(facts: DataFacts) -> str:
    """What leaks, as a sentence."""
    leaks = facts.leaks
    if not leaks.records:
        return "No image and no question of a test set was found in this data."
    return f"{leaks.images:,} records show an image of a test set; {leaks.questions:,} ask its questions as well."


def shortened(content: str, letters: int) -> str:
    """A text in one line of at most so many letters."""
    line = " ".join(content.split())
    return line if len(line) <= letters else f"{line[: letters - 1]}…"
