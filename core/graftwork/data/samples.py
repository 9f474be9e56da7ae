"""Which answers of a record are trained on, and a sample for each where a model's template writes one otherwise once others follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from graftwork.contracts.data import DataOperator
from graftwork.contracts.plan import TrainOn
from graftwork.contracts.records import Record, Turn
from graftwork.contracts.writer import Writer


def marked(record: Record, train_on: TrainOn) -> Record:
    """The record whose answers are marked by what a run trains on; what the data excludes is never trained on."""
    answers = [place for place, turn in enumerate(record.turns) if turn.role == "assistant"]
    if train_on == "all" or not answers:
        return record
    chosen = answers[-1:] if train_on == "last" else [place for place in answers if record.turns[place].trained]
    turns = (
        replace(turn, trained=place in chosen and turn.trained is not False) if turn.role == "assistant" else turn
        for place, turn in enumerate(record.turns)
    )
    return replace(record, turns=tuple(turns))


@dataclass(frozen=True)
class SampleSettings:
    """What a run trains on."""

    train_on: TrainOn


class SampleOfEachAnswer(DataOperator[SampleSettings]):
    """Makes a sample of each answer that is trained on, which is the last of its sample"""

    name = "sample-of-each-answer"
    Settings = SampleSettings

    def apply(self, records: Iterable[Record], *, seed: int, writer: Writer | None = None) -> Iterator[Record]:
        """The records, each cut behind its first trained answer, and one more for each further answer."""
        for record in records:
            known = marked(record, self.settings.train_on)
            answers = [
                n for n, turn in enumerate(known.turns) if turn.role == "assistant" and turn.trained is not False
            ]
            made: dict[str, Any] = {}
            for number, place in enumerate(answers or [len(known.turns) - 1], 1):
                yield replace(ending_at(known, place), **made)
                made = {
                    "id": f"{record.id}/answer {number + 1}",
                    "meta": {**record.meta, "made_by": self.name, "of": [record.id]},
                }


def ending_at(record: Record, place: int) -> Record:
    """The record up to its turn of this place, with the images that are seen by then; of its answers only that one is trained on."""

    def untrained(turn: Turn) -> Turn:
        return replace(turn, trained=False) if turn.role == "assistant" else turn

    turns = (*map(untrained, record.turns[:place]), record.turns[place])
    return replace(record, turns=turns, images=record.images[: sum(turn.text.count("<image>") for turn in turns)])
