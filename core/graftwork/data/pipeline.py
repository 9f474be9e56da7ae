"""From data sources through data operators to records on disk, with every dropped record counted and explained."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from graftwork.contracts.component import Component
from graftwork.contracts.data import DataMaker, DataOperator, DataSource, DataVerifier
from graftwork.contracts.records import BadRecord, Record
from graftwork.contracts.writer import Writer
from graftwork.data.store import DroppedStore, Joined, RecordStore, RecordWriter, TemporaryFolder, hash64
from graftwork.errors import DataError, GraftworkError, NoRoom, NothingLeft

MAX_EXAMPLES = 5
"""How many bad records an error lists."""
SOURCES = "sources"
"""The stage that reads."""
DONE = "stage.json"
Lend = Callable[[DataOperator[Any], Path], AbstractContextManager[Writer | None]]
"""Lends an operator a writer for one stage, whose folder keeps what was asked and replied."""


class StageCount(NamedTuple):
    """How many records a source or operator read or made, how many went on, and how many were dropped with a reason."""

    name: str
    read: int
    kept: int
    dropped: int


@dataclass(frozen=True)
class Stage:
    """What a source or an operator did: `read + made = kept + dropped`."""

    name: str
    read: int
    made: int
    kept: int
    dropped: int
    seconds: float
    verdicts: Sequence[Mapping[str, Any]] = ()
    """What a verifier found, by group."""

    def __post_init__(self) -> None:
        if self.read + self.made != self.kept + self.dropped or min(self.made, self.kept, self.dropped) < 0:
            raise AssertionError(f"the numbers of stage '{self.name}' do not balance: {self}")

    @property
    def count(self) -> StageCount:
        """The same as a row of a table."""
        return StageCount(self.name, self.read + self.made, self.kept, self.dropped)


@dataclass(frozen=True)
class PipelineResult:
    """What is left for a run, everything that was dropped on the way, and what each stage did."""

    folder: Path
    stages: Sequence[Stage]
    folders: Sequence[Path]
    """What holds the stages' records, in their order: one for all sources, then one for each operator."""
    temporary: TemporaryFolder | None = None
    """Where they lie, if nobody else is to find them."""

    @property
    def records(self) -> RecordStore:
        """The records that are left."""
        return RecordStore(self.folders[-1], self.folder, self.temporary)

    @property
    def given(self) -> RecordStore:
        """The records that the sources gave."""
        return RecordStore(self.folders[0], self.folder, self.temporary)

    @property
    def bad(self) -> Sequence[BadRecord]:
        """Everything that was dropped, in the order of the stages."""
        return Joined([DroppedStore(folder) for folder in self.folders])

    @property
    def counts(self) -> list[StageCount]:
        """A row for each stage."""
        return [stage.count for stage in self.stages]

    @property
    def read(self) -> int:
        """How many records the sources gave and the operators added."""
        sources = len(self.stages) - len(self.folders) + 1
        return sum(stage.read for stage in self.stages[:sources]) + sum(stage.made for stage in self.stages)


