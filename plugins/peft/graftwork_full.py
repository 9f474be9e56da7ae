"""Full fine-tuning, as a method like any other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from graftwork import NoSettings, hookimpl
from graftwork.contracts import PeftMethod
from graftwork.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn


class Full(PeftMethod[NoSettings]):
    """Every parameter of the chosen roles is trained itself; nothing is added."""

    name = "full"

    def inject(self, model: nn.Module, targets: Sequence[str], *, fresh: bool) -> None:
        parameters = [p for name in targets for p in model.get_submodule(name).parameters(recurse=False)]
        if not parameters:
            raise AdapterError("'full' found no parameters in the chosen roles; choose other roles")
        for parameter in parameters:
            parameter.requires_grad_(parameter.is_floating_point())

    def disable_adapter(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def merge(self, model: nn.Module) -> None:
        """Nothing to fold: the trained values are the base's own tensors."""


@hookimpl
def peft_methods() -> list[type[PeftMethod[Any]]]:
    return [Full]
