"""The books of a run's data balance: what was used and what was left out is what was read, whoever says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from tiny_runs import COMPONENTS, PlanOf

from graftwork.build import compose
from graftwork.checkpoint import manifest
from graftwork.cli.checkpoint import checkpoint_facts
from graftwork.contracts import (
    BadRecord,
    DataOperator,
    DataSource,
    DictLookup,
    Image,
    NoSettings,
    Record,
    Turn,
    Writer,
)
from graftwork.contracts.records import RecordCounts
from graftwork.data.measuring import measure
from graftwork.data.pipeline import StageCount, read_records
from graftwork.data.training_data import TrainingData, load_training_data
from graftwork.errors import DataError
from graftwork.jobs.outcome import data_notes, notes
from graftwork.train.feeding import Feed
from graftwork.train.loop import Outcome

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def of_nine(*numbers: int) -> list[Record]:
    turns = (Turn("user", "Is it?"), Turn("assistant", "yes"))
    return [Record(str(number), turns, where=f"file:{number}") for number in numbers or range(9)]


def training_data(records: list[Record], bad: int = 0) -> TrainingData:
    lines = [f"file:bad {number}: it is bad" for number in range(bad)]
    read = len(records) + bad
    measured = measure(records, Eight(), numpy.zeros((0, 2), dtype=int))
    return TrainingData(records, measured, read, lines, [StageCount("file", read, len(records), bad)])


class Eight:
    """A processor whose every record has eight tokens."""

    def length(self, record: Record) -> int:
        return 8


def test_numbers_that_do_not_balance_are_a_bug() -> None:
    assert str(RecordCounts(1030, 1018, 12)) == "1,018 of 1,030 records used, 12 left out"
    assert str(RecordCounts(24, 24, 0)) == "24 records"
    for numbers in [(30, 30, 12), (30, 18, 11), (5, 6, -1)]:
        with pytest.raises(AssertionError):
            RecordCounts(*numbers)


def test_every_sentence_table_and_manifest_of_a_run_has_the_same_numbers(
    go: Callable[..., Outcome],
) -> None:
    source = {"use": "shapes", "count": 9, "broken": [0, 4], "bad": 1, "long": [7]}
    outcome = go({"data.source": [source], "train.steps": None, "train.epochs": 2.0, "train.batch_size": 2})
    data = outcome.data
    assert (data["read"], data["records"], data["left_out"], len(data["bad"])) == (10, 6, 4, 4)
    assert [tuple(row.values()) for row in data["stages"]] == [
        ("shapes", 10, 9, 1),
        ("train.max_length", 9, 8, 1),
        ("training", 8, 6, 2),
        ("total", 10, 6, 4),
    ]
    assert data["groups"] == {"circle": 3, "square": 3}
    said = [*data_notes(data)]
    left = "left out: 1 by shapes, 1 by train.max_length, 2 by training."
    assert said[0] == f"4 of 10 records could not be used, 6 were; {left}"
    assert said[1].startswith(
        "2 of them were found only in training: their batches were smaller, and the number of steps"
    )
    assert said[2] == "1 record is longer than train.max_length: left out."
    assert [line.split(":")[1] for line in said[3:]] == ["bad 0", "7", "0", "4"]
    read = manifest.read(outcome.checkpoint)
    assert {key: read.data[key] for key in data} == data and read.data["bad_in_all"] == 4
    assert dict(checkpoint_facts(read))["data"] == "6 of 10 records used, 4 left out: circle (3), square (3)"


def test_a_verdict_on_the_data_is_on_what_was_used(go: Callable[..., Outcome]) -> None:
    outcome = go({"data.source": [{"use": "shapes", "count": 2, "broken": [1]}], "train.steps": 2})
    assert outcome.data["records"] == 1
    assert any(reason.startswith("the data is one record") for reason in outcome.verdict.reasons)


class Dropping(DataOperator[NoSettings]):
    """Gives back all but the first record, without a word"""

    name = "dropping"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        yield from list(records)[1:]


class Doubling(Dropping):
    """Gives every record twice"""

    name = "doubling"

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        for record in records:
            yield from (record, record)


class Listed(DataSource[NoSettings]):
    """Nine records"""

    name = "listed"

    def records(self) -> Iterator[Record | BadRecord]:
        yield from of_nine()


class Twins(DataSource[NoSettings]):
    """Two records of one line of a file, with one broken image, and a good one"""

    name = "twins"

    def records(self) -> Iterator[Record | BadRecord]:
        turns = (Turn("user", "<image>\nIs it?"), Turn("assistant", "yes"))
        for id in ("a", "b"):
            yield Record(id, turns, (Image(data=b"no image"),), where="file:1")
        yield of_nine()[0]


@pytest.mark.parametrize(("operator", "read", "used", "left_out"), [(Dropping, 9, 8, 1), (Doubling, 18, 18, 0)])
def test_an_operator_that_loses_or_adds_records_does_not_upset_the_books(
    operator: type[DataOperator[NoSettings]], read: int, used: int, left_out: int
) -> None:
    result = read_records([Listed(NoSettings())], [operator(NoSettings())], seed=0, strict=False)
    assert (result.read, len(result.records), len(result.bad)) == (read, used, left_out)
    assert all(row.read == row.kept + row.dropped for row in result.counts)
    if left_out:
        assert result.bad[0].why.endswith("gave back neither the record nor why not; fix the plugin")
        assert result.bad[0].id


def test_two_records_at_one_place_are_two(run: PlanOf) -> None:
    own = DictLookup(*COMPONENTS, Twins)
    plan = run({"data.source": [{"use": "twins"}]}, own)
    assembly = compose.build_shape(plan, own)
    data = load_training_data(plan, own, assembly.processor)
    feed = Feed(plan.run_context, assembly.processor, data)
    for _ in range(2):
        feed.encode(range(3))
    assert data.counts == RecordCounts(3, 1, 2)
    assert [line.partition(": ")[0] for line in data.summary["bad"]] == ["file:1", "file:1"]


def test_what_is_encoded_ahead_of_its_step_is_not_counted_before(run: PlanOf, lookup: DictLookup) -> None:
    plan = run({"data.source": [{"use": "shapes", "count": 4, "broken": [0, 1]}]})
    assembly = compose.build_shape(plan, lookup)
    data = load_training_data(plan, lookup, assembly.processor)
    share = Feed(plan.run_context, assembly.processor, data).share(0)
    assert sorted(share.unusable) == [0, 1]
    assert data.counts.left_out == 0


@pytest.mark.parametrize("bad", [0, 99, 150])
def test_a_resumed_run_knows_all_that_was_left_out_before(bad: int) -> None:
    data = training_data(of_nine(), bad)
    data.leave_out({4: "file:4: broken", 2: "file:2: broken"})
    recorded = data.recorded()
    assert len(recorded["bad"]) == min(100, bad + 2)
    moved = [replace(record, where=f"moved:{record.id}") for record in of_nine()]
    resumed = training_data(moved, bad)
    resumed.leave_out_again([2, 4], recorded)
    resumed.leave_out({4: "moved:4: broken", 7: "moved:7: broken"})
    assert resumed.counts == RecordCounts(9 + bad, 6, bad + 3)
    lines = resumed.summary["bad"][bad:]
    again = "left out earlier in this run"
    assert lines[0] == ("file:2: broken" if bad < 100 else f"moved:2: {again}")
    assert lines[1] == ("file:4: broken" if bad < 99 else f"moved:4: {again}")
    assert len(lines) == 3


def test_cut_answers_are_those_of_records_that_were_used() -> None:
    data = replace(training_data(of_nine()), cut=frozenset({1, 2, 3}))
    assert (data.summary["too_long"], data.summary["answers_cut"]) == (3, 3)
    data.leave_out({2: "file:2: broken"})
    assert (data.summary["too_long"], data.summary["answers_cut"]) == (2, 2)


def test_data_that_is_lost_on_the_way_says_how_much_was_read(run: PlanOf, lookup: DictLookup) -> None:
    plan = run({"data.source": [{"use": "shapes", "count": 2, "long": [0, 1], "bad": 3}]})
    with pytest.raises(DataError) as caught:
        load_training_data(plan, lookup, compose.build_shape(plan, lookup).processor)
    assert caught.value.sentence == (
        "no record is left to train on: 5 were read, 2 are longer than train.max_length = 128 tokens, 3 could not be used"
    )


@pytest.mark.parametrize("written", ["format1", "format2"])
def test_older_checkpoints_say_only_what_they_know(written: str) -> None:
    folder = CHECKPOINTS / written / "checkpoint-120"
    read = manifest.read(folder)
    assert RecordCounts.recorded(read.data) is None
    records = json.loads((folder / "graftwork.json").read_text())["data"]["records"]
    assert dict(checkpoint_facts(read))["data"].startswith(f"{records:,} records: ")
    assert notes({**read.data, "bad": ["a", "b"], "bad_in_all": 2})[0] == "2 records could not be used."
