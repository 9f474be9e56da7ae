"""Which records make up which batch: a pure function of the seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from graftwork.contracts.plan import Mix
from graftwork.data.store import Array
from graftwork.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 32
"""Length grouping sorts within this many batches, which keeps the order random enough to train on."""


def steps_for(records: int, batch_size: int, epochs: float, steps: int | None) -> int:
    """How many optimizer steps a run takes, of so many records an epoch: full batches only, and at least one. No batch is
    larger than the data."""
    return steps if steps is not None else max(1, math.floor(epochs * records / min(batch_size, records)))


def draws(sizes: Sequence[int], mix: Sequence[Mix]) -> list[int]:
    """How many records of each source an epoch takes, of sources that have so many and are mixed so.

    The records of an epoch are in all as many as without weights. A source with a weight gives its share of them; the others share
    the rest by their sizes. Where all have weights, these count in proportion to one another.
    """
    plain = [size * each.repeat for size, each in zip(sizes, mix, strict=True)]
    weights = [each.weight if size else 0.0 for size, each in zip(sizes, mix, strict=True)]
    weighted = sum(weight for weight in weights if weight is not None)
    rest = sum(count for count, weight in zip(plain, weights, strict=True) if weight is None)
    share = weighted if not rest else 1.0
    exact = [
        sum(plain) * (count / rest * (1 - weighted) if weight is None else weight / share)
        for count, weight in zip(plain, weights, strict=True)
    ]
    taken = [math.floor(each) for each in exact]
    # The whole is as large as without weights: what is left goes to those that lost most by rounding down.
    by_loss = sorted(range(len(exact)), key=lambda source: taken[source] - exact[source])
    for source in by_loss[: round(sum(exact)) - sum(taken)]:
        taken[source] += 1
    for number, (count, size) in enumerate(zip(taken, sizes, strict=True)):
        if size and not count:
            raise DataError(
                f"data.source.{number}: of an epoch of {sum(plain):,} records its weight leaves it none; make the weight larger, or "
                "leave the source out"
            )
    return taken


def batches(
    lengths: Sequence[int] | Array,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    by_length: bool,
    drawn: Tensor | None = None,
) -> Array:
    """The record indices of every full batch of one epoch, int64 `[batches, batch_size]`; one smaller batch if there are too few
    records.

    `drawn` are the indices that the epoch takes, each once where it is None. With `by_length` records of similar length (in
    tokens) share a batch, and so waste little on padding.
    """
    import numpy
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths) if drawn is None else len(drawn), generator=generator)
    indices = (order if drawn is None else drawn[order]).numpy()
    if by_length:
        lengths, window = numpy.asarray(lengths), batch_size * WINDOW
        for start in range(0, len(indices), window):
            part = indices[start : start + window]
            indices[start : start + window] = part[numpy.argsort(lengths[part], kind="stable")]
    if len(indices) < batch_size:
        return indices[None]
    full = indices[: len(indices) // batch_size * batch_size].reshape(-1, batch_size)
    return full[torch.randperm(len(full), generator=generator).numpy()]


class Sampler:
    """Any batch of a run, without walking through those before it."""

    def __init__(
        self,
        lengths: Sequence[int] | Array,
        batch_size: int,
        *,
        seed: int,
        by_length: bool,
        sources: Array | None = None,
        mix: Sequence[Mix] = (),
    ) -> None:
        """Of records of these lengths in tokens; `sources` are the numbers of their sources, which are mixed as `mix` says."""
        self._lengths, self._seed, self._by_length = lengths, seed, by_length
        self._of_sources = [(sources == number).nonzero()[0] for number in range(len(mix))] if mix else []  # type: ignore[union-attr]
        self._draws = draws([len(each) for each in self._of_sources], mix)
        self.records = sum(self._draws) if mix else len(lengths)
        """How many records an epoch takes."""
        self._batch_size = max(1, min(batch_size, self.records))
        self._epoch = -1
        self._batches: Array = ()

    def batch(self, number: int) -> list[int]:
        """The record indices of batch `number`, counted from 0: that of a step, and of the batches passed over before it."""
        epoch, place = divmod(number, max(1, self.records // self._batch_size))
        if epoch != self._epoch:
            self._epoch = epoch
            self._batches = batches(
                self._lengths,
                self._batch_size,
                seed=self._seed,
                epoch=epoch,
                by_length=self._by_length,
                drawn=self._drawn(epoch) if self._of_sources else None,
            )
        indices: list[int] = self._batches[place].tolist()
        return indices

    def _drawn(self, epoch: int) -> Tensor:
        """The record indices that an epoch takes. Each source's records come in turn, in an order that is drawn anew when all have
        come, so that over the epochs each is taken as often as the others."""
        import torch

        parts = []
        for number, (indices, count) in enumerate(zip(self._of_sources, self._draws, strict=True)):
            rounds = range(epoch * count // max(1, len(indices)), -(-(epoch + 1) * count // max(1, len(indices))))
            orders = []
            for cycle in rounds:
                generator = torch.Generator().manual_seed((self._seed * 1_000_003 + cycle) * 1_009 + number)
                orders.append(torch.randperm(len(indices), generator=generator))
            first = epoch * count - rounds.start * len(indices)
            places = torch.cat(orders)[first : first + count] if orders else torch.zeros(0, dtype=torch.int64)
            parts.append(torch.from_numpy(indices)[places])
        return torch.cat(parts)
