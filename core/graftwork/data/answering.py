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

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHOWN = 10
"""How many of the commonest questions and answers are named."""


def pairs_of(record: Record) -> Iterator[tuple[str, str]]:
    """Every question of a record with its answer, without `<image>`."""
    for asked, answered in zip(record.turns, record.turns[1:], strict=False):
        if asked.role == "user" and answered.role == "assistant":
            yield asked.text.replace("<image>", " ").strip(), answered.text.strip()


@lru_cache(maxsize=1 << 14)
def plain(text: str) -> str:
    """A text without what does not change what it says: case, punctuation, spacing, forms of the same letter."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text.replace("<image>", " ")).casefold())
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
    """Of guessing each question's commonest other answer, 0 to 1."""
    majority: float
    """Of always giving the commonest other answer of all."""


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
    """Collects questions and answers as numbers, 44 bytes for each."""

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
            commonest_questions=tuple(self._commonest(records, questions, answers)),
            repeated=repeated,
            contradicting=contradicting,
        )

    def _shares(self, questions: NDArray[Any], answers: NDArray[Any]) -> Iterator[Share]:
        import numpy as np

        majority = _guessed(np.zeros_like(questions), answers)
        blind = _guessed(questions, answers, unseen=majority)
        groups = np.frombuffer(self.groups, np.dtype("l"))
        yield Share("all", len(questions), float(blind.mean()), float(majority.mean()))
        for name, group in sorted(self.names.items()) if len(self.names) > 1 else ():
            chosen = groups == group
            if chosen.any():
                yield Share(
                    name or "no group", int(chosen.sum()), float(blind[chosen].mean()), float(majority[chosen].mean())
                )

    def _commonest(self, records: Sequence[Record], questions: NDArray[Any], answers: NDArray[Any]) -> Iterator[Asked]:
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


def _guessed(questions: NDArray[Any], answers: NDArray[Any], unseen: NDArray[Any] | None = None) -> NDArray[Any]:
    """For each answer, whether the commonest *other* answer to its question is the same, 0 to 1; where several are equally common, the
    chance to draw it. A question that is asked once has the value of `unseen`.

    Each is left out of what it is guessed by: or else a question that is asked once would be guessed right always.
    """
    import numpy as np

    order = np.lexsort((answers, questions))
    asked, given = questions[order], answers[order]
    new_question = np.concatenate([[True], asked[1:] != asked[:-1]])
    new_answer = new_question | np.concatenate([[True], given[1:] != given[:-1]])
    starts = np.flatnonzero(new_answer)
    counts = np.diff(np.append(starts, len(order)))
    of_question = np.cumsum(new_question)[starts] - 1
    firsts = np.flatnonzero(new_question[starts])
    most = np.maximum.reduceat(counts, firsts)[of_question]
    tied = np.add.reduceat((counts == most).astype(np.int64), firsts)[of_question]
    rest = np.where(counts == most, 0, counts)
    second = np.maximum.reduceat(rest, firsts)[of_question]
    seconds = np.add.reduceat(((counts == second) & (rest > 0)).astype(np.int64), firsts)[of_question]
    # Without itself, a commonest answer stays so, or shares that with those that come second; any other is not.
    right = np.where(counts - 1 > second, 1.0, np.where(counts - 1 == second, 1.0 / (seconds + 1), 0.0))
    right = np.where((counts == most) & (tied == 1), right, 0.0)
    totals = np.add.reduceat(counts, firsts)[of_question]
    values = np.empty(len(order))
    values[order] = np.repeat(np.where(totals == 1, np.nan, right), counts)
    if unseen is None:
        return np.nan_to_num(values)
    return np.where(np.isnan(values), unseen, values)
