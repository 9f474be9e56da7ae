"""What replies come to: by group whether a writer can tell, and by record whether it stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from graftwork.contracts import BadRecord, Record, VerifiedGroup
from graftwork.data import pairs_of
from graftwork_round_trip.asking import AFFIRMED, ASKED, FAULT, UNCLEAR, UNTOUCHED, Asked
from graftwork_round_trip.control import Control, affirmed_records
from graftwork_round_trip.settings import RoundTripSettings

OF_ONE_ANSWER = 20
"""In how many places an answer must be wrong before it is judged by itself."""
EXAMPLES = 3
"""How many sentences of a kind there are on a group."""


@dataclass
class Group:
    """What was found in the records of a group."""

    name: str
    records: int = 0
    affirmed: int = 0
    control: int = 0
    control_affirmed: int = 0
    unclear: int = 0
    faults: int = 0
    """How many of its answers could not be asked about."""
    fault: str = ""
    """Why not the first of them."""
    kept: int = 0
    why: str = ""
    refused_answers: set[int] = field(default_factory=set)
    """Hashes of those that were affirmed where they are wrong."""
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, kind: str, sentence: str) -> None:
        """Keep one of the first sentences of a kind."""
        if len(found := self.examples.setdefault(kind, [])) < EXAMPLES:
            found.append(sentence)

    def judge(self, settings: RoundTripSettings) -> None:
        """Say why the writer cannot tell, if it cannot."""
        wrong, right = self.control_affirmed / max(self.control, 1), self.affirmed / max(self.records, 1)
        of_wrong = f"of {self.control:,} wrong answers it affirmed {self.control_affirmed:,} ({wrong:.1%})"
        if not self.affirmed and self.faults:
            self.why = f"{self.faults:,} answers could not be asked about, and no other was affirmed: {self.fault}"
        elif not self.affirmed:
            unclear = f", and {self.unclear:,} of its replies say neither yes nor no" if self.unclear else ""
            self.why = (
                f"the writer affirmed none of {self.records:,} answers, so nothing shows that it can tell{unclear}"
            )
        elif not self.control:
            self.why = (
                f"no wrong answer could be asked about: all {self.affirmed:,} that the writer affirmed say the same"
            )
        elif self.control < settings.min_control:
            self.why = f"only {self.control:,} wrong answers could be asked about, fewer than {settings.min_control:,}"
        elif wrong > settings.max_control:
            self.why = f"the writer cannot tell: {of_wrong}, more than {settings.max_control:.1%}"
        elif right - wrong < settings.min_gap:
            of_right = f"it affirmed {self.affirmed:,} of {self.records:,} answers ({right:.1%})"
            self.why = f"the writer can hardly tell: {of_right}, and {of_wrong}, less than {settings.min_gap:.0%} apart"


class Findings:
    """All groups, and what becomes of each record."""

    def __init__(self, asked: Asked, control: Control, settings: RoundTripSettings) -> None:
        import numpy as np

        self.asked, self.control, self.settings = asked, control, settings
        records = np.array(asked.records, np.int64)
        groups = np.array(asked.groups, np.int64)
        self.control_records = records[control.of]
        said, wrongly = (np.array(each.said, np.uint8) for each in (asked.replies, control.replies))
        fates, affirmed = np.array(asked.fates, np.uint8), affirmed_records(asked)
        self.groups: dict[str, Group] = {}
        for name, number in asked.names.items():
            own = groups == number
            if not (own & (fates == ASKED)).any():
                continue
            about = groups[self.control_records] == number
            group = self.groups[name] = Group(
                name,
                records=int((own & (fates == ASKED)).sum()),
                affirmed=int((own & affirmed).sum()),
                control=int((about & (wrongly != FAULT)).sum()),
                control_affirmed=int((about & (wrongly == AFFIRMED)).sum()),
                unclear=int((own[records] & (said == UNCLEAR)).sum() + (about & (wrongly == UNCLEAR)).sum()),
            )
            if len(failed := np.flatnonzero(own[records] & (said == FAULT))):
                group.faults, group.fault = len(failed), asked.replies.texts[int(failed[0])]
            group.judge(settings)
            if not group.why:
                self._refuse_answers(group, about, wrongly)

        for name in settings.questions.keys() - self.groups.keys():  # Most likely misspelt.
            others = ", ".join(map(repr, self.groups)) or "none"
            why = (
                f"'questions.{name}' phrases the question for a group of which there is no record; there are: {others}"
            )
            self.groups[name] = Group(name, why=why)

    def decide(self, number: int, record: Record) -> Record | BadRecord:
        """The record of a number, if it stays."""
        fate = self.asked.fates[number]
        if fate != ASKED:
            return record if fate == UNTOUCHED else BadRecord.of(record, "its question has no answer")
        group = self.groups[record.group]
        why = self._not_vouched_for(group, number) or self._denied(number) or self._wrong_affirmed(group, number)
        last = list(pairs_of(record))[-1]
        if why:
            group.note("refused", f"'{record.id}', '{last[0]}': '{last[1]}': {why}")
            shares = {"affirmed": group.affirmed, "of": group.records}
            return BadRecord.of(
                record, why, **shares, control_affirmed=group.control_affirmed, of_control=group.control
            )
        group.kept += 1
        group.note("kept", f"'{record.id}', '{last[0]}': '{last[1]}'")
        return record

    def verdicts(self) -> Sequence[VerifiedGroup]:
        """The groups, after every record was decided on."""
        return [
            VerifiedGroup(
                each.name,
                records=each.records,
                affirmed=each.affirmed,
                control=each.control,
                control_affirmed=each.control_affirmed,
                kept=each.kept,
                unclear=each.unclear,
                why=each.why,
                examples=each.examples,
            )
            for each in self.groups.values()
        ]

    def _refuse_answers(self, group: Group, about: Any, wrongly: Any) -> None:
        """Refuse what is affirmed too often where it is wrong."""
        import numpy as np

        hashes = np.array(self.asked.hashes, np.int64)[self.control.answers]
        answers, firsts, which = np.unique(hashes[about], return_index=True, return_inverse=True)
        times = np.bincount(which, wrongly[about] != FAULT)
        affirmed = np.bincount(which, wrongly[about] == AFFIRMED)
        for answer, first, count, wrong in zip(answers, firsts, times, affirmed, strict=True):
            if count >= min(self.settings.min_control, OF_ONE_ANSWER) and wrong > self.settings.max_control * count:
                group.refused_answers.add(int(answer))
                text = self.asked.texts[int(self.control.answers[about][first])]
                group.note(
                    "control affirmed",
                    f"'{text}' was affirmed about {wrong:.0f} of {count:.0f} records that say something else, and is refused everywhere",
                )

    def _denied(self, number: int) -> str:
        """Why not all answers of a record were affirmed."""
        asked = self.asked
        for answer in range(asked.starts[number], asked.starts[number + 1]):
            said, text = asked.replies.said[answer], f"'{asked.texts[answer]}'"
            if said != AFFIRMED:
                return _reply_to(said, text, asked.replies.texts[answer])
        return ""

    def _not_vouched_for(self, group: Group, number: int) -> str:
        """Why a group's answers, or one of this record's, are refused as a whole."""
        if group.why:
            return f"nothing of group '{group.name}' is vouched for: {group.why}" if group.name else group.why
        for answer in range(self.asked.starts[number], self.asked.starts[number + 1]):
            if self.asked.hashes[answer] in group.refused_answers:
                return f"the writer affirms '{self.asked.texts[answer]}' too often where it is wrong"
        return ""

    def _wrong_affirmed(self, group: Group, number: int) -> str:
        """Why it is not certain that the writer can tell about this record."""
        first, end = (int(self.control_records.searchsorted(number, side)) for side in ("left", "right"))
        for place in range(first, end):
            said, text = self.control.replies.said[place], f"'{self.asked.texts[int(self.control.answers[place])]}'"
            if said == AFFIRMED and self.control.is_moved[place]:
                group.note("control affirmed", f"{text} about another image")
                return f"the writer also affirmed {text} about another image"
            if said == AFFIRMED:
                group.note("control affirmed", f"{text} in place of '{self.asked.texts[int(self.control.of[place])]}'")
                return f"the writer also affirmed a wrong answer, {text}"
            if said == FAULT:
                return _reply_to(said, text, self.control.replies.texts[place])
        return ""


def _reply_to(said: int, answer: str, words: str) -> str:
    """What the writer said about an answer that it did not affirm, as a clause."""
    if said == FAULT:
        return f"asked about {answer}, {words}"
    if said == UNCLEAR:
        return f"asked about {answer}, the writer said neither yes nor no but '{words}'"
    return f"the writer denies that {answer} is right"
