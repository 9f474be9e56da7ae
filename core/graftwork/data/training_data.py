"""The records of a run, measured in tokens: what fits its context, and what became of the rest."""

from __future__ import annotations

from collections.abc import Iterable
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

RECORDED = 100
"""How many bad records a checkpoint names, so that its manifest stays small."""


@dataclass(frozen=True)
class TrainingData:
    """The records of a run that fit its context, and what became of the others."""

    records: list[Record]
    lengths: list[int]
    summary: dict[str, Any]

    def leave_out(self, bad: Iterable[str]) -> None:
        """Count records that turned out to be unusable, each once."""
        known = self.summary["bad"]
        known += [line for line in bad if line not in known]

    def recorded(self) -> dict[str, Any]:
        """The summary for a checkpoint: of what is bad the number, and only the first."""
        bad = self.summary["bad"]
        return {**self.summary, "bad": bad[:RECORDED], "bad_in_all": len(bad)}


def load_training_data(plan: Plan, lookup: Lookup, processor: Processor) -> TrainingData:
    """Read the records of a plan and measure them in tokens; what is too long is cut or left out, and counted."""
    run_context = plan.run_context
    gathered = pipeline.read_records(
        [restore_component(choice, lookup) for choice in run_context.sources],  # type: ignore[misc]
        [restore_component(choice, lookup) for choice in run_context.operators],  # type: ignore[misc]
        seed=run_context.seed,
        strict=run_context.strict_data,
    )
    limit, records, lengths, long, bad = run_context.train.max_length, [], [], [], list(gathered.bad)
    for record in gathered.records:
        try:
            length = processor.length(record)
        except DataError as error:
            bad.append(BadRecord(record.where, str(error)))
            if run_context.strict_data:
                raise
            continue
        if length > limit:
            long.append(f"{record.where or record.id}: {length} tokens")
            if run_context.strict_data:
                raise DataError(
                    f"{record.where or record.id}: the record has {length} tokens, train.max_length is {limit}"
                )
            if run_context.train.too_long == "skip":
                continue
        records.append(record)
        lengths.append(min(length, limit))
    if not records:
        raise DataError(
            f"no record is left to train on: {len(gathered.records)} were read, {len(long)} are longer than "
            f"train.max_length = {limit} tokens",
            [*long[:3], *(f"{one.where}: {one.why}" for one in bad[:3])],
        )
    groups: dict[str, int] = {}
    for record in records:
        groups[record.group] = groups.get(record.group, 0) + 1
    summary = {
        "records": len(records),
        "bad": [f"{one.where}: {one.why}" for one in bad],
        "too_long": len(long),
        "too_long_were": "cut" if run_context.train.too_long == "cut" else "left out",
        "stages": [count._asdict() for count in gathered.counts],
        "groups": {group: count for group, count in sorted(groups.items()) if group},
    }
    return TrainingData(records, lengths, summary)


def cut(example: Encoded, longest: int) -> Encoded:
    """The first `longest` tokens of a record; DataError when no label, or not the whole image, is among them."""
    if len(example.input_ids) <= longest:
        return example
    if any(example.image_token_mask[longest:]) or all(label == IGNORED for label in example.labels[:longest]):
        raise DataError(f"nothing to learn is left of a record of {len(example.input_ids)} tokens cut to {longest}")
    return replace(
        example,
        input_ids=example.input_ids[:longest],
        image_token_mask=example.image_token_mask[:longest],
        labels=example.labels[:longest],
    )