def read_records(
    sources: Sequence[DataSource[Any]],
    operators: Sequence[DataOperator[Any]],
    *,
    seed: int,
    strict: bool,
    lend: Lend = lambda operator, folder: nullcontext(),
    folder: Path | None = None,
    limit: int | None = None,
    say: Callable[[Stage], None] = lambda stage: None,
) -> PipelineResult:
    """Read the sources in order and pass their records through the operators in order, stage by stage, each on disk.

    `folder` keeps the stages; those that are complete there are not done again, so it must be of the same components. Without
    it they lie in a temporary folder as long as the result lives. `lend` lends operators their writer. The sources are read up to the
    record of number `limit`. `say` is told of each stage that is done. Ids that repeat get `#2`, `#3`, … so that all differ. With
    `strict` the first bad record of a source raises DataError; what an operator drops is meant to be dropped. DataError also
    when nothing is left, or when a component raises anything else; then it names the component.
    """
    temporary = None if folder else TemporaryFolder()
    root = temporary.path if temporary else folder
    assert root is not None
    folders = [root / SOURCES, *(root / f"{number}-{each.name}" for number, each in enumerate(operators, 1))]
    stages = _once(folders[0], root, lambda to: _read(sources, to, strict=strict, limit=limit), say)
    for number, operator in enumerate(operators):

        def apply(
            to: RecordWriter, operator: DataOperator[Any] = operator, given: Path = folders[number]
        ) -> list[Stage]:
            return [_apply(operator, RecordStore(given, root), to, seed=seed, lend=lend)]

        stages += _once(folders[number + 1], root, apply, say)
    result = PipelineResult(root, stages, folders, temporary)
    if not len(result.records):
        losses = ", ".join(f"'{count.name}' dropped {count.dropped:,}" for count in result.counts if count.dropped)
        raise NothingLeft(
            f"no record is left of {result.read:,} that were read: {losses or 'no source has any'}", _examples(result)
        )
    return result


def _once(
    folder: Path, root: Path, work: Callable[[RecordWriter], list[Stage]], say: Callable[[Stage], None]
) -> list[Stage]:
    """What a stage, or several, did, now or earlier; `work` writes its records, which are complete once DONE is there."""
    done = folder / DONE
    if done.exists():
        return [Stage(**stage) for stage in json.loads(done.read_text(encoding="utf-8"))]
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with RecordWriter(folder, root) as to:
            stages = work(to)
        unfinished = done.with_suffix(".unfinished")
        unfinished.write_text(json.dumps([asdict(stage) for stage in stages]), encoding="utf-8")
        unfinished.replace(done)
    except OSError as error:
        raise NoRoom(
            f"records cannot be written to '{root}' ({error.strerror or error}); make room there, and try again"
        ) from error
    for stage in stages:
        say(stage)
    return stages


def _read(sources: Sequence[DataSource[Any]], to: RecordWriter, *, strict: bool, limit: int | None) -> list[Stage]:
    stages = []
    for number, source in enumerate(sources):
        begun, before = time.perf_counter(), (len(to.records), len(to.dropped))
        for item in islice(_items_of(source, source.records), None if limit is None else limit - len(to)):
            if isinstance(item, Record):
                said = source.coordinates or item.coordinates
                same = (item.source, item.coordinates) == (number, said)
                item = _add(to, item if same else replace(item, source=number, coordinates=said))
            if isinstance(item, BadRecord):
                if strict:
                    raise DataError(f"{item.where}: {item.why}; fix it, or set data.strict to false")
                to.drop(item, source.name)
        kept, dropped = len(to.records) - before[0], len(to.dropped) - before[1]
        stages.append(Stage(source.name, kept + dropped, 0, kept, dropped, time.perf_counter() - begun))
    to.finish()
    return stages


def _apply(
    operator: DataOperator[Any],
    given: RecordStore,
    to: RecordWriter,
    *,
    seed: int,
    lend: Lend,
) -> Stage:
    import numpy

    begun, named = time.perf_counter(), list[int]()
    unnamed: list[BadRecord] = []
    with lend(operator, to.folder) as writer:
        for item in _items_of(operator, partial(operator.apply, given, seed=seed, writer=writer)):
            if isinstance(item, Record):
                item = _add(to, item)
            if isinstance(item, BadRecord) and item.id:
                named.append(hash64(item.id))
                to.drop(item, operator.name)
            elif isinstance(item, BadRecord):
                unnamed.append(item)
    before, after = given.ids(), to.finish()
    dropped = numpy.array(named, dtype=numpy.int64)
    made = int((~numpy.isin(after, before)).sum() + (~numpy.isin(dropped, before)).sum())
    if numpy.isin(dropped, after).any() or len(numpy.unique(dropped)) < len(dropped):
        raise DataError(f"data operator '{operator.name}' kept or dropped a record twice; fix the plugin")
    gone = numpy.flatnonzero(~numpy.isin(before, after) & ~numpy.isin(before, dropped))
    made += max(0, len(unnamed) - len(gone))
    for bad in _explained([given[int(index)] for index in gone], unnamed, operator.name):
        to.drop(bad, operator.name)
    if isinstance(operator, DataMaker):
        _check_made(operator.name, given, RecordStore(to.folder, to.root))
    kept, lost = len(to.records), len(to.dropped)
    verdicts = [asdict(found) for found in operator.verdicts()] if isinstance(operator, DataVerifier) else []
    return Stage(operator.name, len(given), made, kept, lost, time.perf_counter() - begun, verdicts)


