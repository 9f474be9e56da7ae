"""Filling a built model from its base weights: strictly, and knowing what came from where."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from graftwork import weights
from graftwork.build.values import initialise, put
from graftwork.contracts.anatomy import Structure, named_tensors, within
from graftwork.contracts.kinds import ModelArchitecture, VisionTower
from graftwork.contracts.plan import Choice, ModelSpec, config_of, folder_of
from graftwork.errors import AdapterError, WeightsError
from graftwork.weights import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor, nn


class Shaped(Protocol):
    """Something with a shape: a tensor, or a manifest's entry for one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the dimensions."""
        ...


def base_tensors(
    model_spec: ModelSpec,
    architecture: ModelArchitecture[Any],
    towers: Mapping[str, VisionTower[Any]],
    structure: Structure,
    *,
    shapes_only: bool,
) -> dict[str, LazyTensor]:
    """The tensors of all base weights of a plan under the built model's names; the model's own folder wins, but for the parts of
    which the architecture says that theirs does.

    With `shapes_only` a folder may hold configurations without weights."""
    found: dict[str, LazyTensor] = {}

    def opened(choice: Choice) -> Mapping[str, LazyTensor]:
        folder = folder_of(choice)
        return weights.open_weights(folder) if folder and (weights.tensor_files(folder) or not shapes_only) else {}

    for part, tower in towers.items():
        (prefix,) = structure.roles[f"vision.{part}"]
        for name, tensor in opened(model_spec.parts[part]).items():
            if translated := tower.module_name(name):
                found[f"{prefix}.{translated}"] = tensor
    own = architecture.parts_with_own_weights(config_of(model_spec.model))
    apart = [name for part in own if part in towers for name in structure.roles[f"vision.{part}"]]
    apart = [module for module in apart if any(within(name, [module]) for name in found)]
    if whole := opened(model_spec.model):
        held = architecture.tensors(whole, towers)
        found.update({name: tensor for name, tensor in held.items() if not within(name, apart)})
    return found


def folders_of(model_spec: ModelSpec) -> list[Path]:
    """Where the base weights of a plan are."""
    choices = (model_spec.model, *model_spec.parts.values())
    return [folder for choice in choices if (folder := folder_of(choice))]


def roles_not_in(
    architecture: ModelArchitecture[Any], structure: Structure, available: Mapping[str, LazyTensor]
) -> tuple[str, ...]:
    """The fresh roles of the architecture that lie, whole, outside the base weights."""
    names = set(named_tensors(structure.model))
    return tuple(
        role
        for role in architecture.newly_initialised_roles
        if (own := {name for name in names if within(name, structure.roles.get(role, ()))})
        and not own & available.keys()
    )


def check_names(
    model_spec: ModelSpec,
    structure: Structure,
    available: Mapping[str, LazyTensor],
    fresh: Sequence[str],
    added: Container[str] = (),
) -> None:
    """Compare the names of a model's tensors with those of its base weights; WeightsError unless they fit.

    A tensor that the weights lack is allowed only in a fresh role, where a checkpoint has `added` it, or where the run names no
    weights at all (then the model starts from its own random initialisation).
    """
    model = structure.model
    for copy, tied in structure.tied_weights.items():
        if copy in available and tied in available and not available[copy]().equal(available[tied]()):
            for name in (copy, tied):
                if not all_finite(value := available[name]().float()):  # NaN is unlike itself.
                    raise not_finite(name, value, value.dtype, folders_of(model_spec))
            raise WeightsError(
                f"the weights hold '{copy}' unlike '{tied}', and by their configuration these are one tensor; correct the "
                "configuration"
            )
    if extra := sorted(available.keys() - model.state_dict(keep_vars=True).keys() - structure.tied_weights.keys()):
        raise WeightsError(
            f"the weights hold {len(extra)} tensors that '{model_spec.model.name}' has no place for; name the right weights",
            _some(extra),
        )
    untrained = [name for role in fresh for name in structure.roles[role]]
    unnamed = [
        name
        for part, choice in model_spec.parts.items()
        if not choice.weights and not model_spec.model.weights
        for name in structure.roles[f"vision.{part}"]
    ]
    missing = [
        name
        for name in named_tensors(model)
        if name not in added and name not in available and not within(name, [*untrained, *unnamed])
    ]
    if missing and model_spec.model.weights:
        raise WeightsError(
            f"the weights lack {len(missing)} tensors that '{model_spec.model.name}' needs; name complete weights",
            _some(missing),
        )


