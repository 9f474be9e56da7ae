"""The gradients of a step, micro-batch by micro-batch, in smaller ones where the device's memory does not hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from graftwork.contracts.device import device_type
from graftwork.contracts.model import batch_of
from graftwork.contracts.packing import MicroBatch
from graftwork.contracts.stepper import Stepper
from graftwork.train.out_of_memory import free_memory

if TYPE_CHECKING:
    from torch import Tensor


class Accumulator:
    """Feeds a stepper the micro-batches of a step."""

    def __init__(self, stepper: Stepper, fatal: Callable[[], bool], smaller: Callable[[int], None]) -> None:
        """Where memory runs out, `smaller` is told the new size, unless that is `fatal`."""
        self.stepper, self.assembly, self.fatal, self.smaller = stepper, stepper.assembly, fatal, smaller
        self.size = stepper.settings.micro_batch_size or stepper.settings.batch_size
        """How many rows a micro-batch has at most."""
        self.reduced = False

    def __call__(self, micro_batches: Sequence[MicroBatch], loss_weight: float) -> list[Tensor]:
        """Accumulate the gradients of a step; each micro-batch's share of its loss, on the device.

        Where memory runs out the step begins again in smaller micro-batches. Processes that have to go on in step cannot do so, and raise
        torch.OutOfMemoryError.
        """
        import torch

        while True:
            # Only then: what several processes are given has one row more where it is filled up, and stays as it is.
            cut = [part for each in micro_batches for part in each.cut(self.size)] if self.reduced else micro_batches
            try:
                return [self._accumulate(each, loss_weight, last=each is cut[-1]) for each in cut]
            except torch.OutOfMemoryError:
                rows = max(len(each.by_row()) for each in cut)
                if rows == 1 or self.stepper.reduces_gradients or self.fatal():
                    raise
            # Outside of `except`, as the error holds all that the pass had made.
            self.size, self.reduced = (rows + 1) // 2, True
            self.stepper.optimizer.zero_grad(set_to_none=True)
            free_memory()
            self.smaller(self.size)

    def _accumulate(self, each: MicroBatch, loss_weight: float, *, last: bool) -> Tensor:
        batch = each.batch or batch_of(self.assembly.processor, each.examples, rows=each.rows)
        return self.stepper.accumulate(batch.to(self.assembly.device), loss_weight, last=last)

    def try_largest(self, largest: Callable[[int], MicroBatch]) -> None:
        """On a CUDA device, compute the gradients of the `largest` micro-batch of so many rows twice, beside everything that a step has in
        memory, and forget them: what does not hold the largest step fails before much is lost. Several processes try nothing."""
        import torch

        if device_type(self.assembly.device) != "cuda" or self.stepper.reduces_gradients:
            return
        micro_batch, device = largest(self.size), self.assembly.device
        with torch.random.fork_rng(
            devices=[device] * (device.type == "cuda")
        ):  # dropout goes on as if nothing had been
            for _ in range(2):
                self._accumulate(micro_batch, 1.0, last=False)
        self.stepper.optimizer.zero_grad(set_to_none=True)
