"""Where a plan's model computes attention, and the kernels that the plan lists for each site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from graftwork.attention.kernels import Chosen, choose
from graftwork.config.machine import Machine
from graftwork.config.restore import restore_component
from graftwork.contracts.anatomy import DTYPES, AttentionCase, AttentionSite, TowerOutput
from graftwork.contracts.kinds import AttentionKernel, ModelArchitecture, VisionTower
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Plan, config_of


def describe_towers(
    plan: Plan, architecture: ModelArchitecture[Any], towers: Mapping[str, VisionTower[Any]]
) -> Mapping[str, TowerOutput]:
    """What each part's tower computes in this plan."""
    model_spec = plan.model_spec
    pairs = {part: (tower, config_of(model_spec.parts[part])) for part, tower in towers.items()}
    return architecture.describe_towers(config_of(model_spec.model), pairs)


def attention_sites(
    plan: Plan,
    architecture: ModelArchitecture[Any],
    towers: Mapping[str, VisionTower[Any]],
    outputs: Mapping[str, TowerOutput],
) -> list[AttentionSite]:
    """Every site of a plan's model, towers included (as `vision.PART`), known without weights."""
    sites = list(architecture.sites(config_of(plan.model_spec.model), outputs))
    for part, tower in towers.items():
        sites += [replace(site, name=f"vision.{part}") for site in tower.sites(config_of(plan.model_spec.parts[part]))]
    return [replace(site, segments=site.causal and plan.run_context.train.packing) for site in sites]


def kernels_for(plan: Plan, site: str, lookup: Lookup) -> list[tuple[str, AttentionKernel[Any]]]:
    """The kernels to try at a site, by name, in order of preference."""
    choices = plan.run_context.attention.get(site, plan.run_context.attention.get("*", []))
    return [(choice.name, cast(AttentionKernel[Any], restore_component(choice, lookup))) for choice in choices]


def kernels_on(
    plan: Plan, sites: Iterable[AttentionSite], lookup: Lookup, machine: Machine, device: str = ""
) -> list[tuple[AttentionSite, Chosen]]:
    """The kernel that serves each attention site of a plan on a machine, and why those before it do not.

    `device` is `cuda` or `cpu`; by default the machine's.
    """
    dtype, device = DTYPES[plan.run_context.train.precision], device or ("cuda" if machine.cuda else "cpu")

    def chosen(site: AttentionSite) -> Chosen:
        if site.own:
            return Chosen(f"{site.own} (the model's own)", None, (("kernels", site.why_own),) if site.why_own else ())
        return choose(AttentionCase(site, dtype, device, machine.capability), kernels_for(plan, site.name, lookup))

    return [(site, chosen(site)) for site in sites]
