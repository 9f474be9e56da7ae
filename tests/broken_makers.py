"""Makers and verifiers that break one promise each, next to sound ones that they extend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from graftwork import BadRecord, NoSettings, Record, Turn
from graftwork.contracts import DataMaker, DataVerifier, VerifiedGroup


class Captions(DataMaker[NoSettings]):
    """What the writer says of each record without an answer"""

    name = "captions"

    def apply(self, records: Any, *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
        for record in records:
            yield record
            if record.turns[-1].role == "user":
                made = replace(record, id=f"{record.id}/caption", meta=self.meta_of(record))
                for _, reply in writer.answer([made], max_new_tokens=8):
                    yield replace(made, turns=(*record.turns, Turn("assistant", reply.text)))

    def meta_of(self, record: Record) -> Mapping[str, Any]:
        return {"made_by": self.name, "of": [record.id]}


class MakesOfNothing(Captions):
    """It does not say what it made its records of"""

    def meta_of(self, record: Record) -> Mapping[str, Any]:
        return {"made_by": self.name}


class ReplacesWhatItIsGiven(Captions):
    """It gives the made record alone"""

    def apply(self, records: Any, *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
        given = list(records)
        asked = {record.id for record in given if record.turns[-1].role == "user"}
        found = super().apply(given, seed=seed, writer=writer)
        return (item for item in found if not (isinstance(item, Record) and item.id in asked))


class Denies(DataVerifier[NoSettings]):
    """It affirms no answer"""

    name = "denies"

    def apply(self, records: Any, *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
        self.asked = 0
        for record in records:
            self.asked += bool(record.meta.get("made_by"))
            yield BadRecord.of(record, "it is denied") if record.meta.get("made_by") else record

    def verdicts(self) -> Sequence[VerifiedGroup]:
        return [VerifiedGroup("", self.asked, affirmed=0, control=0, control_affirmed=0, kept=0)]


class VouchesForAll(Denies):
    """It keeps what nobody affirms"""

    def apply(self, records: Any, *, seed: int, writer: Any = None) -> Iterator[Record | BadRecord]:
        return iter(list(records))


class SaysNothing(Denies):
    """It has no verdict"""

    def verdicts(self) -> Sequence[VerifiedGroup]:
        return []
