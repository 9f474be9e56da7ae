"""The memory of the device that a run takes, and what to raise when it runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from graftwork.errors import GraftworkError

if TYPE_CHECKING:
    import torch


class OutOfMemory(GraftworkError):
    """The device's memory does not hold the run; `early` while nothing is lost by beginning again."""

    def __init__(self, when: str, *, early: bool) -> None:
        super().__init__(
            f"the device's memory ran out {when}; lower train.micro_batch_size or memory.budget, or name strategies in memory"
        )
        self.early = early


def free_memory() -> None:
    """Give back what a run that ended has left on its device."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def out_of_memory_told(when: str, *, early: Callable[[], bool]) -> Iterator[None]:
    """While entered, a device whose memory runs out raises OutOfMemory, which says when."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise OutOfMemory(when, early=early()) from None


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors have taken of a CUDA device so far; 0 on a CPU."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
