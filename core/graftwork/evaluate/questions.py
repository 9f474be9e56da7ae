"""The questions of an evaluator: read, and put in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from graftwork import processes
from graftwork.contracts.kinds import Evaluator
from graftwork.contracts.records import BadRecord, Record, image_key, unit_key
from graftwork.errors import DataError

T = TypeVar("T")


def read_questions(
    evaluator: Evaluator[Any],
    *,
    limit: int | None = None,
    strict: bool = False,
    view: Callable[[Record], Record] = lambda record: record,
) -> tuple[list[Record], list[BadRecord]]:
    """The questions of an evaluator, and what is malformed among them. Raises DataError when there are none.

    `limit` counts what counts alone: records of one `unit` are one question, and are read together. `view` makes of each what the
    model is to be asked, or raises DataError.
    """
    records: dict[str, Record] = {}
    units: set[tuple[str, str]] = set()
    bad: list[BadRecord] = []
    for record in evaluator.records():
        if isinstance(record, BadRecord):
            bad.append(record)
            continue
        if record.id in records:
            raise DataError(f"'{evaluator.name}' has two questions with the id '{record.id}'; give each its own")
        if len(units) == limit and unit_key(record) not in units:
            break
        try:
            records[record.id] = view(record)
        except DataError as error:
            bad.append(BadRecord.of(record, error.sentence))
            continue
        units.add(unit_key(record))
        if len(units) == limit and not record.unit:  # Nothing more belongs to it.
            break
    if bad and strict:
        raise DataError(
            f"'{evaluator.name}' holds {len(bad)} malformed questions; fix them, or evaluate without strict data",
            [f"{one.where}: {one.why}" for one in bad[:10]],
        )
    if not records:
        first = f" (the first of {len(bad)} malformed ones: {bad[0].where}: {bad[0].why})" if bad else ""
        raise DataError(f"'{evaluator.name}' holds no question{first}; check where it reads its data")
    return list(records.values()), bad


def by_image(records: Sequence[Record]) -> list[Record]:
    """The records with those about the same image side by side, otherwise in their order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(image_key(record), []).append(record)
    return [record for group in groups.values() for record in group]


def contiguous_slice(questions: Sequence[T]) -> list[T]:
    """This process's part of the questions, in which neighbours stay together: they are often about the same image."""
    rank, count = processes.rank(), processes.count()
    return list(questions[rank * len(questions) // count : (rank + 1) * len(questions) // count])
