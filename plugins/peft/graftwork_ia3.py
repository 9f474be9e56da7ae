"""IA3, written without the peft library: a method needs nothing but the contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graftwork import NoSettings, hookimpl
from graftwork.contracts import PeftMethod
from graftwork.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn


class Ia3(PeftMethod[NoSettings]):
    """One trained factor for each output of each linear layer (IA3, arXiv:2205.05638)."""

    name = "ia3"

    def inject(self, model: nn.Module, targets: Sequence[str], *, fresh: bool) -> None:
        import torch

        linears = [m for m in map(model.get_submodule, targets) if isinstance(m, torch.nn.Linear)]
        if not linears:
            raise AdapterError("'ia3' adapts linear layers, and the chosen roles have none; choose other roles")
        for linear in linears:
            factor = torch.ones(linear.out_features, device=linear.weight.device)
            linear.register_parameter("ia3", torch.nn.Parameter(factor))
            hooked: Any = linear
            hooked.ia3_hook = linear.register_forward_hook(_scale)

    @contextmanager
    def disable_adapter(self, model: nn.Module) -> Iterator[None]:
        adapted = list(_adapted(model))
        for linear in adapted:
            linear.ia3_off = True
        try:
            yield
        finally:
            for linear in adapted:
                del linear.ia3_off

    def merge(self, model: nn.Module) -> None:
        for linear in list(_adapted(model)):
            factor = linear.ia3.detach()
            linear.weight.data = (linear.weight.float() * factor[:, None]).to(linear.weight.dtype)
            if linear.bias is not None:
                linear.bias.data = (linear.bias.float() * factor).to(linear.bias.dtype)
            linear.ia3_hook.remove()
            del linear.ia3, linear.ia3_hook


def _adapted(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "ia3"))


def _scale(linear: Any, inputs: Any, output: Any) -> Any:
    return output if getattr(linear, "ia3_off", False) else output * linear.ia3.to(output.dtype)


@hookimpl
def peft_methods() -> list[type[PeftMethod[Any]]]:
    return [Ia3]
