"""The records of a run, measured in tokens: those that fit its context, and what happened to the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graftwork.config.restore import restore_component
from graftwork.contracts.batch import IGNORED, Encoded
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.model import Processor
from graftwork.contracts.plan import Plan
from graftwork.contracts.records import Record, RecordCounts
from graftwork.data import pipeline
from graftwork.data.pipeline import StageCount
from graftwork.errors import DataError

MAX_RECORDED = 100
"""How many bad records a checkpoint lists, so that its manifest stays small."""


@dataclass
class TrainingData:
    """The records of a run that fit its context, and what became of all others that were read."""

    records: list[Record]
    """What batches are drawn from. Those that turn out to be unusable stay, so that every batch stays what it is."""
    lengths: list[int]
    read: int
    bad: list[str]
    """A line for each record that was left out before training."""
    stages: list[StageCount]
    """Who left them out."""
    too_long: int = 0
    """How many of them are longer than the run's limit."""
    cut: frozenset[int] = frozenset()
    """Which of `records` lose the end of their answer."""
    unusable: dict[int, str] = field(default_factory=dict)
    """Which of `records` could not be encoded when their batch came: their lines by their places."""

    def leave_out(self, unusable: Mapping[int, str]) -> None:
        """Leave out records that could not be encoded; each counts once."""
        self.unusable = {**unusable, **self.unusable}

    def leave_out_again(self, places: Sequence[int], recorded: Mapping[str, Any]) -> None:
        """Leave out what a run had left out in training when it saved the checkpoint that holds these `recorded` facts."""
        lines = recorded["bad"][recorded["left_out"] - len(places) :]
        lines += [f"{place_of(self.records[index])}: left out earlier in this run" for index in places[len(lines) :]]
        self.leave_out(dict(zip(places, lines, strict=True)))

    @property
    def usable(self) -> list[Record]:
        """The records but for those that could not be encoded."""
        return [record for index, record in enumerate(self.records) if index not in self.unusable]

    @property
    def counts(self) -> RecordCounts:
        """How many records were read, used and left out, as far as is known by now."""
        return RecordCounts(self.read, len(self.records) - len(self.unusable), len(self.bad) + len(self.unusable))

    @property
    def summary(self) -> dict[str, Any]:
        """What became of the records, as plain data."""
        counts, cut, stages = self.counts, len(self.cut - self.unusable.keys()), [*self.stages]
        if self.unusable:
            stages.append(StageCount("training", len(self.records), counts.used, len(self.unusable)))
        stages.append(StageCount("total", counts.read, counts.used, counts.left_out))
        groups = Counter(record.group for record in self.usable if record.group)
        return {
            "read": counts.read,
            "records": counts.used,
            "left_out": counts.left_out,
            "left_out_in_training": len(self.unusable),
            "bad": [*self.bad, *(self.unusable[index] for index in sorted(self.unusable))],
            "too_long": self.too_long + cut,
            "too_long_were": "cut" if cut else "left out",
            "answers_cut": cut,
            "stages": [stage._asdict() for stage in stages],
            "groups": dict(sorted(groups.items())),
        }

    def recorded(self) -> dict[str, Any]:
        """The summary for a checkpoint, with the first lines alone of those on what was left out."""
        summary = self.summary
        return {**summary, "bad": summary["bad"][:MAX_RECORDED], "bad_in_all": summary["left_out"]}


def load_training_data(plan: Plan, lookup: Lookup, processor: Processor) -> TrainingData:
    """Read the records of a plan and measure them in tokens; what is too long is cut or left out, and counted."""
    run_context = plan.run_context
    result = pipeline.read_records(
        [restore_component(choice, lookup) for choice in run_context.sources],  # type: ignore[misc]
        [restore_component(choice, lookup) for choice in run_context.operators],  # type: ignore[misc]
        seed=run_context.seed,
        strict=run_context.strict_data,
    )
    max_length, strict = run_context.train.max_length, run_context.strict_data
    records, lengths, cut, unfit, long = list[Record](), list[int](), set[int](), list[str](), list[str]()
    for record in result.records:
        try:
            length = processor.length(record)
        except DataError as error:
            if strict:
                raise
            unfit.append(f"{place_of(record)}: {error}")
            continue
        if length > max_length:
            if strict:
                raise DataError(f"{place_of(record)}: the record has {length} tokens, train.max_length is {max_length}")
            if run_context.train.too_long == "skip":
                long.append(f"{place_of(record)}: {length} tokens, and train.max_length is {max_length}")
                continue
            cut.add(len(records))
        records.append(record)
        lengths.append(min(length, max_length))
    bad = [*(f"{dropped.where}: {dropped.why}" for dropped in result.bad), *unfit, *long]
    if not records:
        others = len(bad) - len(long)
        raise DataError(
            f"no record is left to train on: {result.read} were read, {len(long)} are longer than "
            f"train.max_length = {max_length} tokens" + (f", {others} could not be used" if others else ""),
            [*long[:3], *bad[: min(others, 3)]],
        )
    fit = len(result.records) - len(unfit)
    stages = [
        *result.counts,
        *([StageCount("processor", len(result.records), fit, len(unfit))] if unfit else []),
        *([StageCount("train.max_length", fit, len(records), len(long))] if long else []),
    ]
    return TrainingData(records, lengths, result.read, bad, stages, len(long), frozenset(cut))


def place_of(record: Record) -> str:
    """Where a record was read, or else which one it is."""
    return record.where or record.id


ONE_ANSWER = 0.95
"""The share of records from which one answer is all that can be learned."""


def faults_of(records: Sequence[Record]) -> list[str]:
    """Why nothing but one answer can be learned from records, as clauses; none for data that is as it should be."""
    answers = Counter(tuple(turn.text for turn in record.turns if turn.role == "assistant") for record in records)
    questions = {
        (tuple(turn.text for turn in record.turns if turn.role == "user"), record.images) for record in records
    }
    (answer, count), total = answers.most_common(1)[0], len(records)
    if len(questions) == len(answers) == 1:
        return [f"the data is one record, {total} times: there is nothing to learn but that record"]
    if len(questions) == 1:
        return [f"all {total} records ask the same of the same image, so that no answer can depend on it"]
    if count >= ONE_ANSWER * total:
        return [f"{count} of {total} records have the same answer, '{answer[-1][:40]}', and no other can be learned"]
    return []


def cut(example: Encoded, max_length: int) -> Encoded:
    """The first `max_length` tokens of a record; DataError when no label, or not the whole image, is among them."""
    if not example.num_label_tokens:
        raise DataError("nothing is to be learned from a record without a labelled token")
    if len(example.input_ids) <= max_length:
        return example
    if any(example.image_token_mask[max_length:]) or all(label == IGNORED for label in example.labels[:max_length]):
        raise DataError(f"nothing to learn is left of a record of {len(example.input_ids)} tokens cut to {max_length}")
    return replace(
        example,
        input_ids=example.input_ids[:max_length],
        image_token_mask=example.image_token_mask[:max_length],
        labels=example.labels[:max_length],
    )
