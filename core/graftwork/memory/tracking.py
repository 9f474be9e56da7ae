"""Follows every storage of a step, on real tensors and on fake ones, into a memory timeline."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from graftwork.contracts.device import is_main_memory
from graftwork.memory.timeline import (
    BACKWARD,
    BUILD,
    FORWARD,
    FROZEN,
    GRADIENTS,
    OPTIMIZER,
    PREPARATION,
    TRAINED,
    UPDATE,
    Allocation,
    MemoryTimeline,
    OpEvent,
)

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts.assembly import Assembly
    from graftwork.contracts.stepper import Stepper

MODULE = "graftwork_module"
"""The key under which a node of the autograd graph remembers the module that made it."""


class Tracker:
    """Keeps a timeline of every storage that an operation of PyTorch makes while `following` is entered.

    It records what operators return, but neither what a kernel allocates internally while it runs, nor what a library
    keeps permanently (the workspaces of cuBLAS, the CUDA context).
    """

    def __init__(self) -> None:
        self.timeline = MemoryTimeline()
        self.phase = BUILD
        self.flops = 0
        """Floating-point operations of matrix products and convolutions so far."""
        self._alive: dict[int, tuple[weakref.ref[Any], int, Allocation]] = {}
        """By storage: a reference to it, its size, and what it counts as."""
        self._names: dict[int, str] = {}
        self._within: list[str] = []
        self._pass_index, self._forwards = 0, True
        self._paused = False

    @contextmanager
    def following(self, answer: Callable[[str], float] | None = None) -> Iterator[None]:
        """While entered, everything is followed. `answer` gives, for a phase, the number that code reads out of a tensor
        that has none; it raises where there is no good answer."""
        from torch.nn.modules import module

        mode = _mode(self, answer)
        with ExitStack() as stack:
            for handle in (
                module.register_module_forward_pre_hook(self._enter),
                module.register_module_forward_hook(self._leave, always_call=True),
            ):
                stack.callback(handle.remove)
            stack.enter_context(mode)
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While entered, nothing is followed."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    # Recording ----------------------------------------------------------------------------------------------------------

    def record_operation(self, operation: str, made: object) -> None:
        """An operation ran and returned what it `made`."""
        import torch

        if self._paused:
            return
        backward = torch._C._current_graph_task_id() != -1
        # While gradients are computed, a module's call, or a graph that is built, can only be a recomputation.
        forwards = self.phase == FORWARD and (not backward or bool(self._within) or torch.is_grad_enabled())
        if forwards != self._forwards:
            self._forwards, self._pass_index = forwards, self._pass_index + 1
        node: Any = torch._C._current_autograd_node() if backward else None
        path = self._within[-1] if self._within else str(node.metadata.get(MODULE, "")) if node is not None else ""
        phase = BACKWARD if backward and self.phase == FORWARD else self.phase
        self.timeline.op_events.append(OpEvent(phase, path, operation, self._pass_index, forwards))
        for tensor in tensors_in(made):
            self.record(tensor, path, phase)

    def record(self, tensor: Tensor, path: str, phase: str) -> Allocation | None:
        """The allocation of a tensor's storage; a new one if it is not known yet."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse tensors, and wrappers without a storage of their own
            return None
        key, size = storage._cdata, storage.nbytes()
        known = self._alive.get(key)
        if known and known[1] == size:
            return known[2]
        if known:  # it was resized
            self._died(key, known[0])
        dtype = str(tensor.dtype).removeprefix("torch.")
        allocation = Allocation(
            0 if is_main_memory() else size,
            max(self.timeline.now, 0),
            phase,
            self._pass_index,
            path,
            tuple(tensor.shape),
            dtype,
        )
        self.timeline.allocations.append(allocation)
        self._alive[key] = (weakref.ref(storage, partial(self._died, key)), size, allocation)
        return allocation

    def _died(self, key: int, reference: weakref.ref[Any]) -> None:
        known = self._alive.get(key)
        if known and known[0] is reference:
            del self._alive[key]
            known[2].freed_at, known[2].last_pass = self.timeline.now + 1, self._pass_index

    # Naming ---------------------------------------------------------------------------------------------------------------

    def name_weights(self, assembly: Assembly) -> None:
        """Learn the names of modules and weights, once the model is built; from now on gradients are known too."""
        self._names = {id(module): name for name, module in assembly.model.named_modules()}
        for value in assembly.adaptation.base_copy.values():
            if allocation := self.record(value, "", BUILD):
                allocation.size = 0  # it is in main memory, whatever the device
        for name, tensor in (*assembly.model.named_parameters(), *assembly.model.named_buffers()):
            if allocation := self.record(tensor, name, BUILD):
                allocation.category, allocation.path = (TRAINED if tensor.requires_grad else FROZEN), name
                allocation.shape = tuple(tensor.shape)
        for name, parameter in assembly.trained().items():
            hook: Any = parameter.register_post_accumulate_grad_hook
            hook(partial(self.name_gradient, name))

    def name_gradient(self, name: str, parameter: Tensor) -> None:
        """Learn which tensor is a parameter's gradient."""
        if parameter.grad is not None and (allocation := self.record(parameter.grad, name, BACKWARD)):
            allocation.category, allocation.path = GRADIENTS, name

    def name_optimizer_state(self, stepper: Stepper) -> None:
        """What an update allocated and kept is the optimizer's state; its names are those of `optimizer.state`, if any."""
        for _, _, allocation in self._alive.values():
            if allocation.phase in (PREPARATION, UPDATE) and not allocation.category:
                allocation.category = OPTIMIZER
        for name, parameter in stepper.parameters.items():
            for key, value in stepper.optimizer.state.get(parameter, {}).items():
                if hasattr(value, "untyped_storage") and (found := self.record(value, "", UPDATE)):
                    found.category, found.path = OPTIMIZER, f"{name}.{key}"

    # Modules --------------------------------------------------------------------------------------------------------------

    def _enter(self, module: Any, inputs: Any) -> None:
        self._tag(inputs)
        self._within.append(self._names.get(id(module), type(module).__name__))

    def _leave(self, module: Any, inputs: Any, output: Any) -> None:
        self._tag(output)
        self._within.pop()

    def _tag(self, value: object) -> None:
        """Write the module that is being computed into the nodes of the graph that are not tagged yet."""
        nodes: list[Any] = [tensor.grad_fn for tensor in tensors_in(value) if tensor.grad_fn is not None]
        path = self._within[-1] if self._within else ""
        while nodes:
            node = nodes.pop()
            if MODULE not in node.metadata:
                node.metadata[MODULE] = path
                nodes += [parent for parent, _ in node.next_functions if parent is not None]


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in a value, at any depth of its lists, tables and plain objects."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


