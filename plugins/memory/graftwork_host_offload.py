"""The memory strategy `host-offload`: what the backward pass needs waits in the host's memory."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from graftwork import hookimpl, setting
from graftwork.contracts import MemoryStrategy, device_type, in_main_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from graftwork.contracts import Assembly

AT_ONCE = 2
"""How many copies may be under way while the device computes; their sources wait in its memory."""


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
        if device_type(assembly.device) != "cpu":
            # A partial of a bound method is copied with its module; a closure would keep the original's.
            model.forward = partial(forward, model, model.forward, self.settings.least_kib << 10, assembly.device)

    def note(self, assembly: Assembly) -> str:
        on_cpu = device_type(assembly.device) == "cpu"
        return "does nothing, for the model is on the CPU already" if on_cpu else ""


def forward(
    model: nn.Module, inner: Callable[..., Any], min_bytes: int, home: torch.device, *args: Any, **kwargs: Any
) -> Any:
    """The model's own forward, whose saved tensors of at least so many bytes leave the device `home`."""
    import torch

    if not torch.is_grad_enabled():
        return inner(*args, **kwargs)
    weights = chain(model.parameters(), model.buffers())
    copies = CopiesOnStream(home) if home.type == "cuda" else Copies(home)
    away = Away(copies, min_bytes, {weight.untyped_storage()._cdata for weight in weights})
    with torch.autograd.graph.saved_tensors_hooks(away.pack, unpack):
        output = inner(*args, **kwargs)
    copies.settle()
    return output


class Copies:
    """Copies between a device and main memory, in line with the computation; a CPU stands for the device in a rehearsal."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.leaving: deque[tuple[Any, Tensor]] = deque()
        """Copies that may not have ended, each with its source, whose memory nobody may get before."""
        self.ahead: Fetched | None = None

    def away(self, tensor: Tensor) -> Tensor:
        """A copy in main memory, page-locked beside a CUDA device."""
        import torch

        with in_main_memory():
            host = torch.empty_like(tensor, device="cpu", pin_memory=self.device.type == "cuda", requires_grad=False)
            self.leaving.append((self.copy(host, tensor), tensor))
        self.settle(AT_ONCE)
        return host

    def back(self, moved: Moved) -> Tensor:
        """What was moved, on the device; what was moved before it, and so is needed next, is fetched meanwhile."""
        ahead, self.ahead = self.ahead, None
        if ahead:
            self.wait(ahead.done)  # Also where it was not needed: its memory may be given to others from now on.
        fetched = ahead if ahead and ahead.moved() is moved else self.fetch(moved)
        self.wait(fetched.done)
        if moved.before and moved.before.back() is None:
            self.ahead = self.fetch(moved.before)
        return fetched.tensor

    def fetch(self, moved: Moved) -> Fetched:
        """Begin a copy to the device."""
        import torch

        tensor = torch.empty_like(moved.host, device=self.device)
        return Fetched(weakref.ref(moved), tensor, self.copy(tensor, moved.host))

    def __del__(self) -> None:
        if self.ahead:
            self.wait(self.ahead.done)

    def settle(self, at_most: int = 0) -> None:
        """Let the computation wait until `at_most` so many copies have not ended, and let go of the sources of the others."""
        while len(self.leaving) > at_most:
            self.wait(self.leaving.popleft()[0])

    def copy(self, into: Tensor, source: Tensor) -> Any:
        """Begin a copy; returns what to `wait` for."""
        into.copy_(source.detach())

    def wait(self, done: Any) -> None:
        """Let the computation wait for a copy; the host does not wait."""


class CopiesOnStream(Copies):
    """Copies on a stream of their own, while the device computes."""

    def __init__(self, device: torch.device) -> None:
        import torch

        super().__init__(device)
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, into: Tensor, source: Tensor) -> Any:
        import torch

        # After what is queued so far, which may still write the source, or read what was in the memory of the copy before.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            into.copy_(source.detach(), non_blocking=True)
        return self.stream.record_event()

    def wait(self, done: Any) -> None:
        import torch

        torch.cuda.current_stream(self.device).wait_event(done)


@dataclass
class Moved:
    """A copy in main memory of a tensor that was on a device."""

    host: Tensor
    copies: Copies
    before: Moved | None
    """What was moved before it, and is needed after it on the way back."""
    source: Any
    """A weak reference to the storage that it was copied from."""
    back: Callable[[], Tensor | None] = lambda: None
    """A weak reference to the copy on the device, while there is one again."""


@dataclass
class Fetched:
    """A copy on the device that was begun."""

    moved: Callable[[], Moved | None]
    """A weak reference to what it is a copy of."""
    tensor: Tensor
    done: Any
    """What to wait for before it is used, or its memory given to others."""


@dataclass
class Away:
    """What one forward pass has moved."""

    copies: Copies
    min_bytes: int
    weights: set[int]
    """The storages that stay."""
    moved: dict[Any, Moved] = field(default_factory=dict)
    """By what of which storage was copied, and when."""
    latest: Moved | None = None

    def pack(self, tensor: Tensor) -> Tensor | Moved:
        """What autograd keeps instead of a tensor."""
        from torch.multiprocessing.reductions import StorageWeakRef

        storage = tensor.untyped_storage()
        # An expanded tensor is smaller where it is than in a copy.
        if (
            tensor.device.type != self.copies.device.type
            or not self.min_bytes <= tensor.nbytes <= storage.nbytes()
            or storage._cdata in self.weights
        ):
            return tensor
        part = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        known = self.moved.get((storage._cdata, part))
        if known is None or known.source.expired():  # a later storage may have the same address
            source: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            known = Moved(self.copies.away(tensor), self.copies, self.latest, source)
            self.moved[storage._cdata, part] = self.latest = known
        return known


def unpack(kept: Tensor | Moved) -> Tensor:
    """The tensor that autograd wanted to keep."""
    if not isinstance(kept, Moved):
        return kept
    tensor = kept.back()
    if tensor is None:
        tensor = kept.copies.back(kept)
        kept.back = weakref.ref(tensor)
    return tensor


@hookimpl
def memory_strategies() -> list[type[MemoryStrategy[Any]]]:
    """The strategy of this plugin."""
    return [HostOffload]
