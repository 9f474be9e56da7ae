"""The memory strategy `host-offload`: what the backward pass needs waits in the host's memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from graftwork import hookimpl, setting
from graftwork.contracts import MemoryStrategy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graftwork.contracts import Assembly


@dataclass(frozen=True)
class HostOffloadSettings:
    """What is worth a copy."""

    least_kib: int = setting(1024, "Tensors of fewer KiB stay on the device", minimum=0)


class HostOffload(MemoryStrategy[HostOffloadSettings]):
    """Keeps in page-locked host memory what the backward pass needs, and fetches it back in time

    A tensor that several operations need is copied once. Weights stay where they are, and the loss is not covered:
    chunked-loss keeps nothing that large. With checkpointing the inputs of the blocks are all that is left to move.
    """

    name = "host-offload"
    Settings = HostOffloadSettings

    def prepare(self, assembly: Assembly) -> None:
        model: Any = assembly.structure.model
        if assembly.device.type != "cpu":
            # A partial of a bound method is copied with its module; a closure would keep the original's.
            model.forward = partial(forward, model, model.forward, self.settings.least_kib << 10, assembly.device.type)

    def note(self, assembly: Assembly) -> str:
        return "does nothing, for the model is on the CPU already" if assembly.device.type == "cpu" else ""


def forward(model: nn.Module, inner: Callable[..., Any], min_bytes: int, home: str, *args: Any, **kwargs: Any) -> Any:
    """The model's own forward, whose saved tensors of at least so many bytes leave the kind of device `home`."""
    import torch

    if not torch.is_grad_enabled():
        return inner(*args, **kwargs)
    weights = chain(model.parameters(), model.buffers())
    away = Away(home, min_bytes, {weight.untyped_storage()._cdata for weight in weights})
    with torch.autograd.graph.saved_tensors_hooks(away.pack, unpack):
        return inner(*args, **kwargs)


@dataclass
class Moved:
    """A copy in the host's memory of a tensor that was on a device."""

    host: Tensor
    device: Any
    source: Any
    """A weak reference to the storage that it was copied from."""
    back: Callable[[], Tensor | None] = lambda: None
    """A weak reference to the copy on the device, while there is one again."""


@dataclass
class Away:
    """What one forward pass has moved."""

    home: str
    min_bytes: int
    weights: set[int]
    """The storages that stay."""
    moved: dict[Any, Moved] = field(default_factory=dict)
    """By what of which storage was copied, and when."""

    def pack(self, tensor: Tensor) -> Tensor | Moved:
        """What autograd keeps instead of a tensor."""
        import torch
        from torch.multiprocessing.reductions import StorageWeakRef

        storage = tensor.untyped_storage()
        # An expanded tensor is smaller where it is than in a copy.
        if (
            tensor.device.type != self.home
            or not self.min_bytes <= tensor.nbytes <= storage.nbytes()
            or storage._cdata in self.weights
        ):
            return tensor
        part = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        known = self.moved.get((storage._cdata, part))
        if known is None or known.source.expired():  # a later storage may have the same address
            pinned = tensor.device.type == "cuda" and torch.cuda.is_available()
            host = torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)
            # In the order of the device's stream: the source is not overwritten before it is copied, nor the copy read.
            host.copy_(tensor.detach(), non_blocking=True)
            source: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            known = self.moved[storage._cdata, part] = Moved(host, tensor.device, source)
        return known


def unpack(kept: Tensor | Moved) -> Tensor:
    """The tensor that autograd wanted to keep."""
    if not isinstance(kept, Moved):
        return kept
    tensor = kept.back()
    if tensor is None:
        tensor = kept.host.to(kept.device, non_blocking=True, copy=True)
        kept.back = weakref.ref(tensor)
    return tensor


@hookimpl
def memory_strategies() -> list[type[MemoryStrategy[Any]]]:
    """The strategy of this plugin."""
    return [HostOffload]
