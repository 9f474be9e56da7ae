"""What is odd about a record, and which records a person should look at."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from random import Random

from graftwork.contracts.coordinates import check_inside, check_relative, check_said, places_of
from graftwork.contracts.records import Record
from graftwork.data.answering import pairs_of
from graftwork.data.fingerprints import Fingerprint
from graftwork.data.images import image_size
from graftwork.errors import DataError

TINY = 28
"""Pixels on the shorter side; a vision tower sees little more than one patch of a smaller image."""
EXTREME = 8.0
"""The longer side through the shorter one."""
SHOWN = 20
PER_REASON = 4
ORDINARY = 4
"""How many records that are not odd are shown at least, to compare."""

TRACES = {
    "it holds letters that could not be decoded (U+FFFD)": re.compile("\ufffd"),
    "it holds UTF-8 that was read as something else": re.compile("Ã[\x80-\xbf]|â€"),
    "it holds HTML": re.compile(r"</?(?!image>)(?:a|b|br|div|font|i|li|p|span|table|td|tr|ul)\b[^<>]*>", re.IGNORECASE),
    "it holds a web address": re.compile(r"https?://\S+"),
    "it speaks of being a language model": re.compile(
        r"\bas an? (?:AI|artificial|large)\b.{0,20}\bmodel\b", re.IGNORECASE
    ),
    "one word is repeated many times": re.compile(r"\b(\w+)(?:\W+\1\b){7,}", re.IGNORECASE),
    "one letter is repeated many times": re.compile(r"([^\W\d_])\1{14,}"),
}
"""What is left of how a text came about, or of how it went wrong, and how it is found."""


def image_oddity(found: Fingerprint) -> str:
    """What is odd about the form of an image, as a clause; empty for nothing."""
    short, long = sorted((found.width, found.height))
    if short < TINY:
        return f"its image is tiny: {found.width} x {found.height} pixels"
    if long > EXTREME * short:
        return f"its image is {long / short:.1f} times as long as it is wide: {found.width} x {found.height} pixels"
    return ""


def text_oddities(record: Record) -> Iterator[str]:
    """What is odd about the texts of a record, a clause each."""
    text = "\n".join(turn.text for turn in record.turns)
    yield from (reason for reason, trace in TRACES.items() if trace.search(text))
    if any(question and question.casefold() == answer.casefold() for question, answer in pairs_of(record)):
        yield "an answer repeats its question"


def misplaced(record: Record) -> str:
    """Why a box or a point of a record cannot be right, whatever the model; empty where all can."""
    try:
        check_said(record)
        if record.images and record.coordinates == "relative":
            check_relative(record)
        if record.coordinates == "pixels" and any(places_of(record)):
            sizes = {image_size(image) for image in record.images}
            if len(sizes) == 1:
                check_inside(record, sizes.pop())
    except DataError as error:
        return error.sentence
    return ""


class Odd:
    """Notes why records are odd, and keeps the first of each reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, list[tuple[int, str]]] = defaultdict(list)

    def note(self, place: int, reason: str, why: str = "") -> None:
        """The record at a place is odd for a reason; `why` says it with the numbers of this record."""
        self.counts[reason] += 1
        if len(self._first[reason]) < PER_REASON:
            self._first[reason].append((place, why or reason))

    def chosen(self, records: int, seed: int) -> dict[int, str]:
        """The places to look at, each with why: of every reason in turn, in the order of `REASONS`, then some that are not odd."""
        chosen: dict[int, str] = {}
        reasons = sorted(self._first, key=lambda reason: REASONS.index(reason) if reason in REASONS else len(REASONS))
        for turn in range(PER_REASON):
            for reason in reasons:
                for place, why in self._first[reason][turn : turn + 1]:
                    if place in chosen:
                        chosen[place] += f"; {why}"
                    elif len(chosen) < SHOWN - ORDINARY:
                        chosen[place] = why
        others = Random(seed).sample(range(records), min(records, SHOWN + len(chosen)))
        for place in others:
            if len(chosen) == min(SHOWN, records):
                break
            chosen.setdefault(place, "")
        return chosen


BROKEN, LEAKED, CONTRADICTING, SHAPED, NEAR = (
    "its image cannot be opened",
    "it leaks",
    "it answers an earlier question about the same image otherwise",
    "its image is tiny or extreme",
    "its image is a near duplicate",
)
TOO_LONG, LONGEST, SHORTEST, FOREIGN = (
    "it is longer than what is trained on",
    "it is the longest",
    "it is the shortest",
    "it is in another language than most",
)
REASONS = (BROKEN, LEAKED, CONTRADICTING, SHAPED, *TRACES, FOREIGN, TOO_LONG, LONGEST, SHORTEST, NEAR)
"""The worst first."""
