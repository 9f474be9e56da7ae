"""Giving the tensors of a built model values: one by one, in place, wherever they are tied."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from graftwork.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn


def put(tensor: Tensor, value: Tensor) -> None:
    """Give a parameter or buffer a value of its shape. It stays the same object, so everything that is tied to it follows."""
    import torch

    if not tensor.is_meta:
        tensor.data = value
        return
    if isinstance(tensor, torch.nn.Parameter):
        value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
    _swap(tensor, value)


def _swap(tensor: Tensor, other: Tensor) -> None:
    import torch

    swap_tensors: Any = torch.utils.swap_tensors
    swap_tensors(tensor, other)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While entered, a parameter that becomes part of a module loses its values; buffers, which are computed, keep theirs.

    Unlike with accelerate's `init_empty_weights`, what is tied stays so.
    """
    import torch

    module: Any = torch.nn.Module
    register = module.register_parameter

    def register_on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None and not parameter.is_meta:
            value = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            _swap(parameter, value)

    module.register_parameter = register_on_meta
    try:
        yield
    finally:
        module.register_parameter = register


@contextmanager
def hollow(model: nn.Module, dtype: Any) -> Iterator[list[Any]]:
    """While entered, parameters on `meta` are on the CPU, where they take no memory and hold NaN; yields them.

    So what is put beside them gets its place, its `dtype` and its own initial values, as beside real ones.
    """
    import torch

    waiting = []
    for parameter in model.parameters():
        if parameter.is_meta:
            kind = dtype if parameter.is_floating_point() else parameter.dtype
            nothing = torch.full((), torch.nan if kind.is_floating_point else 0, dtype=kind).expand(parameter.shape)
            other = torch.nn.Parameter(nothing, requires_grad=parameter.requires_grad)
            _swap(parameter, other)
            waiting.append((parameter, other))
    try:
        yield waiting
    finally:
        for parameter, other in waiting:
            other.requires_grad_(parameter.requires_grad)
            _swap(parameter, other)


def initialise(model: nn.Module, later: Container[str] = ()) -> None:
    """Give the tensors that are on `meta`, but those that get values `later`, the ones that their modules start with.

    They are set by their module's `reset_parameters`, else by the `_init_weights` of the transformers model around it, else
    by those of the modules further out. All other tensors stay as they are. WeightsError for a tensor that none of them sets.
    """
    import torch

    # What is tied counts under its first name alone.
    everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    waiting = {id(tensor) for name, tensor in everything.items() if tensor.is_meta and name not in later}
    for path, module in model.named_modules():
        own = (*module.named_parameters(path, recurse=False), *module.named_buffers(path, recurse=False))
        new = {name: tensor for name, tensor in own if id(tensor) in waiting and tensor.is_meta}
        for tensor in new.values():
            if tensor.is_floating_point():
                put(tensor, torch.full_like(tensor, torch.nan, device="cpu"))
        for around, setting in _initialisers(model, path) if new else ():
            with torch.no_grad(), _others_aside(around, new):
                setting()
            if not _unset(new):
                break
        for name in _unset(new):
            raise WeightsError(
                f"the weights lack '{name}', and nothing sets what it starts with: neither a 'reset_parameters' nor the "
                f"'_init_weights' of a transformers model; give '{type(module).__name__}' a reset_parameters that does, or name "
                "weights that hold it"
            )


def _unset(new: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in new.items() if tensor.is_meta or tensor.isnan().any()]


def _initialisers(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, Callable[[], Any]]]:
    """What sets the initial values of the module of that name, with the module that it may change: the nearest first."""
    parts = path.split(".") if path else []
    around: list[Any] = [model.get_submodule(".".join(parts[:length])) for length in range(len(parts), -1, -1)]
    for position, module in enumerate(around):
        for name in ("reset_parameters", "_reset_parameters"):  # the second is that of PyTorch's own attention
            if hasattr(module, name):
                yield module, getattr(module, name)
        from transformers import PreTrainedModel

        for outer in around[position:]:
            if isinstance(outer, PreTrainedModel):
                yield module, partial(outer._init_weights, module)
                break


@contextmanager
def _others_aside(module: nn.Module, new: Mapping[str, Tensor]) -> Iterator[None]:
    """While entered, every tensor in a module that is not `new` has a stand-in, which may be changed."""
    import torch

    wanted, kept = {id(tensor) for tensor in new.values()}, []
    for each in module.modules():
        tables: tuple[Any, ...] = (each._parameters, each._buffers)
        for table in tables:
            for key, tensor in table.items():
                if tensor is not None and id(tensor) not in wanted:
                    kept.append((table, key, tensor))
                    # What lies further in may be a whole model, and values of it are not asked for.
                    cheap = each is not module and table is each._parameters
                    value = torch.empty_like(tensor, device="meta") if cheap else tensor.detach().clone()
                    if isinstance(tensor, torch.nn.Parameter):
                        value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
                    table[key] = value
    try:
        yield
    finally:
        for table, key, tensor in kept:
            table[key] = tensor
