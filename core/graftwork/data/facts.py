"""The facts about a data set: what `graftwork data check` shows, gathered in one pass over its records."""

from __future__ import annotations

import dataclasses
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from graftwork.contracts.model import Processor
from graftwork.contracts.records import BadRecord, Image, Record
from graftwork.data.answering import AnswerFacts, Answers
from graftwork.data.conversations import PLACE
from graftwork.data.fingerprints import Fingerprint, Look, NearImages, look_at_images
from graftwork.data.languages import UNDETERMINED, language_of
from graftwork.data.leaks import Leak, LeakFinder, Questions
from graftwork.data.oddities import (
    BROKEN,
    CONTRADICTING,
    FOREIGN,
    LEAKED,
    LONGEST,
    NEAR,
    SHAPED,
    SHORTEST,
    TOO_LONG,
    Odd,
    image_oddity,
    misplaced,
    text_oddities,
)
from graftwork.errors import DataError

MAX_NAMED = 20
"""How many examples of what is found are kept; all are counted."""
BINS = 24
FEW = 0.05
"""A language of a smaller share of the records is another than most."""


@dataclass(frozen=True)
class Spread:
    """How numbers are spread."""

    count: int
    least: float
    p5: float
    median: float
    mean: float
    p95: float
    most: float
    bins: tuple[int, ...]
    """How many lie in each of equal steps from `least` to `most`."""


@dataclass(frozen=True)
class LengthFacts:
    """Records measured in tokens by a model's processor."""

    tokens: Spread | None
    max_length: int
    too_long: int
    """Records that are longer than `max_length`."""
    tokens_cut: int
    """What lies beyond it in all of them together."""
    image_tokens: tuple[int, ...]
    """How many tokens an image takes: the different numbers that a few images of different sizes gave."""
    unfit: int
    """Records that the processor refuses."""
    refusals: tuple[str, ...]


@dataclass(frozen=True)
class ImageFacts:
    """The distinct images."""

    distinct: int
    width: Spread | None
    height: Spread | None
    broken: int
    broken_records: int
    examples: tuple[str, ...]
    """Why some are broken, a sentence each."""
    tiny: int
    extreme: int
    equal: int
    """Files with the pixels of an earlier one."""
    near: int
    """Near duplicates of an earlier one, beside those that are equal."""


@dataclass(frozen=True)
class LeakFacts:
    """What is shared with evaluators."""

    compared: tuple[Questions, ...]
    records: int
    """Those that share anything."""
    images: int
    """Records with an image of an evaluator's, or a near duplicate of it."""
    questions: int
    """Those that ask the same of it as well, or the same without any image."""
    rare: int
    """Records with a long question that an evaluator asks only once, about another image."""
    pairs: tuple[tuple[str, Leak], ...]
    """The first of them: where the training record was read, and what it shares."""