MAKERS = re.compile(r"arange|zeros|ones|full|scalar_tensor|eye|linspace")
"""The operators that make a tensor of numbers alone."""


def has_no_numbers(tensor: Any) -> bool:
    """Whether a tensor is fake and keeps no numbers beside it."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) and tensor.constant is None


def made_of_nothing(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Among fake tensors, a tensor of whole numbers that an operator makes without any other, with its numbers: code may decide by
    positions, sizes and masks that no weight enters. None for all else."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    if not MAKERS.fullmatch(func.overloadpacket.__name__) or any(True for _ in tensors_in([list(args), dict(kwargs)])):
        return None
    if (dtype := kwargs.get("dtype")) is not None and (dtype.is_floating_point or dtype.is_complex):
        return None
    with unset_fake_temporarily():
        made = func(*args, **kwargs)
    if made.is_floating_point() or made.is_complex() or made.device.type != "cpu":
        return None
    return torch.ops.aten.lift_fresh(made)  # type: ignore[no-any-return]


def _mode(tracker: Tracker, answer: Callable[[str], float] | None) -> Any:
    """The mode in which PyTorch reports every operator to the tracker."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    number, device = torch.ops.aten._local_scalar_dense.default, torch.ops.prim.device.default

    class Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # nothing is compiled here, and to see to that for each operator takes time

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is device:  # of a fake tensor, and so often that the way through all modes would take half the time
                return args[0].fake_device
            with torch._C.DisableTorchFunction():  # modes of functions have seen what this operator comes from
                return self.followed(func, args, kwargs or {})

        def followed(self, func: Any, args: Any, kwargs: Any) -> Any:
            if func is number and answer is not None and has_no_numbers(args[0]):
                return type_of(args[0].dtype)(answer(tracker.phase))
            made = made_of_nothing(func, args, kwargs) if answer is not None else None
            if made is None:
                made = func(*args, **kwargs)
            if count := flop_registry.get(func.overloadpacket):
                tracker.flops += count(*args, **kwargs, out_val=made)
            tracker.record_operation(func.overloadpacket.__name__, made)
            return made

    def type_of(dtype: torch.dtype) -> type:
        return float if dtype.is_floating_point else bool if dtype == torch.bool else int

    return Following()  # type: ignore[no-untyped-call]