def fill_rest(model: nn.Module, available: Container[str], dtype: Any, added: Mapping[str, Tensor]) -> None:
    """Give all that the base weights lack its values, in the `dtype`: those that a checkpoint has `added`, or initial ones."""
    for name, tensor in named_tensors(model).items():
        if name in added and name not in available:
            put(tensor, added[name])
    initialise(model, later=available)
    for name, tensor in named_tensors(model).items():
        if tensor.is_floating_point() and name not in available:
            tensor.data = tensor.data.to(dtype)


def fill(
    tensors: Mapping[str, Tensor],
    available: Mapping[str, LazyTensor],
    dtype: Any,
    architecture_name: str,
    folders: Iterable[Path] = (),
) -> None:
    """Give tensors, by the name that they have in the base weights, the values there, in the `dtype`; WeightsError for a value of
    another shape, and for one that is not finite. `folders` are where the base weights are."""
    import torch

    def value(name: str, tensor: Tensor) -> Tensor:
        found = available[name]()
        if found.shape != tensor.shape:
            raise WeightsError(
                f"the weights hold '{name}' as {tuple(found.shape)}, and '{architecture_name}' needs {tuple(tensor.shape)}; name "
                "weights that fit the configuration"
            )
        if not found.is_floating_point():
            return found
        converted = found.to(dtype)
        # A buffer may hold infinities, as masks do; what is computed with nowhere may.
        if not all_finite(converted, infinities=not isinstance(tensor, torch.nn.Parameter)):
            raise not_finite(name, found, dtype, folders)
        return converted

    for name, tensor in tensors.items():
        if name in available:
            put(tensor, value(name, tensor))  # no name may keep what was read while the next is


def all_finite(value: Tensor, *, infinities: bool = False) -> bool:
    """Whether there is no NaN, and unless `infinities` are allowed none of those, in one pass that keeps nothing."""
    import torch

    if not value.numel():
        return True
    extremes = torch.stack(torch.aminmax(value.detach()))
    return not bool(extremes.isnan().any()) if infinities else bool(extremes.isfinite().all())


def not_finite(name: str, value: Tensor, dtype: Any, folders: Iterable[Path]) -> WeightsError:
    """What to raise for a tensor of the base that is not finite in the `dtype`; names it and its file as the folders have them."""
    if all_finite(value):
        return WeightsError(
            f"the weights hold values up to {float(value.abs().max()):.3g} in '{name}', which {str(dtype).removeprefix('torch.')} "
            "cannot hold; set train.precision to bf16 or fp32"
        )
    places = [
        f"'{original}' in '{file}' ({int(tensor.isnan().sum()):,} NaN and {int(tensor.isinf().sum()):,} infinite of {tensor.numel():,})"
        for folder in folders
        for file in weights.tensor_files(folder)
        for original, read in weights.open_file(file).items()
        if (tensor := read()).is_floating_point() and not all_finite(tensor := tensor.float())
    ]
    first, others = places[0] if places else f"'{name}'", len(places) - 1
    return WeightsError(
        f"the weights hold NaN or infinite values, in {first}{f' and {others} more tensors' if others > 0 else ''}; fetch them "
        "again, or name others",
        _some(places) if others > 0 else (),
    )


def _some(names: Sequence[str], prefix: str = "", most: int = 5) -> list[str]:
    shown = [prefix + name for name in names[:most]]
    return [*shown, f"{prefix}… and {len(names) - most} more"] if len(names) > most else shown


def check_keys(expected: Mapping[str, Shaped], found: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors that are wanted with those that a checkpoint holds; AdapterError unless they are the same."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shaped = [
        f"{name}: {found[name]} in the checkpoint, {tuple(expected[name].shape)} in the model"
        for name in sorted(expected.keys() & found.keys())
        if tuple(expected[name].shape) != found[name]
    ]
    if not missing and not extra and not shaped:
        return
    matched = len(expected.keys() & found.keys()) - len(shaped)
    raise AdapterError(
        f"the adapter does not fit its model: {matched} of {len(expected)} expected tensors match, {len(missing)} are "
        f"missing, {len(extra)} are unknown, {len(shaped)} have another shape; nothing was loaded",
        [*_some(missing, "missing: "), *_some(extra, "unknown: "), *_some(shaped, "shape: ")],
    )