@dataclass(frozen=True)
class OddRecord:
    """A record to look at."""

    id: str
    where: str
    why: str
    """Empty for one that was drawn to compare."""
    turns: tuple[tuple[str, str], ...]
    group: str = ""
    image: Image | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data; the image by its path."""
        content = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return {**content, "image": str(self.image) if self.image else None}


@dataclass(frozen=True)
class DataFacts:
    """All that was found out about a data set."""

    records: int
    without_image: int
    conversations: int
    """Records of more than one question."""
    groups: Mapping[str, int]
    words: Spread
    lengths: LengthFacts | None
    """None without a model."""
    images: ImageFacts
    languages: Mapping[str, int]
    answers: AnswerFacts
    leaks: LeakFacts
    oddities: Mapping[str, int]
    """Why records are odd, and how many are."""
    odd: tuple[OddRecord, ...] = field(repr=False)
    misplaced: int = 0
    """Records with a box or a point of which it is not known what its numbers count, or that lies outside its image."""
    misplaced_examples: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        content = dataclasses.asdict(dataclasses.replace(self, odd=()))
        return {**content, "odd": [each.to_json() for each in self.odd]}


def spread(numbers: Sequence[float]) -> Spread | None:
    """How numbers are spread; None for none."""
    import numpy as np

    values = np.asarray(numbers, dtype=np.float64)
    if not len(values):
        return None
    p5, median, p95 = (float(each) for each in np.percentile(values, [5, 50, 95]))
    least, most = float(values.min()), float(values.max())
    bins = np.histogram(values, bins=BINS, range=(least, max(most, least + 1)))[0]
    return Spread(len(values), least, p5, median, float(values.mean()), p95, most, tuple(map(int, bins)))


def gather(
    records: Sequence[Record],
    evaluators: Mapping[str, Iterable[Record | BadRecord]] | None = None,
    *,
    processor: Processor | None = None,
    max_length: int = 0,
    seed: int = 17,
    progress: Callable[[int], None] = lambda done: None,
) -> DataFacts:
    """The facts about records, compared with the questions of evaluators.

    Goes through the records once, and reads some of them again. Every distinct image is decoded once. With a `processor`, records are
    measured in tokens against `max_length`. `progress` is told how many records are done.
    """
    finder = LeakFinder()
    compared = tuple(finder.add(name, questions) for name, questions in (evaluators or {}).items())
    gatherer = _Gatherer(finder, _Lengths(processor, max_length) if processor else None)
    for place, (record, looks) in enumerate(look_at_images(records)):
        gatherer.add(place, record, looks)
        progress(place + 1)
    return gatherer.facts(records, compared, seed)


class _Gatherer:
    """Takes the facts of one record after another, in numbers."""

    def __init__(self, finder: LeakFinder, lengths: _Lengths | None) -> None:
        self.finder, self.lengths = finder, lengths
        self.odd, self.answers = Odd(), Answers()
        self.groups: Counter[str] = Counter()
        self.languages: list[str] = []
        self.words = array("l")
        self.counts: Counter[str] = Counter()
        self.images = _Images(self.odd)
        self.pairs: list[tuple[str, Leak]] = []
        self.misplaced: list[str] = []

    def add(self, place: int, record: Record, looks: tuple[Look, ...]) -> None:
        text = " ".join(turn.text.replace(PLACE, " ") for turn in record.turns)
        self.groups[record.group] += 1
        self.words.append(len(text.split()))
        self.languages.append(language_of(text[:1000]))
        self.counts["without image"] += not looks
        self.counts["conversations"] += sum(turn.role == "user" for turn in record.turns) > 1
        for look in looks:
            self.images.add(place, look)
        self.answers.add(place, record, [self.images.first_of(look.number) for look in looks])
        for why in text_oddities(record):
            self.odd.note(place, why)
        if leak := self.finder.leak(record, looks):
            self.counts["leaked"] += 1
            self.counts["leaked images"] += leak.kind != "same question"
            self.counts["leaked questions"] += leak.kind == "same question" or leak.asks_the_same
            self.odd.note(place, LEAKED, leak.sentence)
            if len(self.pairs) < MAX_NAMED:
                self.pairs.append((record.place, leak))
        elif self.finder.rare(record):
            self.counts["rare questions"] += 1
        if why := misplaced(record):
            self.counts["misplaced"] += 1
            if len(self.misplaced) < MAX_NAMED:
                self.misplaced.append(f"{record.place}: {why}")
        elif self.lengths and (tokens := self.lengths.add(record)):
            self.odd.note(place, TOO_LONG, f"it has {tokens:,} tokens, {self.lengths.max_length:,} are trained on")

    def facts(self, records: Sequence[Record], compared: tuple[Questions, ...], seed: int) -> DataFacts:
        answers = self.answers.facts(records)
        for place in answers.contradicting:
            self.odd.note(place, CONTRADICTING)
        languages = Counter(self.languages)
        for place, language in enumerate(self.languages):
            if language != UNDETERMINED and languages[language] < FEW * len(records):
                self.odd.note(place, FOREIGN, f"it is in another language than most: {language}")
        order = sorted(range(len(self.words)), key=self.words.__getitem__)
        for reason, places in ((SHORTEST, order[:2]), (LONGEST, order[-2:])):
            for place in places if self.words and self.words[order[0]] != self.words[order[-1]] else ():
                self.odd.note(place, reason, f"{reason}: {self.words[place]:,} words")
        words = spread(self.words)
        assert words is not None, "a data set has records"
        return DataFacts(
            records=len(self.words),
            without_image=self.counts["without image"],
            conversations=self.counts["conversations"],
            groups=dict(self.groups.most_common()),
            words=words,
            lengths=self.lengths.facts() if self.lengths else None,
            images=self.images.facts(),
            languages=dict(languages.most_common()),
            answers=answers,
            leaks=LeakFacts(
                compared,
                self.counts["leaked"],
                self.counts["leaked images"],
                self.counts["leaked questions"],
                self.counts["rare questions"],
                tuple(self.pairs),
            ),
            oddities={reason: count for reason, count in self.odd.counts.items() if reason not in (LONGEST, SHORTEST)},
            odd=tuple(
                _odd_record(records[place], why) for place, why in self.odd.chosen(len(self.words), seed).items()
            ),
            misplaced=self.counts["misplaced"],
            misplaced_examples=tuple(self.misplaced),
        )


def _odd_record(record: Record, why: str) -> OddRecord:
    turns = tuple((turn.role, turn.text.replace(PLACE, "").strip()) for turn in record.turns)
    return OddRecord(record.id, record.where, why, turns, record.group, record.images[0] if record.images else None)


class _Images:
    """The facts of images, each by its number."""

    def __init__(self, odd: Odd) -> None:
        self.odd = odd
        self.near = NearImages()
        self.firsts: dict[int, int] = {}
        """A near duplicate's number to that of the image that it repeats."""
        self.digests: dict[int, bytes] = {}
        self.widths, self.heights = array("l"), array("l")
        self.broken: dict[int, str] = {}
        self.counts: Counter[str] = Counter()

    def first_of(self, number: int) -> int:
        """The number of the first image that looks like this one."""
        return self.firsts.get(number, number)

    def add(self, place: int, look: Look) -> None:
        found = look.found
        if isinstance(found, DataError):
            self.broken[look.number] = found.sentence
        if look.number in self.broken:
            self.counts["broken records"] += 1
            self.odd.note(place, BROKEN)
        if not isinstance(found, Fingerprint):
            return
        self.widths.append(found.width)
        self.heights.append(found.height)
        if why := image_oddity(found):
            self.counts["tiny" if "tiny" in why else "extreme"] += 1
            self.odd.note(place, SHAPED, why)
        if match := self.near.nearest(found):
            self.firsts[look.number] = match.number
            is_equal = self.digests[match.number] == found.digest
            self.counts["equal" if is_equal else "near"] += 1
            how = "has the same pixels as an earlier one" if is_equal else "is a near duplicate of an earlier one"
            self.odd.note(place, NEAR, f"its image {how}, {match.difference:.1f} levels apart")
        else:
            self.near.add(found, look.number)
            self.digests[look.number] = found.digest

    def facts(self) -> ImageFacts:
        """What was found."""
        return ImageFacts(
            distinct=len(self.widths) + len(self.broken),
            width=spread(self.widths),
            height=spread(self.heights),
            broken=len(self.broken),
            broken_records=self.counts["broken records"],
            examples=tuple(self.broken.values())[:MAX_NAMED],
            tiny=self.counts["tiny"],
            extreme=self.counts["extreme"],
            equal=self.counts["equal"],
            near=self.counts["near"],
        )