def common_lines(before: RecordStore, after: RecordStore) -> Iterator[tuple[bytes, bytes]]:
    """The lines of each record that two stores have, in the order of the second."""
    import numpy

    ids, wanted = before.ids(), after.ids()
    if not len(ids):
        return
    order = numpy.argsort(ids, kind="stable")
    found = numpy.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)
    for place, index in enumerate(order[found].tolist()):
        if ids[index] == wanted[place]:
            yield before.line(index), after.line(place)


def _check_made(name: str, given: RecordStore, found: RecordStore) -> None:
    """DataError where a maker changed a record that it was given, or does not say that it made one: what is not known to be made is not
    verified."""
    import numpy

    for old, new in common_lines(given, found):
        if old != new:
            raise DataError(
                f"data operator '{name}' makes records, and changed '{found.parse(new).id}'; fix the plugin"
            )
    for place in numpy.flatnonzero(~numpy.isin(found.ids(), given.ids())):
        made = found[int(place)]
        if made.meta.get("made_by") != name:
            raise DataError(f"data operator '{name}' does not say that it made '{made.id}'; fix the plugin")


def _explained(gone: Sequence[Record], reasons: Sequence[BadRecord], name: str) -> Iterator[BadRecord]:
    """Why records are gone: by the reasons that were given without an id, found by their places, else in their order."""
    by_place: dict[str, list[BadRecord]] = {}
    for reason in reversed(reasons):  # so that the first is taken first
        by_place.setdefault(reason.where, []).append(reason)
    matched = [found.pop() if (found := by_place.get(BadRecord.of(record, "").where)) else None for record in gone]
    left = iter([reason for reasons in by_place.values() for reason in reversed(reasons)])
    for record, at_its_place in zip(gone, matched, strict=True):
        if why := at_its_place or next(left, None):
            yield replace(why, id=record.id)
        else:
            yield BadRecord.of(
                record, f"data operator '{name}' gave back neither the record nor why not; fix the plugin"
            )
    yield from left


def _add(to: RecordWriter, record: Record) -> Record | BadRecord:
    """Write a record; what it is instead when no file can hold it."""
    try:
        to.add(record)
    except DataError as error:
        return BadRecord.of(record, error.sentence)
    return record


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


def _examples(result: PipelineResult) -> list[str]:
    verdicts = [verdict for stage in result.stages for verdict in stage.verdicts if verdict["why"]]
    if verdicts:  # They explain all that was dropped with them.
        return [line for verdict in verdicts for line in _verdict_lines(verdict)]
    lines = [f"{each.where}: {each.why}" for _, each in zip(range(MAX_EXAMPLES), result.bad, strict=False)]
    dropped = sum(count.dropped for count in result.counts)
    return [*lines, f"… and {dropped - MAX_EXAMPLES:,} more"] if dropped > MAX_EXAMPLES else lines


def _verdict_lines(verdict: Mapping[str, Any]) -> Iterator[str]:
    """Why nothing of a group is vouched for, and an example of each kind."""
    yield f"{verdict['group'] or 'records without a group'}: {verdict['why']}"
    yield from (f"  {kind}: {found[0]}" for kind, found in verdict["examples"].items() if found)
