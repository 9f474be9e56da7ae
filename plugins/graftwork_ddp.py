"""Data-parallel training: every process has the whole model and a share of the records."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from graftwork import NoSettings, hookimpl, processes
from graftwork.kinds import MemoryStrategy
from graftwork.stepping import Stepper

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graftwork.compose import Assembly
    from graftwork.plan import TrainSettings


class Ddp(MemoryStrategy[NoSettings]):
    """Every process trains on a share of the records; gradients are summed over all of them

    Not torch's DistributedDataParallel, which wraps the module: only the few trained parameters have gradients, and they are
    summed once, when a step is complete. Alone, a process takes plain steps.
    """

    name = "ddp"

    def stepper(self, assembly: Assembly, settings: TrainSettings) -> Stepper | None:
        return SummedGradients(assembly, settings) if processes.count() > 1 else None


class SummedGradients(Stepper):
    """Plain steps on the sum of all processes' gradients."""

    together = True

    def gradient_norm(self) -> Tensor:
        sum_gradients(self.parameters.values())
        return super().gradient_norm()


def sum_gradients(parameters: Collection[nn.Parameter]) -> None:
    """Put in place of each gradient its sum over all processes; what has none on any of them stays without."""
    import torch
    from torch import distributed

    device = next(iter(parameters)).device
    present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8, device=device)
    distributed.all_reduce(present, op=distributed.ReduceOp.MAX)
    pending = []
    for parameter, is_present in zip(parameters, present.tolist(), strict=True):
        if is_present:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            pending.append(distributed.all_reduce(parameter.grad, async_op=True))
    for work in pending:
        work.wait()


@hookimpl
def memory_strategies() -> list[type[MemoryStrategy[Any]]]:
    """The strategy of this plugin."""
    return [Ddp]