class _Lengths:
    """Records measured by a processor."""

    TRIED = 8
    """How many images are encoded to see how many tokens an image takes."""

    def __init__(self, processor: Processor, max_length: int) -> None:
        self.processor, self.max_length = processor, max_length
        self.lengths = array("l")
        self.refusals: list[str] = []
        self.unfit = self.tried = 0
        self.image_tokens: set[int] = set()

    def add(self, record: Record) -> int:
        """Measure a record; its length where it is too long, else 0."""
        try:
            length = self.processor.length(record)
        except DataError as error:
            self.unfit += 1
            if len(self.refusals) < MAX_NAMED:
                self.refusals.append(f"{record.place}: {error.sentence}")
            return 0
        self.lengths.append(length)
        if len(record.images) == 1 and self.tried < self.TRIED:
            self.tried += 1
            with suppress(DataError):  # A broken image, which is counted elsewhere.
                self.image_tokens.add(int(sum(self.processor.encode(record).image_token_mask)))
        return length if length > self.max_length else 0

    def facts(self) -> LengthFacts:
        """What was measured."""
        over = [length - self.max_length for length in self.lengths if length > self.max_length]
        return LengthFacts(
            spread(self.lengths),
            self.max_length,
            len(over),
            sum(over),
            tuple(sorted(self.image_tokens)),
            self.unfit,
            tuple(self.refusals),
        )
