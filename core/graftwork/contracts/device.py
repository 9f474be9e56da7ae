"""Which kind of device tensors are on, also in a rehearsal, where those of a CPU stand for another's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_STANDS_FOR: ContextVar[str] = ContextVar("stands_for", default="")
_MAIN_MEMORY: ContextVar[bool] = ContextVar("main_memory", default=False)


def device_type(device: torch.device) -> str:
    """`cpu` or `cuda`: a device's type, or that of the device which the CPU stands for in a rehearsal. What decides by it is rehearsed as
    it will run."""
    import torch

    # A rehearsal compiles nothing, and a compiler cannot follow a context variable.
    return device.type if torch.compiler.is_compiling() else _STANDS_FOR.get() or device.type


@contextmanager
def standing_for(device: str) -> Iterator[None]:
    """While entered, `device_type` is `device`."""
    token = _STANDS_FOR.set(device)
    try:
        yield
    finally:
        _STANDS_FOR.reset(token)


@contextmanager
def in_main_memory() -> Iterator[None]:
    """Entered around what makes tensors in main memory beside a device: a rehearsal does not count them as the device's."""
    token = _MAIN_MEMORY.set(True)
    try:
        yield
    finally:
        _MAIN_MEMORY.reset(token)


def is_main_memory() -> bool:
    """Whether `in_main_memory` is entered."""
    return _MAIN_MEMORY.get()
