"""Questions and their answers in a data set: what is asked how often, and how far one gets without looking at the image."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from graftwork.contracts.records import Record
from graftwork.data.conversations import PLACE

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHOWN = 10
"""How many of the commonest questions and answers are named."""


def pairs_of(record: Record) -> Iterator[tuple[str, str]]:
    """Every question of a record with its answer, without `<image>`."""
    for asked, answered in zip(record.turns, record.turns[1:], strict=False):
        if asked.role == "user" and answered.role == "assistant":
            yield asked.text.replace(PLACE, " ").strip(), answered.text.strip()


@lru_cache(maxsize=1 << 14)
def plain(text: str) -> str:
    """A text without what does not change what it says: case, punctuation, spacing, forms of the same letter."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text.replace(PLACE, " ")).casefold())
    return " ".join(words) or text.strip()


def text_key(*texts: str) -> int:
    """A hash of texts that fits into 63 bits."""
    content = "\0".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1


@dataclass(frozen=True)
class Share:
    """How often something is right, of so many questions."""

    name: str
    questions: int
    blind: float
    """Of guessing each question's commonest answer, as the other half of the data has it, 0 to 1."""
    majority: float
    """Of always giving the commonest answer of all."""


@dataclass(frozen=True)
class Asked:
    """One of the commonest questions."""

    question: str
    times: int
    answers: int
    """How many different ones."""
    majority: str
    """The commonest answer."""
    share: float
    """How often that is the answer, 0 to 1."""


@dataclass(frozen=True)
class AnswerFacts:
    """What is asked and answered."""

    questions: int
    """With an answer each; a conversation may have several."""
    distinct_questions: int
    """But for case, punctuation and spacing."""
    spellings: int
    """Distinct questions, letter by letter."""
    asked: int
    """Distinct pairs of a question and the images that it is about."""
    distinct_answers: int
    blind: tuple[Share, ...]
    """Of all, then by group."""
    commonest_answers: tuple[tuple[str, int], ...]
    commonest_questions: tuple[Asked, ...]
    repeated: tuple[int, ...]
    """The records, by their places, that ask an earlier question about the same image again and answer it alike."""
    contradicting: tuple[int, ...]
    """Those that answer it otherwise."""


