"""Packing: several records in one row of a batch, one after another, instead of padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from graftwork.contracts.batch import IGNORED, Batch, Encoded, find_label_positions

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MicroBatch:
    """The records of one forward pass."""

    examples: Sequence[Encoded]
    rows: Sequence[int] = ()
    """How many of the records, in order, share each row; empty where each has its own."""
    batch: Batch | None = None
    """The records collated, where that was done beforehand."""

    def by_row(self) -> list[list[Encoded]]:
        """The records of each row."""
        examples = iter(self.examples)
        return [[*islice(examples, count)] for count in self.rows or [1] * len(self.examples)]

    def cut(self, size: int) -> list[MicroBatch]:
        """The same rows in micro-batches of at most `size`."""
        rows = self.by_row()
        if len(rows) <= size:
            return [self]
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [
            MicroBatch([each for row in part for each in row], [len(row) for row in part] if self.rows else ())
            for part in parts
        ]


def rows_of_step(lengths: Sequence[int], size: int | None, limit: int | None) -> list[list[int]]:
    """Which records of a step share each row, in the order in which rows are cut into micro-batches of `size` rows, or of all without a `size`. With
    a `limit` see `rows_of`; without one each has its own, and those of about one length are together, so that little is padded."""
    if limit:
        return rows_of(lengths, limit)
    places = range(len(lengths))
    return [[n] for n in (sorted(places, key=lambda n: -lengths[n]) if size and size < len(lengths) else places)]


def rows_of(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Which records of these lengths share a row of at most `limit` tokens: few rows, and those about equally long.

    There are as many rows as best-fit decreasing needs, and the records are spread over them, the longest first, where that works.
    """
    rows = _filled(lengths, limit, [], fullest=True)
    spread = _filled(lengths, limit, [[] for _ in rows], fullest=False)
    return spread if len(spread) == len(rows) else rows


def _filled(lengths: Sequence[int], limit: int, rows: list[list[int]], *, fullest: bool) -> list[list[int]]:
    """Put each record, the longest first, into the fullest or emptiest row that has room for it, or else into a new one."""
    room = [limit] * len(rows)
    for record in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fitting = [row for row, left in enumerate(room) if left >= lengths[record]]
        if not fitting:
            rows.append([])
            room.append(limit)
        row = (min if fullest else max)(fitting, key=room.__getitem__, default=len(rows) - 1)
        rows[row].append(record)
        room[row] -= lengths[record]
    return rows


def micro_batches(examples: Sequence[Encoded], size: int | None, limit: int | None) -> list[MicroBatch]:
    """Cut the records of a step into micro-batches of `size` rows, by default one; with a `limit` a row holds as many records as come to
    so many tokens, else one."""
    if not examples:
        return []
    rows = rows_of_step([len(each.input_ids) for each in examples], size, limit)
    counts = [len(row) for row in rows] if limit else ()
    return MicroBatch([examples[n] for row in rows for n in row], counts).cut(size or len(rows))


def packed(batch: Batch, rows: Sequence[int], pad_id: int) -> Batch:
    """The batch with so many of its records, in order, in each row; `Batch.positions` tells them apart. Records are padded on the right."""
    import torch

    lengths, width = batch.attention_mask.sum(1).tolist(), batch.input_ids.shape[1]
    firsts = [sum(rows[:row]) for row in range(len(rows))]
    longest = max(sum(lengths[first : first + count]) for first, count in zip(firsts, rows, strict=True))
    places, positions = (torch.full((len(rows), longest), filler) for filler in (-1, 0))
    for row, (first, count) in enumerate(zip(firsts, rows, strict=True)):
        at = 0
        for record in range(first, first + count):
            own = torch.arange(lengths[record])
            places[row, at : at + len(own)] = record * width + own
            positions[row, at : at + len(own)] = own
            at += len(own)

    def moved(values: torch.Tensor, filler: int | bool) -> torch.Tensor:
        """`[records, …, tokens]` to `[rows, …, tokens]`."""
        flat = values.movedim(-1, 1).flatten(0, 1)[places.clamp(min=0)]
        flat[places < 0] = filler
        return flat.movedim(1, -1)

    labels = moved(batch.labels, IGNORED)
    labels[positions == 0] = IGNORED  # nothing of its own record comes before a first token
    return replace(
        batch,
        input_ids=moved(batch.input_ids, pad_id),
        attention_mask=moved(batch.attention_mask, False),
        image_token_mask=moved(batch.image_token_mask, False),
        labels=labels,
        label_positions=find_label_positions(labels),
        token_fields={name: moved(values, 0) for name, values in batch.token_fields.items()},
        positions=positions,
        padding="right" if bool((places[:, -1] < 0).any()) else "",
    )
