"""A process's share of an optimizer step or of questions, and what keeps the processes in sync."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from graftwork import processes
from graftwork.contracts.batch import IGNORED, Encoded
from graftwork.contracts.packing import MicroBatch

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """What one process has of a step."""

    micro_batches: Sequence[MicroBatch]
    images: int
    """Of its records; a model may look at each in several views or tiles."""
    unusable: Mapping[int, str] = field(default_factory=dict)
    """A line for each of its records that could not be encoded, by its place in the data."""


@dataclass(frozen=True)
class Tally:
    """What all processes have in a step, in total."""

    records: int
    loss_weight: float
    """How many labels they have, each counted by its record's weight."""
    images: int
    tokens: int
    micro_batches: int
    """Of the process that has the most."""
    unusable: Mapping[int, str] = field(default_factory=dict)
    signal: int = 0
    """The signal that a process got, which ends the run before the step; 0 where none did."""


def strided_slice(indices: Sequence[int]) -> list[int]:
    """This process's records of a step: every n-th, so that records sorted by length are shared evenly."""
    return list(indices[processes.rank() :: processes.count()])


def tally(share: Share, signal: int = 0) -> Tally:
    """Count what all processes have in a step, from what this one has and the signal that it got. Collective."""
    examples = [example for micro_batch in share.micro_batches for example in micro_batch.examples]
    mine = Tally(
        records=len(examples),
        loss_weight=sum(example.loss_weight for example in examples),
        images=share.images,
        tokens=sum(len(e.input_ids) for e in examples),
        micro_batches=len(share.micro_batches),
        unusable=share.unusable,
        signal=signal,
    )
    found = processes.all_gather_object(mine)
    return Tally(
        records=sum(each.records for each in found),
        loss_weight=sum(each.loss_weight for each in found),
        images=sum(each.images for each in found),
        tokens=sum(each.tokens for each in found),
        micro_batches=max(each.micro_batches for each in found),
        unusable={index: line for each in found for index, line in each.unusable.items()},
        signal=max(each.signal for each in found),
    )


def pad_micro_batches(micro_batches: Sequence[MicroBatch], totals: Tally, filler: Encoded) -> list[MicroBatch]:
    """The micro-batches, padded to as many as any process has, so that each runs the whole model with its vision towers.

    Engines that fetch weights from the other processes when a module runs would otherwise wait for ever, and some reuse the
    last step's gradient for a parameter that none of this step's records reaches. A filler has no labels, so it changes no
    gradient. `filler` is a record with images, if there is any.
    """
    unlabelled = replace(filler, labels=[IGNORED] * len(filler.input_ids))

    def filled(micro_batch: MicroBatch) -> MicroBatch:
        if micro_batch.examples and (not filler.pixels or any(example.pixels for example in micro_batch.examples)):
            return micro_batch
        rows = (*micro_batch.rows, 1) if micro_batch.rows else ()
        return MicroBatch([*micro_batch.examples, unlabelled], rows)

    lacking = totals.micro_batches - len(micro_batches)
    return [filled(each) for each in (*micro_batches, *[MicroBatch(())] * lacking)]
