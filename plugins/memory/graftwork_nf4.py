"""The memory strategy `nf4`: frozen linear layers in 4 bits (QLoRA, arXiv:2305.14314), by bitsandbytes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from graftwork import GraftworkError, Requires, hookimpl, setting
from graftwork.contracts import Approximation, MemoryStrategy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graftwork.contracts import Assembly

BLOCK, OUTER = 64, 256
"""Weights that share a scale, and scales that share one of their own."""


@dataclass(frozen=True)
class Nf4Settings:
    """What is kept in 4 bits."""

    on: tuple[str, ...] = setting((), "The roles whose linear layers are; by default all but a head")


class Nf4(MemoryStrategy[Nf4Settings]):
    """Keeps frozen linear weights in 4-bit NormalFloat, their scales in 8 bits: 0.52 bytes for each

    A weight becomes 16-bit for the moment in which it is multiplied, forwards and backwards. What is trained, what the
    base weights lack, embeddings, convolutions and heads stay as they are. The adapter is trained on the rounded base; a
    checkpoint holds the adapter alone, so evaluating and merging use the whole base, and say so.
    """

    name = "nf4"
    requires = Requires(packages=("bitsandbytes>=0.50",))
    approximates = Approximation("frozen linear weights are kept in 4 bits", tolerance=0.5, outputs=True)
    Settings = Nf4Settings

    def quantize(self, assembly: Assembly) -> None:
        """Round layer by layer on the device, so that the whole weights are never there."""
        import torch

        # At import it warns that an optional package is missing, which is not needed.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        import bitsandbytes  # noqa: F401  (registers the operators)

        for linear in list(self._linears(assembly)):
            weight = linear.weight.detach().to(assembly.device)
            # bitsandbytes' own two steps of double quantisation, with scales that are linear in 8 bits.
            packed, scales = torch.ops.bitsandbytes.quantize_4bit.default(weight, BLOCK, "nf4", torch.uint8)
            code, offset = torch.linspace(-1.0, 1.0, 256, device=weight.device), scales.mean()
            scales, outer = torch.ops.bitsandbytes.quantize_blockwise.default(scales - offset, code, OUTER)
            del linear.weight
            linear.__class__ = _rounded_linear()
            linear.dtype = weight.dtype
            buffers = {"packed": packed, "scales": scales, "outer": outer, "code": code, "offset": offset}
            for name, tensor in buffers.items():
                linear.register_buffer(name, tensor, persistent=False)

    def _linears(self, assembly: Assembly) -> Iterator[Any]:
        """The frozen linear layers of the base in the chosen roles."""
        from torch import nn

        from graftwork.contracts import modules_of, within

        roles = assembly.structure.roles
        for name in self.settings.on:
            if not modules_of(roles, [name]):
                raise GraftworkError(
                    f"'{self.name}' is asked for the role '{name}', and this model has {', '.join(map(repr, roles))}; "
                    "change its setting 'on'"
                )
        chosen = modules_of(roles, self.settings.on or [role for role in roles if not role.endswith(".head")])
        for name, module in assembly.model.named_modules():
            weight, frozen = f"{name}.weight", type(module) is nn.Linear and not module.weight.requires_grad
            wanted = weight in assembly.adaptation.base_keys and within(weight, chosen)
            if frozen and not module.weight.is_meta and wanted:
                yield module


@cache
def _rounded_linear() -> type[nn.Linear]:
    import bitsandbytes
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit
    from torch import nn

    class RoundedLinear(nn.Linear):
        """A linear layer whose weight is in 4 bits. It is the module that it was: hooks, children and name are its own."""

        @property
        def weight(self) -> Tensor:  # type: ignore[override]
            """The weight as it computes, in the dtype that it had. Changing it changes nothing."""
            weight: Tensor = dequantize_4bit(self.packed, self.state)
            return weight.view(self.out_features, self.in_features)

        @property
        def as_column(self) -> bool:
            """Whether the weight is unpacked as one column, for which bitsandbytes uses its portable code.

            Its kernel for AVX-512 gets rows wrong whose length is not a multiple of the block.
            """
            return self.packed.device.type == "cpu" and self.in_features % BLOCK > 0

        @property
        def state(self) -> QuantState:
            """What bitsandbytes needs beside the packed weight; made anew, for the buffers move with the module."""
            outer = QuantState(self.outer, code=self.code, blocksize=OUTER, dtype=torch.float32)
            return QuantState(
                self.scales,
                shape=torch.Size(
                    (self.out_features * self.in_features, 1)
                    if self.as_column
                    else (self.out_features, self.in_features)
                ),
                blocksize=BLOCK,
                quant_type="nf4",
                dtype=self.dtype,
                offset=self.offset,
                state2=outer,
            )

        def forward(self, input: Tensor) -> Tensor:
            device = input.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
            bias = None if self.bias is None else self.bias.to(dtype)
            if self.as_column:
                return nn.functional.linear(input.to(dtype), self.weight.to(dtype), bias)
            output: Tensor = bitsandbytes.matmul_4bit(input.to(dtype), self.packed, quant_state=self.state, bias=bias)
            return output

    return RoundedLinear


@hookimpl
def memory_strategies() -> list[type[MemoryStrategy[Any]]]:
    """The strategy of this plugin."""
    return [Nf4]
