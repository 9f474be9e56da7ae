"""Data-parallel training: every process has the whole model and a share of the records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftwork import NoSettings, hookimpl, processes
from graftwork.contracts import MemoryStrategy, Stepper
from graftwork.processes import sum_over_processes

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts import Assembly, TrainSettings


class Ddp(MemoryStrategy[NoSettings]):
    """Every process trains on a share of the records; gradients are summed over all of them

    Not torch's DistributedDataParallel, which wraps the module: only the few trained parameters have gradients, and they are
    summed once, when a step is complete. Alone, a process takes plain steps.
    """

    name = "ddp"

    def footprint(self, alone: Mapping[str, int], processes: int, assembly: Assembly) -> Mapping[str, int]:
        """What a process alone keeps: the gradients are summed where they are."""
        return alone

    def stepper(self, assembly: Assembly, settings: TrainSettings) -> Stepper | None:
        return SummedGradients(assembly, settings) if processes.count() > 1 else None


class SummedGradients(Stepper):
    """Plain steps on the sum of all processes' gradients."""

    reduces_gradients = True

    def gradient_norm(self) -> Tensor:
        sum_over_processes(self.gradients())
        return super().gradient_norm()


@hookimpl
def memory_strategies() -> list[type[MemoryStrategy[Any]]]:
    """The strategy of this plugin."""
    return [Ddp]
