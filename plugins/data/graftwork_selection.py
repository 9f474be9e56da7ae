"""Data operators that choose among good records: a sample, or as many of each group."""

from __future__ import annotations

import hashlib
import pickle
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from graftwork.contracts import BadRecord, DataOperator, Record, Writer, hookimpl, setting
from graftwork.data import plain


@dataclass(frozen=True)
class SampleSettings:
    """How many records to keep."""

    count: int | None = setting(None, "Keep so many records", minimum=1)
    share: float | None = setting(None, "Keep this share of the records", minimum=0.0, maximum=1.0)
    per_group: bool = setting(False, "Keep so many, or this share, of each group")


class Sample(DataOperator[SampleSettings]):
    """Keeps some records, drawn by the seed and their ids, whatever their order"""

    name = "sample"
    Settings = SampleSettings

    def validate(self, plan: object) -> Iterable[str]:
        if (self.settings.count is None) == (self.settings.share is None):
            yield "set either 'count' or 'share'"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        count, share = self.settings.count, self.settings.share

        def wanted(sizes: Mapping[str, int]) -> dict[str, int]:
            return {group: round((share or 0.0) * size) if count is None else count for group, size in sizes.items()}

        def group_of(record: Record) -> str:
            return record.group if self.settings.per_group else ""

        yield from _drawn(records, group_of, wanted, f"{seed} {self.name}")

    def files(self) -> Sequence[Path]:
        """None: it depends on records alone."""
        return ()


@dataclass(frozen=True)
class BalanceSettings:
    """How many records of each kind to keep."""

    by: Literal["group", "answer"] = setting("group", "What is balanced: the records' groups, or their last answers")
    at_most: int | None = setting(
        None, "Keep at most so many of each; by default as many as the smallest has", minimum=1
    )


class Balance(DataOperator[BalanceSettings]):
    """Keeps as many records of each group, or of each answer, drawn by the seed and their ids"""

    name = "balance"
    Settings = BalanceSettings

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        def wanted(sizes: Mapping[str, int]) -> dict[str, int]:
            return dict.fromkeys(sizes, self.settings.at_most or min(sizes.values(), default=0))

        group_of = _answer if self.settings.by == "answer" else _group
        yield from _drawn(records, group_of, wanted, f"{seed} {self.name}")

    def files(self) -> Sequence[Path]:
        """None: it depends on records alone."""
        return ()


@hookimpl
def data_operators() -> list[type[DataOperator[Any]]]:
    return [Sample, Balance]


def _group(record: Record) -> str:
    return record.group


def _answer(record: Record) -> str:
    answers = [turn.text for turn in record.turns if turn.role == "assistant"]
    return plain(answers[-1]) if answers else ""


def _drawn(
    records: Iterable[Record],
    group_of: Callable[[Record], str],
    wanted: Callable[[Mapping[str, int]], Mapping[str, int]],
    salt: str,
) -> Iterator[Record | BadRecord]:
    """The records of each group whose ids have the smallest hashes, as many as `wanted` makes of the sizes of all groups, in their order.

    Nothing can be decided before the last record has come, and they may be many: until then they lie in a temporary file.
    """
    draws, numbers, groups = array("Q"), array("l"), dict[str, int]()
    with TemporaryFile() as file:
        for record in records:
            pickle.dump(record, file)
            draws.append(int.from_bytes(hashlib.blake2b(f"{salt} {record.id}".encode(), digest_size=8).digest()))
            numbers.append(groups.setdefault(group_of(record), len(groups)))
        names = [*groups]
        sizes = Counter(numbers)
        limits = wanted({name: sizes[number] for name, number in groups.items()})
        kept = Counter[int]()
        chosen = bytearray(len(draws))
        for place in sorted(range(len(draws)), key=draws.__getitem__):
            if kept[numbers[place]] < limits[names[numbers[place]]]:
                kept[numbers[place]] += 1
                chosen[place] = 1
        file.seek(0)
        for place, number in enumerate(numbers):
            record = pickle.load(file)
            if chosen[place]:
                yield record
                continue
            of = f"of group '{names[number]}' " if len(names) > 1 or names[number] else ""
            why = f"{kept[number]:,} {of}are kept, and it is not among those drawn"
            yield BadRecord.of(record, why, kept=kept[number], of=sizes[number])
