"""Which choice an answer is taken for: as VLMEvalKit tells it without a judge, and as MMBench's paper does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase

LETTERS = ascii_uppercase
FAILED = "Failed to obtain answer via API"
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
"""What VLMEvalKit takes for a refusal."""
_TO_SPACE = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def choose(answer: str, options: Sequence[str]) -> str | None:
    """The letter that VLMEvalKit takes an answer for; None where it can tell none. An empty option is none.

    These are the steps of its `can_infer`, peculiarities kept. Z stands for a refusal. An option's letter counts among the
    last four words only, also where it is the article A. Otherwise the option whose text is in an answer that is at most
    twice as long as all options together.
    """
    texts = by_letter(options)
    if FAILED not in answer:
        if any(refusal in answer for refusal in REFUSALS):
            return "Z"
        words = answer.translate(_TO_SPACE).split()
        found = [letter for letter in texts if letter in words]
        if len(found) == 1 and words.index(found[0]) >= len(words) - 4:
            return found[0]
        if not found and "Z" in words:
            return "Z"
    if len(answer.lower()) > 2 * sum(map(len, options)):
        return None
    return _named_by_text(answer, texts)


def choose_cautiously(answer: str, options: Sequence[str]) -> str | None:
    """The letter that an answer means, in the two steps of MMBench's paper without its third, a language model as judge.

    The only option letter among the words; failing that the only option whose text is in the answer. In more than three
    words an A is taken for the article.
    """
    words, texts = answer.translate(_TO_SPACE).split(), by_letter(options)
    found = [letter for letter in texts if letter in words]
    if len(found) == 1 and not ("A" in words and len(words) > 3):
        return found[0]
    return _named_by_text(answer, texts)


def by_letter(options: Sequence[str]) -> dict[str, str]:
    """The options that are not empty, by their letters."""
    return {letter: text for letter, text in zip(LETTERS, options, strict=False) if text}


def _named_by_text(answer: str, texts: Mapping[str, str]) -> str | None:
    said = answer.lower()
    named = [letter for letter, text in texts.items() if text.lower() in said]
    return named[0] if len(named) == 1 else None
