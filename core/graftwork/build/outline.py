"""What a plan comes to, before any weight is read: parts, roles, counts, kernels."""

from __future__ import annotations

from dataclasses import dataclass

from graftwork.build import compose
from graftwork.config.machine import Machine
from graftwork.config.sites import attention_sites, kernels_on
from graftwork.contracts.anatomy import within
from graftwork.contracts.assembly import Assembly
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Plan, folder_of


@dataclass(frozen=True)
class RoleRow:
    """One role of the model in a plan."""

    role: str
    modules: int
    """Modules that hold parameters."""
    parameters: int
    """Of the base."""
    adapted: int
    """How many of the modules the PEFT method changes."""
    trained: int
    """Parameters trained here, those that were added included."""
    newly_initialised: bool
    """Whether the base weights lack it."""


@dataclass(frozen=True)
class KernelRow:
    """The kernel that an attention site gets."""

    site: str
    kernel: str
    passed_over: tuple[tuple[str, str], ...]
    """Kernels that were preferred, and why they do not serve."""


@dataclass(frozen=True)
class Outline:
    """A plan as a person wants to see it."""

    total: int
    trained: int
    roles: tuple[RoleRow, ...]
    kernels: tuple[KernelRow, ...]
    no_processor: str = ""
    """Why there is no processor yet; empty when there is one."""

    @property
    def share(self) -> float:
        """The trained share of all parameters, 0 to 1."""
        return self.trained / self.total


def outline(plan: Plan, lookup: Lookup, machine: Machine) -> Outline:
    """Build a plan's model on the meta device and count; no weight is read and nothing is allocated."""
    import torch

    with torch.random.fork_rng():
        assembly = compose.build_shape(plan, lookup)
    compose.refuse_empty_roles(assembly)
    weights = folder_of(plan.model_spec.model)
    known = weights is None or weights.is_dir()  # what weights lack that are not there yet cannot be said
    rows = []
    for role, modules in assembly.structure.roles.items():
        own = {name: p for name, p in assembly.model.named_parameters() if within(name, modules)}
        leaves = [leaf for leaf in assembly.adaptation.leaves if within(leaf, modules)]
        changed = [n for n, p in own.items() if p.requires_grad or n in assembly.adaptation.adapter_parameters]
        rows.append(
            RoleRow(
                role=role,
                modules=len(leaves),
                parameters=sum(
                    p.numel() for name, p in own.items() if name not in assembly.adaptation.adapter_parameters
                ),
                adapted=sum(any(name.startswith(f"{leaf}.") for name in changed) for leaf in leaves),
                trained=sum(p.numel() for p in own.values() if p.requires_grad),
                newly_initialised=known and role in assembly.adaptation.newly_initialised,
            )
        )
    counts = assembly.adaptation.counts
    kernels = tuple(kernel_rows(plan, lookup, machine, assembly))
    missing = assembly.processor.reason.sentence if isinstance(assembly.processor, compose.NoProcessor) else ""
    return Outline(counts["total"], counts["trained"], tuple(rows), kernels, missing)


def kernel_rows(plan: Plan, lookup: Lookup, machine: Machine, assembly: Assembly) -> list[KernelRow]:
    """Which kernel each site gets on this machine, and why those before it do not serve."""
    sites = attention_sites(plan, assembly.architecture, assembly.towers, assembly.outputs)
    return [
        KernelRow(site.name, chosen.name or "none", chosen.passed_over)
        for site, chosen in kernels_on(plan, sites, lookup, machine)
    ]
