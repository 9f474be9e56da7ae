"""Tensors in weights that a built model has already, under another name or computed: whether they are equal to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.build.filling import BaseWeights, all_finite, first_few, folders_of, not_finite
from graftwork.contracts.accounting import Accounts, account, without_place
from graftwork.contracts.anatomy import Structure
from graftwork.contracts.plan import ModelSpec
from graftwork.errors import WeightsError
from graftwork.weights import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor


def account_for(base: BaseWeights, structure: Structure, model_spec: ModelSpec) -> Accounts:
    """What became of every tensor of the base weights. WeightsError for one that the model has no place for, and for a copy of
    another that is not equal to it."""
    state = structure.model.state_dict(keep_vars=True).keys()
    used = [tensor for name, tensor in base.tensors.items() if name in state]
    copies = {name: tensor for name, tensor in base.tensors.items() if name not in state}
    folders = folders_of(model_spec)
    equal = [tensor for name, tensor in copies.items() if is_copy(name, tensor, structure, base.tensors, folders)]
    accounts = account(base.found, used=used, equal=equal, refused=base.unused)
    if extra := [name for _, name in without_place(accounts)]:
        raise WeightsError(
            f"the weights hold {len(extra)} tensors that '{model_spec.model.name}' has no place for; name the right weights",
            first_few(sorted(extra)),
        )
    return accounts


def is_copy(
    name: str,
    tensor: LazyTensor,
    structure: Structure,
    tensors: Mapping[str, LazyTensor],
    folders: Sequence[Path],
) -> bool:
    """Whether a tensor that the model has no place for is a copy of another of `tensors`, or of what the model computes.

    WeightsError where it should be one and is not equal; `folders` are where all of them come from."""
    import torch

    other = structure.tied_weights.get(name, name)
    if other != name and other in tensors:
        if not tensors[other]().equal(tensor()):
            for each, value in ((name, tensor().float()), (other, tensors[other]().float())):
                if not all_finite(value):  # NaN is unlike itself.
                    raise not_finite(each, value, value.dtype, folders)
            raise WeightsError(
                f"the weights hold '{name}' unlike '{other}', and by their configuration these are one tensor; correct the "
                "configuration"
            )
        return True
    computed: Tensor | None = dict(structure.model.named_buffers()).get(other)
    if computed is None or computed.is_meta:
        return False
    value = tensor()
    precision = 4 * torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
    expected = computed.to(value.dtype)
    if value.shape != expected.shape or not torch.allclose(value.float(), expected.float(), rtol=precision, atol=0.0):
        raise WeightsError(
            f"the weights hold '{name}' unlike what the model computes for it, so they were made with another configuration; correct "
            "that"
        )
    return True
