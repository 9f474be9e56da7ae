"""From data sources through data operators to a list of records, with every dropped record counted and explained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from graftwork.contracts.component import Component
from graftwork.contracts.data import DataOperator, DataSource
from graftwork.contracts.model import Writer
from graftwork.contracts.records import BadRecord, Record
from graftwork.errors import DataError, GraftworkError

MAX_EXAMPLES = 5
"""How many bad records an error lists."""


class StageCount(NamedTuple):
    """How many records a source or operator read or made, how many went on, and how many were dropped with a reason."""

    name: str
    read: int
    kept: int
    dropped: int


@dataclass(frozen=True)
class PipelineResult:
    """What is left for a run, everything that was dropped on the way, and a row for each stage."""

    records: list[Record]
    bad: list[BadRecord]
    counts: list[StageCount]
    read: int
    """How many records the sources gave and the operators added."""


def read_records(
    sources: Sequence[DataSource[Any]],
    operators: Sequence[DataOperator[Any]],
    *,
    seed: int,
    strict: bool,
    writer: Writer | None = None,
) -> PipelineResult:
    """Read the sources in order and pass their records through the operators in order.

    Ids that repeat get `#2`, `#3`, … so that all differ. With `strict` the first bad record of a source raises
    DataError; what an operator drops is meant to be dropped. DataError also when nothing is left, or when a component
    raises anything else; then it names the component.
    """
    records: list[Record] = []
    bad: list[BadRecord] = []
    counts: list[StageCount] = []
    read = 0
    for source in sources:
        kept, dropped = _run(source, source.records, strict=strict)
        counts.append(StageCount(source.name, len(kept) + len(dropped), len(kept), len(dropped)))
        records += kept
        bad += dropped
        read += counts[-1].read
    records = _distinct(records)
    for operator in operators:
        kept, dropped = _run(operator, partial(operator.apply, records, seed=seed, writer=writer))
        lost = max(0, len(records) - len(kept) - len(dropped))
        place, why = f"data operator '{operator.name}'", "it gave back neither a record nor why not; fix the plugin"
        dropped += [BadRecord(place, why)] * lost
        counts.append(StageCount(operator.name, len(kept) + len(dropped), len(kept), len(dropped)))
        read += counts[-1].read - len(records)
        records = _distinct(kept)
        bad += dropped
    if not records:
        losses = ", ".join(f"'{count.name}' dropped {count.dropped:,}" for count in counts if count.dropped)
        raise DataError(
            f"no record is left of {read:,} that were read: {losses or 'no source has any'}", _examples(bad)
        )
    return PipelineResult(records, bad, counts, read)


def _run(
    component: Component[Any], start: Callable[[], Iterable[Record | BadRecord]], *, strict: bool = False
) -> tuple[list[Record], list[BadRecord]]:
    kept: list[Record] = []
    dropped: list[BadRecord] = []
    for item in _items_of(component, start):
        if isinstance(item, Record):
            kept.append(item)
        elif strict:
            raise DataError(f"{item.where}: {item.why}; fix it, or set data.strict to false")
        else:
            dropped.append(item)
    return kept, dropped


def _items_of(
    component: Component[Any], start: Callable[[], Iterable[Record | BadRecord]]
) -> Iterator[Record | BadRecord]:
    """What the component yields; an exception that it raises becomes a DataError with its name."""
    title = f"{component.kind.replace('_', ' ')} '{component.name}'"
    try:
        for item in start():
            if not isinstance(item, Record | BadRecord):
                raise DataError(f"{title} gave a {type(item).__name__}, not a Record or a BadRecord; fix the plugin")
            yield item
    except GraftworkError:
        raise
    except Exception as error:
        raise DataError(f"{title} failed with {type(error).__name__}: {error}") from error


def _distinct(records: Sequence[Record]) -> list[Record]:
    used_ids = {record.id for record in records}
    counts: dict[str, int] = {}
    distinct = []
    for record in records:
        number = counts[record.id] = counts.get(record.id, 0) + 1
        if number > 1:
            while (id := f"{record.id}#{number}") in used_ids:
                number += 1
            used_ids.add(id)
            counts[record.id] = number
            record = replace(record, id=id)
        distinct.append(record)
    return distinct


def _examples(bad: Sequence[BadRecord]) -> list[str]:
    lines = [f"{each.where}: {each.why}" for each in bad[:MAX_EXAMPLES]]
    return [*lines, f"… and {len(bad) - MAX_EXAMPLES:,} more"] if len(bad) > MAX_EXAMPLES else lines
