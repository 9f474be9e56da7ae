"""A process's share of an optimizer step, and what keeps it in step with the other processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graftwork import processes
from graftwork.batch import IGNORED, Encoded


@dataclass(frozen=True)
class Tally:
    """What all processes together have in a step."""

    records: int
    labelled: int
    images: int
    tokens: int
    parts: tuple[frozenset[str], ...]
    """For each micro-batch, the parts of the model that see pictures on any process; as many as any process has."""


def own(indices: Sequence[int]) -> list[int]:
    """This process's records of a step: every n-th, so that records sorted by length are shared evenly."""
    return list(indices[processes.rank() :: processes.count()])


def tally(micro_batches: Sequence[Sequence[Encoded]]) -> Tally:
    """Count what all processes have in a step, from what this one has. Collective."""
    examples = [example for micro_batch in micro_batches for example in micro_batch]
    mine = Tally(
        records=len(examples),
        labelled=sum(example.labelled for example in examples),
        images=sum(len(pixels) for e in examples for pixels in list(e.pixels.values())[:1]),
        tokens=sum(len(e.input_ids) for e in examples),
        parts=tuple(frozenset(part for e in micro_batch for part in e.pixels) for micro_batch in micro_batches),
    )
    found = processes.gather(mine)
    most = max(len(one.parts) for one in found)
    return Tally(
        records=sum(one.records for one in found),
        labelled=sum(one.labelled for one in found),
        images=sum(one.images for one in found),
        tokens=sum(one.tokens for one in found),
        parts=tuple(frozenset().union(*(one.parts[n] for one in found if n < len(one.parts))) for n in range(most)),
    )


def in_step(micro_batches: Sequence[Sequence[Encoded]], whole: Tally, filler: Encoded) -> list[list[Encoded]]:
    """The micro-batches with unlabelled fillers, so that all processes run the same parts of the model equally often.

    Engines that fetch a module's weights from the other processes when it runs wait for ever otherwise. A filler has no
    loss, so it changes no gradient. `filler` is a record with pictures, if there is any.
    """
    unlabelled = replace(filler, labels=[IGNORED] * len(filler.input_ids))
    filled = []
    for number, parts in enumerate(whole.parts):
        micro_batch = list(micro_batches[number]) if number < len(micro_batches) else []
        if not parts <= {part for example in micro_batch for part in example.pixels}:
            micro_batch.append(unlabelled)
        elif not micro_batch:
            micro_batch.append(without_pictures(unlabelled))
        filled.append(micro_batch)
    return filled


def without_pictures(example: Encoded) -> Encoded:
    """A record of the same text alone."""
    kept = [index for index, is_picture in enumerate(example.picture_positions) if not is_picture]
    return Encoded(
        input_ids=[example.input_ids[index] for index in kept],
        picture_positions=[False] * len(kept),
        labels=[example.labels[index] for index in kept],
        pixels={},
    )
