"""A data operator that asks a writer back about answers, and about wrong ones, to tell whether its yes means anything.

A yes is worth as much as the no that stands against it, so every answer that is affirmed is also asked about wrongly, the control: the same image and
question with another record's answer, or, where no other record asks the same, the same question and answer about another
image. A writer that says yes to everything, at random, to a word that it likes or without looking, affirms these as well.

Wrong answers are swapped among the records whose own answer was affirmed, and not among all. Where labels are spoiled, the answer
of another record may by chance be the true one, and a writer that knows it would seem to affirm what is wrong. Where the own answer was
affirmed by a writer that can tell, it is right, and a different one is wrong. If it cannot tell, the answers that it affirmed are just
those that it says yes to, and swapped among themselves it says yes to them again. Drawing a record, and not a word, asks about
each wrong answer as often as it was affirmed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftwork.contracts import BadRecord, DataOperator, DataVerifier, Record, VerifiedGroup, Writer, hookimpl
from graftwork.data import PLACE, ask_about, fill, mistakes_in_words, pairs_of
from graftwork.errors import DataError
from graftwork_round_trip.asking import ASKED, NO_ANSWER, UNTOUCHED, Asked
from graftwork_round_trip.control import Control, wrong_answers
from graftwork_round_trip.findings import Findings
from graftwork_round_trip.settings import RoundTripSettings


class RoundTrip(DataVerifier[RoundTripSettings]):
    """Asks a writer back about answers, and about wrong ones, and keeps what it affirms where it can tell

    Groups in which it also affirms wrong answers, or hardly fewer of them, are dropped as a whole.
    """

    name = "round-trip"
    given = "given"
    Settings = RoundTripSettings

    def validate(self, plan: object) -> Iterable[str]:
        settings = self.settings
        asked = {"question": settings.question} | {
            f"questions.{name}": each for name, each in settings.questions.items()
        }
        for name, text in asked.items():
            if "{answer}" not in text:
                yield f"'{name}' has no {{answer}}; write {{answer}} where it is to stand"
            if PLACE in text:
                yield f"'{name}' has '{PLACE}', and the image is put in front of it; remove it"
        yield from mistakes_in_words(settings.yes, settings.no)

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        """The records that are vouched for, and those that it is not to verify, after all were asked about."""
        if writer is None:
            raise DataError(f"'{self.name}' asks a writer, and there is none; use graftwork data synthesize")
        self._verdicts: Sequence[VerifiedGroup] = ()
        # Nothing can be decided before the last one was asked about; core's records lie on disk and can be read again.
        given = records if isinstance(records, Sequence) else list(records)
        asked = self._ask_back(given, writer)
        control = self._ask_control(given, asked, seed, writer)
        found = Findings(asked, control, self.settings)
        for number, record in enumerate(given):
            yield found.decide(number, record)
        self._verdicts = found.verdicts()

    def verdicts(self) -> Sequence[VerifiedGroup]:
        """What it found, by group."""
        return self._verdicts

    def files(self) -> Sequence[Path]:
        """None: it depends on records and the writer alone."""
        return ()

    def _ask_back(self, records: Sequence[Record], writer: Writer) -> Asked:
        """Ask about every answer."""
        asked = Asked()

        def prompts() -> Iterator[Record]:
            for record in records:
                for question, answer in asked.add(record, self._fate(record)):
                    yield self._prompt(record, question, answer)

        for _, reply in writer.answer(prompts(), max_new_tokens=self.settings.max_new_tokens):
            asked.replies.add(reply, self.settings)
        return asked

    def _ask_control(self, records: Sequence[Record], asked: Asked, seed: int, writer: Writer) -> Control:
        """Ask about wrong answers of the records all of whose own answers were affirmed."""
        control = wrong_answers(asked, seed, self.settings.min_control)

        def prompts() -> Iterator[Record]:
            for of, by, answer in zip(control.of, control.by, control.answers, strict=True):
                record, number = records[asked.records[of]], int(of) - asked.starts[asked.records[of]]
                question, _ = list(pairs_of(record))[number]
                if answer == of:
                    record = replace(record, images=records[asked.records[by]].images)
                yield self._prompt(record, question, asked.texts[int(answer)])

        for _, reply in writer.answer(prompts(), max_new_tokens=self.settings.max_new_tokens):
            control.replies.add(reply, self.settings)
        return control

    def _fate(self, record: Record) -> int:
        if record.turns[-1].role != "assistant":
            return NO_ANSWER
        return ASKED if record.meta.get("made_by") or self.settings.given else UNTOUCHED

    def _prompt(self, record: Record, question: str, answer: str) -> Record:
        text = self.settings.questions.get(record.group, self.settings.question)
        return ask_about(record, fill(text, question=question, answer=answer.replace(PLACE, " ")))


@hookimpl
def data_operators() -> list[type[DataOperator[Any]]]:
    return [RoundTrip]
