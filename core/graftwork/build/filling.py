"""Filling a built model from its base weights: strictly, and knowing what came from where."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from graftwork import weights
from graftwork.build.values import initialise, put
from graftwork.contracts.anatomy import Structure, named_tensors, within
from graftwork.contracts.kinds import ModelArchitecture, VisionTower, Weighted
from graftwork.contracts.plan import Choice, ModelSpec, config_of, folder_of
from graftwork.errors import AdapterError, WeightsError
from graftwork.weights import LazyTensor, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor, nn


TWICE = "the model has this tower from another folder"
"""Why a tensor of a tower is left out that two folders hold."""


class Shaped(Protocol):
    """Something with a shape: a tensor, or a manifest's entry for one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the dimensions."""
        ...


@dataclass(frozen=True)
class BaseWeights:
    """What the folders of a plan's base weights hold."""

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    """By names in the built model, and what it has no place for by its own."""
    found: tuple[StoredTensor, ...] = ()
    """Every tensor of every file."""
    unused: dict[StoredTensor, str] = field(default_factory=dict)
    """Why a tensor is left out, where that is known."""


def open_base(
    model_spec: ModelSpec,
    architecture: ModelArchitecture[Any],
    towers: Mapping[str, VisionTower[Any]],
    structure: Structure,
    *,
    shapes_only: bool,
) -> BaseWeights:
    """The tensors of all base weights of a plan; the model's own folder wins, but for the parts of which the architecture says that
    theirs does.

    With `shapes_only` a folder may hold configurations without weights."""
    tensors: dict[str, LazyTensor] = {}
    found: list[StoredTensor] = []
    unused: dict[StoredTensor, str] = {}

    def opened(choice: Choice, component: Weighted[Any]) -> Mapping[str, LazyTensor]:
        folder = folder_of(choice)
        if not folder or (shapes_only and not weights.tensor_files(folder)):
            return {}
        held = weights.open_weights(folder)
        found.extend(held.values())
        unused.update(
            {
                tensor: f"{why}, which '{component.name}' does not use"
                for name, tensor in held.items()
                if (why := component.unused(name))
            }
        )
        return held

    for part, tower in towers.items():
        (prefix,) = structure.roles[f"vision.{part}"]
        for name, tensor in opened(model_spec.parts[part], tower).items():
            if translated := tower.module_name(name):
                tensors[f"{prefix}.{translated}"] = tensor
    parts = [part for part in architecture.parts_with_own_weights(config_of(model_spec.model)) if part in towers]
    apart = [name for part in parts for name in structure.roles[f"vision.{part}"]]
    apart = [module for module in apart if any(within(name, [module]) for name in tensors)]
    if whole := opened(model_spec.model, architecture):
        for name, tensor in architecture.tensors(whole, towers, structure.model).items():
            other = tensor if within(name, apart) else tensors.get(name)
            if other is not None:
                unused.update(dict.fromkeys(weights.sources_of(other), TWICE))
            if not within(name, apart):
                tensors[name] = tensor
    for name, source in structure.untied.items():
        if source in tensors:
            tensors.setdefault(name, tensors[source])
    return BaseWeights(tensors, tuple(found), unused)


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


def check_complete(
    model_spec: ModelSpec,
    structure: Structure,
    available: Mapping[str, LazyTensor],
    fresh: Sequence[str],
    added: Container[str] = (),
) -> None:
    """Compare the names of a model's tensors with those of its base weights; WeightsError where some are missing.

    A tensor that the weights lack is allowed only in a fresh role, where a checkpoint has `added` it, or where the run names no
    weights at all (then the model starts from its own random initialisation).
    """
    model = structure.model
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
            first_few(missing),
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
        first_few(places) if others > 0 else (),
    )


def first_few(names: Sequence[str], prefix: str = "", most: int = 5) -> list[str]:
    """The first names, as the details of an error, and how many more there are."""
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
        [*first_few(missing, "missing: "), *first_few(extra, "unknown: "), *first_few(shaped, "shape: ")],
    )
