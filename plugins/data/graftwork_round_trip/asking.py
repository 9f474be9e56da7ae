"""Records, what was asked about their answers, and what was replied, in little memory."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from graftwork.contracts import Record, Reply, image_key
from graftwork.data import TextFile, affirms, hash64, pairs_of, plain, text_key
from graftwork_round_trip.settings import RoundTripSettings

DENIED, AFFIRMED, UNCLEAR, FAULT = range(4)
"""What a reply says."""
UNTOUCHED, NO_ANSWER, ASKED = range(3)
"""What is done with a record."""


@dataclass
class Replies:
    """What replies say, in a byte each, and the words of those that say neither yes nor no."""

    said: bytearray = field(default_factory=bytearray)
    texts: TextFile = field(default_factory=TextFile)

    def add(self, reply: Reply, settings: RoundTripSettings) -> None:
        """Add the next one."""
        meant = affirms(reply.text, yes=settings.yes, no=settings.no)
        self.said.append(FAULT if reply.fault else UNCLEAR if meant is None else AFFIRMED if meant else DENIED)
        self.texts.add(reply.fault or ("" if meant is not None else reply.text[:80]))


@dataclass
class Asked:
    """Records, and what was asked about them and replied, in some ten numbers for each answer."""

    fates: bytearray = field(default_factory=bytearray)
    """By record: what is done with it."""
    starts: array[int] = field(default_factory=lambda: array("q", [0]))
    """By record: the number of its first answer; and behind the last, how many answers there are."""
    groups: array[int] = field(default_factory=lambda: array("q"))
    """By record: the number of its group."""
    images: array[int] = field(default_factory=lambda: array("q"))
    """By record: a hash of what says which its images are."""
    names: dict[str, int] = field(default_factory=dict)
    records: array[int] = field(default_factory=lambda: array("q"))
    """By answer: its record's number."""
    questions: array[int] = field(default_factory=lambda: array("q"))
    """By answer: a hash of its question."""
    hashes: array[int] = field(default_factory=lambda: array("q"))
    """By answer: a hash of what it says."""
    texts: TextFile = field(default_factory=TextFile)
    replies: Replies = field(default_factory=Replies)

    def add(self, record: Record, fate: int) -> list[tuple[str, str]]:
        """Add a record, and return the questions and answers that are asked about."""
        pairs = list(pairs_of(record)) if fate == ASKED else []
        for question, answer in pairs:
            self.records.append(len(self.fates))
            self.questions.append(text_key(plain(question)))
            self.hashes.append(text_key(plain(answer)))
            self.texts.add(answer)
        self.fates.append(fate)
        self.starts.append(len(self.records))
        self.images.append(hash64(image_key(record)))
        self.groups.append(self.names.setdefault(record.group, len(self.names)))
        return pairs
