"""The records of a run, measured in tokens: those that fit its context, and what happened to the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftwork.config.restore import restore_component
from graftwork.contracts.batch import IGNORED, Encoded
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.model import Processor
from graftwork.contracts.plan import Plan
from graftwork.contracts.records import BadRecord, Record
from graftwork.data import pipeline
from graftwork.errors import DataError

MAX_RECORDED = 100
"""How many bad records a checkpoint lists, so that its manifest stays small."""


@dataclass(frozen=True)
class TrainingData:
    """The records of a run that fit its context, and what happened to the others."""

    records: list[Record]
    lengths: list[int]
    summary: dict[str, Any]

    def leave_out(self, bad: Iterable[str]) -> None:
        """Count records that turned out to be unusable, each once."""
        known = self.summary["bad"]
        known += [line for line in bad if line not in known]

    def recorded(self) -> dict[str, Any]:
        """The summary for a checkpoint: the number of bad records, and the first of them."""
        bad = self.summary["bad"]
        return {**self.summary, "bad": bad[:MAX_RECORDED], "bad_in_all": len(bad)}


def load_training_data(plan: Plan, lookup: Lookup, processor: Processor) -> TrainingData:
    """Read the records of a plan and measure them in tokens; what is too long is cut or left out, and counted."""
    run_context = plan.run_context
    result = pipeline.read_records(
        [restore_component(choice, lookup) for choice in run_context.sources],  # type: ignore[misc]
        [restore_component(choice, lookup) for choice in run_context.operators],  # type: ignore[misc]
        seed=run_context.seed,
        strict=run_context.strict_data,
    )
    max_length, records, lengths, long, bad = run_context.train.max_length, [], [], [], list(result.bad)
    for record in result.records:
        try:
            length = processor.length(record)
        except DataError as error:
            bad.append(BadRecord(record.where, str(error)))
            if run_context.strict_data:
                raise
            continue
        if length > max_length:
            long.append(f"{record.where or record.id}: {length} tokens")
            if run_context.strict_data:
                raise DataError(
                    f"{record.where or record.id}: the record has {length} tokens, train.max_length is {max_length}"
                )
            if run_context.train.too_long == "skip":
                continue
        records.append(record)
        lengths.append(min(length, max_length))
    if not records:
        raise DataError(
            f"no record is left to train on: {len(result.records)} were read, {len(long)} are longer than "
            f"train.max_length = {max_length} tokens",
            [*long[:3], *(f"{dropped.where}: {dropped.why}" for dropped in bad[:3])],
        )
    groups: dict[str, int] = {}
    for record in records:
        groups[record.group] = groups.get(record.group, 0) + 1
    summary = {
        "records": len(records),
        "bad": [f"{dropped.where}: {dropped.why}" for dropped in bad],
        "too_long": len(long),
        "answers_cut": len(long) if run_context.train.too_long == "cut" else 0,
        "too_long_were": "cut" if run_context.train.too_long == "cut" else "left out",
        "stages": [count._asdict() for count in result.counts],
        "groups": {group: count for group, count in sorted(groups.items()) if group},
    }
    return TrainingData(records, lengths, summary)


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
