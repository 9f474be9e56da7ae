"""A CUDA device where there is none: what its operators take and keep, where that differs from a CPU's.

A build of PyTorch without CUDA cannot compute gradients on fake CUDA tensors, so CUDA is rehearsed on fake CPU tensors.
Where the two differ in memory, the operators are replaced here, after PyTorch's documentation and sources (version 2.13):
the operators that autocast runs in fp32, dropout's mask, and attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts.assembly import Assembly
    from graftwork.contracts.stepper import Stepper

BLOCK_BYTES = 512
"""PyTorch's CUDA allocator rounds sizes up to multiples of this many bytes."""
IN_FP32 = (
    "layer_norm",
    "group_norm",
    "softmax",
    "log_softmax",
    "cross_entropy",
    "nll_loss",
    "norm",
    "pow",
    "rsqrt",
    "exp",
)
"""Those of the operators that autocast computes in fp32 on CUDA (and not all on a CPU) that models use on large tensors."""


@contextmanager
def stand_in() -> Iterator[None]:
    """While entered, fake CPU tensors take the memory that CUDA tensors would."""
    import torch

    engine: Any = torch.autograd
    mode, run_backward = _mode(), engine._engine_run_backward

    def run(*args: Any, **kwargs: Any) -> Any:
        # `backward` has left all modes, but what is recomputed on the way back runs on the device as well.
        with mode:
            return run_backward(*args, **kwargs)

    engine._engine_run_backward = run
    try:
        with mode:
            yield
    finally:
        engine._engine_run_backward = run_backward


def _mode() -> Any:
    """The mode of PyTorch that replaces operators."""
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    places = (torch, functional, torch.Tensor)
    widened = {getattr(place, name) for name in IN_FP32 for place in places if hasattr(place, name)}

    class CudaMode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is functional.scaled_dot_product_attention:
                return attention(*args, **kwargs)
            if func is functional.dropout and 0 < (p := kwargs.get("p", args[1] if len(args) > 1 else 0.5)) < 1:
                training = kwargs.get("training", args[2] if len(args) > 2 else True)
                return torch.native_dropout(args[0], p, training)[0]
            if func in widened and torch.is_autocast_enabled("cpu"):
                args = [widen(value) for value in args]
                kwargs = {key: widen(value) for key, value in kwargs.items()}
            return func(*args, **kwargs)

    def widen(value: Any) -> Any:
        narrow = isinstance(value, torch.Tensor) and value.is_floating_point() and value.element_size() < 4
        return value.float() if narrow else value

    return CudaMode()


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *others: Any, **options: Any) -> Tensor:
    """What a fused kernel leaves in memory: its output, and the logarithm of every query's sum of exponentials in fp32.

    Going back it makes the gradients, the fp32 sums for those of the queries, and a product for every query.
    """
    import torch

    if torch.is_autocast_enabled("cpu"):
        q, k, v = (each.to(torch.get_autocast_dtype("cpu")) for each in (q, k, v))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)
    fused: Tensor = _fused().apply(q, k, v, attn_mask)
    return fused


@cache
def _fused() -> Any:
    import torch

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            output = q.new_empty(*q.shape[:-1], v.shape[-1])
            sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
            ctx.save_for_backward(q, k, v, output, sums, mask)
            return output

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            q, k, v, _, sums, _ = ctx.saved_tensors
            products, wide = torch.empty_like(sums), torch.empty_like(q, dtype=torch.float32)
            heads = q.shape[1]  # where they share keys, each has gradients of its own at first
            spread = [each.new_empty(len(each), heads, *each.shape[2:]) for each in (k, v) if each.shape[1] != heads]
            found = tuple(torch.empty_like(each) for each in (q, k, v))
            del products, wide, spread
            return (*found, None)

    return Fused


def imitate_cuda(assembly: Assembly, stepper: Stepper, kernels: Mapping[str, Any]) -> None:
    """Let the assembly's attention and optimizer behave as on a CUDA device.

    A kernel that needs CUDA cannot run on fake CPU tensors; all of them are fused, so PyTorch's stands in for them.
    `kernels` maps each site to the kernel that serves it on the real device. PyTorch's own optimizers go through
    all parameters at once on CUDA (foreach).
    """
    for site, binding in assembly.bindings.items():
        kernel = kernels.get(site)
        if kernel is not None and kernel.requires.cuda is not None:
            binding.kernels = [(kernel.name, cast(Any, FusedStandIn()))]
    for group in stepper.optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


class FusedStandIn:
    """A fused attention kernel that computes nothing."""

    def supports(self, case: Any) -> Any:
        """Every case."""
        return True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, padding: Tensor | None, causal: bool, scale: float, dropout: float
    ) -> Tensor:
        """Fake tensors of the right size."""
        return attention(q, k, v)
