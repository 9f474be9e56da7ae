"""What every vision tower must do: compute what it describes, and know its tensors by their published names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftwork.attention import kernels
from graftwork.attention.transformers import ATTN_IMPLEMENTATION, register
from graftwork.build.values import parameters_on_meta
from graftwork.conformance.outcome import Check, Skipped, Subject
from graftwork.conformance.recorder import misfit, recorder
from graftwork.conformance.weighted import folder_of
from graftwork.contracts.anatomy import BuildContext, TowerOutput, named_tensors
from graftwork.contracts.kinds import VisionTower
from graftwork.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class Tower:
    """A tower that was built from its configuration."""

    component: VisionTower[Any]
    config: Mapping[str, Any]
    output: TowerOutput
    module: nn.Module


def tower(subject: Subject) -> Tower:
    """The tower, built once. Its example is gone by then, so that nothing but the configuration can be read."""

    def make() -> Tower:
        component, folder = subject.ready(), folder_of(subject)
        config = dict(component.configuration(folder))
        if folder and folder.parent == subject.scratch:
            shutil.rmtree(folder)
        return Tower(component, config, component.describe(config), build(component, config))

    made: Tower = subject.once("building it", make)
    return made


def build(component: VisionTower[Any], config: Mapping[str, Any], *, meta: bool = False) -> nn.Module:
    """The tower in evaluation mode, always with the same weights."""
    import torch

    register()
    with torch.random.fork_rng(devices=[]), parameters_on_meta() if meta else nullcontext():
        torch.manual_seed(0)
        return component.build(config, BuildContext(ATTN_IMPLEMENTATION)).eval()


def maps_of(module: nn.Module, size: int) -> list[Tensor]:
    """What a tower computes from two images of noise."""
    import torch

    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return list(module(pixels))


def the_configuration_is_plain_json(subject: Subject) -> Iterator[str]:
    """It becomes part of the checkpoint."""
    config = tower(subject).config
    if json.loads(json.dumps(config)) != config:
        yield "'configuration' must return plain JSON, and it does not read back the same; use lists, and text as keys"


def it_computes_what_it_describes(subject: Subject) -> Iterator[str]:
    """A map of each width and grid, finest first, at its own size and at another that it takes."""
    built = tower(subject)
    for size in (None, 2 * built.output.pixels.size):
        try:
            output = built.component.describe(built.config, size)
        except WeightsError:
            continue
        if size and output.pixels.size != size:
            yield f"'describe' must describe the size that it is asked for, and for {size} it says {output.pixels.size}; use it, or raise WeightsError"
            return
        maps = maps_of(built.module, output.pixels.size)
        expected = [(2, width, *grid) for width, grid in zip(output.widths, output.grids, strict=True)]
        found = [tuple(each.shape) for each in maps]
        if found != expected:
            yield f"'build' must compute what 'describe' says, {expected}, and it computes {found} from {output.pixels.size} pixels; fix one of them"
        elif not all(each.isfinite().all() for each in maps):
            yield "a tower must compute finite numbers, and from noise it does not; check its initialisation"
        if list(output.grids) != sorted(output.grids, reverse=True):
            yield f"maps must come finest first, and the grids are {output.grids}; turn them round"


def every_published_name_translates_back(subject: Subject) -> Iterator[str]:
    """`module_name(published_name(name))` is `name` for every tensor, and no two have one published name."""
    built = tower(subject)
    owners: dict[str, str] = {}
    for name in named_tensors(built.module):
        published = built.component.published_name(name)
        if (back := built.component.module_name(published)) != name:
            yield f"'module_name' must undo 'published_name', and '{name}' becomes '{published}' and then {back!r}; fix one of them"
        if owners.setdefault(published, name) != name:
            yield f"published names must differ, and '{owners[published]}' and '{name}' are both '{published}'; fix 'published_name'"
    unknown = "no.such.tensor.anywhere"
    if built.component.module_name(unknown) in named_tensors(built.module):
        yield f"'module_name' must return None for what it does not know, and '{unknown}' became a tensor; return None"


def attention_is_where_the_sites_say(subject: Subject) -> Iterator[str]:
    """What runs through Graftwork's kernels has the shapes of `sites`."""
    built = tower(subject)
    kernel, cases = recorder()
    sites = [site for site in built.component.sites(built.config) if not site.own]
    module = build(built.component, built.config)
    for site in sites:
        kernels.bind(module.modules(), kernels.Binding(site, [(kernel.name, kernel(kernel.Settings()))]))
    maps_of(module, built.output.pixels.size)
    if not sites:
        raise Skipped("it says that it computes no attention, or all of it by itself")
    if not cases:
        yield "what 'sites' names must run through Graftwork's kernels, and nothing did; build with context.attn_implementation, or call attend"
    for case in cases:
        if why := misfit(case.site, sites):
            yield f"'sites' must say what is computed, and {why}; fix 'sites'"


def its_shape_is_known_without_weights(subject: Subject) -> Iterator[str]:
    """On the meta device it has the same names and shapes, and nothing is read."""
    built = tower(subject)
    empty = named_tensors(build(built.component, built.config, meta=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.items()}
    if shapes != (real := {name: tuple(tensor.shape) for name, tensor in named_tensors(built.module).items()}):
        different = sorted(dict(shapes.items() ^ real.items()))[0]
        yield f"'build' must make the same tensors on 'meta', and '{different}' is not in both; ask no values while building"
    for name, parameter in build(built.component, built.config, meta=True).named_parameters():
        if not parameter.is_meta:
            yield f"'build' must leave parameters where they are made, and '{name}' has values on 'meta'; read no weights"


CHECKS: tuple[Check, ...] = (
    the_configuration_is_plain_json,
    it_computes_what_it_describes,
    every_published_name_translates_back,
    attention_is_where_the_sites_say,
    its_shape_is_known_without_weights,
)