@dataclass
class Answers:
    """Collects questions and answers as numbers, 48 bytes for each."""

    exact: array[int] = field(default_factory=lambda: array("q"))
    questions: array[int] = field(default_factory=lambda: array("q"))
    answers: array[int] = field(default_factory=lambda: array("q"))
    about: array[int] = field(default_factory=lambda: array("q"))
    """What the question is about: the images, or where there is none what was said before."""
    groups: array[int] = field(default_factory=lambda: array("l"))
    places: array[int] = field(default_factory=lambda: array("l"))
    names: dict[str, int] = field(default_factory=dict)

    def add(self, place: int, record: Record, images: Sequence[int]) -> None:
        """Add the record at a place, about images by their numbers, equal for near duplicates."""
        group = self.names.setdefault(record.group, len(self.names))
        said = "images" if images else "none"
        for question, answer in pairs_of(record):
            asked = plain(question)
            self.exact.append(text_key(question))
            self.questions.append(text_key(asked))
            self.answers.append(text_key(plain(answer)))
            self.about.append(text_key(said, *map(str, images)))
            self.groups.append(group)
            self.places.append(place)
            if not images:
                said = f"{said}\0{asked}"

    def facts(self, records: Sequence[Record]) -> AnswerFacts:
        """What was collected; `records` give the words of what is commonest."""
        import numpy as np

        exact, questions, answers = (
            np.frombuffer(each, np.int64) for each in (self.exact, self.questions, self.answers)
        )
        if not len(questions):
            return AnswerFacts(0, 0, 0, 0, 0, (), (), (), (), ())
        again, repeated, contradicting = self._repeats(questions, answers)
        values, counts = np.unique(answers, return_counts=True)
        top = values[np.argsort(-counts, kind="stable")[:SHOWN]]
        return AnswerFacts(
            questions=len(questions),
            distinct_questions=len(np.unique(questions)),
            spellings=len(np.unique(exact)),
            asked=len(questions) - again,
            distinct_answers=len(values),
            blind=tuple(self._shares(questions, answers)),
            commonest_answers=tuple(
                (self._words(records, answers, answer)[1], int((answers == answer).sum())) for answer in top
            ),
            commonest_questions=tuple(self._asked_most(records, questions, answers)),
            repeated=repeated,
            contradicting=contradicting,
        )

    def _shares(self, questions: NDArray[Any], answers: NDArray[Any]) -> Iterator[Share]:
        import numpy as np

        halves = np.random.default_rng(0).integers(0, 2, len(questions))  # drawn: answers may alternate
        majority = _guessed(np.zeros_like(questions), answers, halves)
        blind = _guessed(questions, answers, halves)
        groups = np.frombuffer(self.groups, np.dtype("l"))
        yield Share("all", len(questions), float(blind.mean()), float(majority.mean()))
        for name, group in sorted(self.names.items()) if len(self.names) > 1 else ():
            chosen = groups == group
            if chosen.any():
                yield Share(
                    name or "no group", int(chosen.sum()), float(blind[chosen].mean()), float(majority[chosen].mean())
                )

    def _asked_most(self, records: Sequence[Record], questions: NDArray[Any], answers: NDArray[Any]) -> Iterator[Asked]:
        import numpy as np

        values, counts = np.unique(questions, return_counts=True)
        for place in np.argsort(-counts, kind="stable")[:SHOWN]:
            given, times = np.unique(answers[questions == values[place]], return_counts=True)
            most, total = int(times.argmax()), int(counts[place])
            both = np.where((questions == values[place]) & (answers == given[most]), values[place], -1)
            question, answer = self._words(records, both, values[place])
            yield Asked(question, total, len(given), answer, float(times[most] / total))

    def _words(self, records: Sequence[Record], keys: NDArray[Any], key: int) -> tuple[str, str]:
        """The question and the answer, as written, where a key stands first."""
        first = int((keys == key).argmax())
        place = self.places[first]
        return list(pairs_of(records[place]))[first - self.places.index(place)]

    def _repeats(self, questions: NDArray[Any], answers: NDArray[Any]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """How often it is asked again what was asked about the same image before, and the records that answer it alike and otherwise."""
        import numpy as np

        about, places = np.frombuffer(self.about, np.int64), np.frombuffer(self.places, np.dtype("l"))
        order = np.lexsort((np.arange(len(questions)), questions, about))
        same = (about[order][1:] == about[order][:-1]) & (questions[order][1:] == questions[order][:-1])
        first = np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), np.arange(len(order)), 0))
        again = np.flatnonzero(first != np.arange(len(order)))
        alike = answers[order][again] == answers[order][first[again]]
        found = [tuple(sorted({int(p) for p in places[order][again[chosen]]})) for chosen in (alike, ~alike)]
        return len(again), found[0], found[1]


def _guessed(questions: NDArray[Any], answers: NDArray[Any], halves: NDArray[Any]) -> NDArray[Any]:
    """For each question, whether the commonest answer to it in the other half of the data is right.

    A question that the other half does not ask is guessed by the commonest answer of all. By the other half, and not by all others,
    since of two answers that are equally common, leaving one out would always leave the other.
    """
    import numpy as np

    right = np.zeros(len(questions), dtype=bool)
    for half in (0, 1):
        known, held_out = halves != half, halves == half
        if not known.any():
            continue
        guesses = np.full(int(held_out.sum()), _commonest(np.zeros_like(questions[known]), answers[known])[1][0])
        asked, commonest = _commonest(questions[known], answers[known])
        places = np.searchsorted(asked, questions[held_out]).clip(max=len(asked) - 1)
        guesses = np.where(asked[places] == questions[held_out], commonest[places], guesses)
        right[held_out] = guesses == answers[held_out]
    return right


def _commonest(questions: NDArray[Any], answers: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The distinct questions, sorted, and the commonest answer to each."""
    import numpy as np

    order = np.lexsort((answers, questions))
    asked, given = questions[order], answers[order]
    starts = np.flatnonzero(np.concatenate([[True], (asked[1:] != asked[:-1]) | (given[1:] != given[:-1])]))
    counts = np.diff(np.append(starts, len(order)))
    best_last = np.lexsort((counts, asked[starts]))
    asked, given = asked[starts][best_last], given[starts][best_last]
    last = np.flatnonzero(np.concatenate([asked[1:] != asked[:-1], [True]]))
    return asked[last], given[last]
