"""The last steps of a built model to its device: in one go, or part by part where each process keeps only a share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from graftwork.build.values import put
from graftwork.contracts.anatomy import named_tensors, within
from graftwork.contracts.assembly import Assembly
from graftwork.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor, nn

Fill = Callable[[Mapping[str, "Tensor"]], None]
"""Gives tensors, by the names that the base weights have for them, the values there."""


def complete(
    assembly: Assembly,
    sharders: Sequence[Callable[[nn.Module], None]],
    trained: Mapping[str, Tensor] | None,
    earlier: Mapping[str, str],
    fill: Fill | None,
) -> None:
    """Bring an adapted model to its device, quantized and sharded as its memory strategies will have it.

    With `fill` it has no base values yet and is filled, one part after another, by the names that its tensors had `earlier`.
    `trained` are the tensors of a checkpoint. What it keeps of the base is copied.
    """
    left = named_tensors(assembly.model)
    base_copy: dict[str, Tensor] = {}
    for part in parts_of(assembly) if sharders else [""]:
        names = [name for name in left if not part or within(name, [part])]
        # Only the callee may hold the tensors: each must be free to go once its part is sharded.
        base_copy |= _complete_part(
            assembly, part, {name: left.pop(name) for name in names}, sharders, trained, earlier, fill
        )
    assembly.adaptation = replace(assembly.adaptation, base_copy=base_copy)


def parts_of(assembly: Assembly) -> list[str]:
    """The modules that are filled and sharded one after another: the blocks, the modules outside them that hold parameters, and at
    last the model itself. What has values already makes room first, and what lies further in comes before what is around it."""
    blocks = [name for row in assembly.structure.blocks.values() for name in row]
    outside = [name for name in assembly.adaptation.leaves if name and not within(name, blocks)]

    def turn(name: str) -> tuple[bool, int]:
        return any(each.is_meta for each in assembly.model.get_submodule(name).parameters()), -name.count(".")

    return [*sorted([*blocks, *outside], key=turn), ""]


def _complete_part(
    assembly: Assembly,
    part: str,
    tensors: Mapping[str, Tensor],
    sharders: Sequence[Callable[[nn.Module], None]],
    trained: Mapping[str, Tensor] | None,
    earlier: Mapping[str, str],
    fill: Fill | None,
) -> dict[str, Tensor]:
    """Complete one module; returns a copy of what it keeps of the base."""
    base_copy = {}
    module = assembly.model.get_submodule(part)
    if fill:
        fill({earlier[name]: tensor for name, tensor in tensors.items() if name in earlier})
        for tensor in tensors.values():
            if tensor.requires_grad:
                tensor.data = tensor.data.float()
        new = {name: tensor for name, tensor in tensors.items() if name not in earlier}
        if new and trained is None and assembly.peft:
            assembly.peft.initialise_from_base(module)
            _check_values(assembly.peft.name, new)
    for name, tensor in tensors.items():
        if tensor.requires_grad and name in assembly.adaptation.base_keys:
            base_copy[name] = tensor.detach().clone()
        if trained and name in trained:
            # What is trained computes in fp32, in whatever precision it was saved.
            put(tensor, trained[name].to(tensor.dtype) if tensor.requires_grad else trained[name])
    for strategy in assembly.strategies:
        strategy.quantize(assembly)
    module.to(assembly.device)
    for shard in sharders:
        shard(module)
    return base_copy


def _check_values(method: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.isnan().any():
            raise AdapterError(
                f"'{method}' gives '{name}' no number to start with: where weights are sharded, its 'inject' sees no values of "
                "the base; set what depends on them in 'initialise_from_base', or shard nothing"
            )
