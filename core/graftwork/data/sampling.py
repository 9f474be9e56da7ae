"""Which records make up which batch: a pure function of the seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

WINDOW = 32
"""Length grouping sorts within this many batches, which keeps the order random enough to train on."""


def steps_for(records: int, batch_size: int, epochs: float, steps: int | None) -> int:
    """How many optimizer steps a run takes: full batches only, and at least one. No batch is larger than the data."""
    return steps if steps is not None else max(1, math.floor(epochs * records / min(batch_size, records)))


def batches(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int, by_length: bool) -> list[list[int]]:
    """The record indices of every full batch of one epoch, in order; one smaller batch if there are too few records.

    With `by_length` records of similar length (in tokens) share a batch, and so waste little on padding.
    """
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    if by_length:
        window = batch_size * WINDOW
        order = [
            index
            for start in range(0, len(order), window)
            for index in sorted(order[start : start + window], key=lengths.__getitem__)
        ]
    if len(order) < batch_size:
        return [order]
    full = [order[start : start + batch_size] for start in range(0, len(order) - batch_size + 1, batch_size)]
    return [full[index] for index in torch.randperm(len(full), generator=generator).tolist()]


class Sampler:
    """Any batch of a run, without walking through those before it."""

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int, by_length: bool) -> None:
        self._lengths, self._batch_size, self._seed, self._by_length = lengths, batch_size, seed, by_length
        self._epoch = -1
        self._batches: list[list[int]] = []

    def batch(self, number: int) -> list[int]:
        """The record indices of batch `number`, counted from 0: that of a step, and of the batches passed over before it."""
        epoch, place = divmod(number, max(1, len(self._lengths) // self._batch_size))
        if epoch != self._epoch:
            self._epoch = epoch
            self._batches = batches(
                self._lengths, self._batch_size, seed=self._seed, epoch=epoch, by_length=self._by_length
            )
        return self._batches[place]
