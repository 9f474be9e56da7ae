"""The assembled model: everything around a built model that a run, an evaluation or a merge needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from graftwork.contracts.accounting import Accounts
from graftwork.contracts.anatomy import DTYPES, AttentionSite, Structure, TowerOutput, named_tensors, within
from graftwork.contracts.kinds import AttentionKernel, MemoryStrategy, ModelArchitecture, PeftMethod, VisionTower
from graftwork.contracts.loss import cross_entropy
from graftwork.contracts.model import Processor
from graftwork.contracts.plan import Plan

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Adaptation:
    """What of a built model is its base's, and what was added or is trained; it does not change after building."""

    newly_initialised: tuple[str, ...] = ()
    """Roles that the base weights lack."""
    base_keys: frozenset[str] = frozenset()
    """Names, in the built model, of the tensors that the base weights hold."""
    earlier: Mapping[str, str] = field(default_factory=dict)
    """The name now to the name before the PEFT method was injected, for each tensor that was there."""
    leaves: tuple[str, ...] = ()
    """The modules that held parameters themselves before the PEFT method was injected."""
    adapter_parameters: frozenset[str] = frozenset()
    """Names of the parameters that the PEFT method added."""
    base_copy: Mapping[str, Tensor] = field(default_factory=dict)
    """The base's values, on the CPU, of its tensors that are trained."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """How many parameters the model has (`total`) and how many are trained (`trained`), before memory strategies keep
    weights in another way; tied ones count once."""


class KernelBinding(Protocol):
    """The kernels of an attention site, and what really ran there (see `graftwork.attention`)."""

    kernels: Sequence[tuple[str, AttentionKernel[Any]]]
    """By name, in order of preference."""
    ran: Counter[str]
    """Kernel to the number of calls."""
    fallbacks: list[str]
    """Each reason for which a preferred kernel was passed over, once."""


@dataclass
class Assembly:
    """A built model with everything around it that a run, an evaluation or a merge needs."""

    plan: Plan
    architecture: ModelArchitecture[Any]
    towers: Mapping[str, VisionTower[Any]]
    outputs: Mapping[str, TowerOutput]
    structure: Structure
    processor: Processor
    peft: PeftMethod[Any] | None
    strategies: Sequence[MemoryStrategy[Any]]
    bindings: Mapping[str, KernelBinding]
    device: torch.device
    precision: str
    own_attention: Mapping[str, AttentionSite] = field(default_factory=dict)
    """The attention sites that the model computes itself, by name; no kernel is bound there."""
    adaptation: Adaptation = field(default_factory=lambda: Adaptation())
    """What the base weights hold and what was added to them; set once, when the PEFT method is injected."""
    base_files: Accounts = field(default_factory=dict)
    """What became of every tensor in the files of its base weights."""
    cross_entropy: Callable[[Any, Tensor, Tensor], Tensor] = cross_entropy
    """From the model, hidden states `[labels, width]` and labels to the summed loss; a memory strategy may replace it."""
    run_forward: Callable[[Callable[[], Any]], Any] = lambda work: work()
    """How to run something that calls the model, outside a stepper; an engine whose weights come and go replaces it."""

    @property
    def model(self) -> Any:
        """The model (see `model.VisionLanguageModel`), a `torch.nn.Module`."""
        return self.structure.model

    @property
    def tower_modules(self) -> list[str]:
        """The modules of the vision towers that fill the model's slots."""
        return [module for part in self.towers for module in self.structure.roles[f"vision.{part}"]]

    def state_to_save(self) -> dict[str, Tensor]:
        """Every tensor that the base does not have or that is trained, by name: what a checkpoint must hold."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return {
            name: tensor
            for name, tensor in named_tensors(self.model).items()
            if name in trained or name not in self.adaptation.base_keys
        }

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that require gradients, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @property
    def changes_image_features(self) -> bool:
        """Whether `encode_images` may return something else with the adapter than without: something that the base lacks, or
        that is trained, lies in a module that it runs."""
        return any(within(name, self.structure.image_encoder) for name in self.state_to_save())

    def autocast(self) -> Any:
        """The context in which the model computes at this assembly's precision."""
        import torch

        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, DTYPES[self.precision]))

    @property
    def quantized(self) -> tuple[str, ...]:
        """The memory strategies with which the model computes something else than without."""
        return tuple(
            strategy.name for strategy in self.strategies if strategy.approximates and strategy.approximates.outputs
        )

    @property
    def can_disable(self) -> bool:
        """Whether `disable_adapter` makes a difference: false where only what the base lacks is trained (a new connector)."""
        return bool(self.adaptation.adapter_parameters or self.adaptation.base_copy)

    @contextmanager
    def full_params(self, names: Collection[str]) -> Iterator[None]:
        """While entered, the parameters of these names hold all their values, which may be replaced. Collective."""
        parameters = {name: p for name, p in self.model.named_parameters() if name in names}
        with ExitStack() as stack:
            for strategy in self.strategies:
                stack.enter_context(strategy.full_params(parameters.values()))
            yield

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """While entered, the model computes what its base computes. What the base never had stays as it is. Collective."""
        with self.peft.disable_adapter(self.model) if self.peft else nullcontext():
            kept = self._replace(self.adaptation.base_copy)
            try:
                yield
            finally:
                self._replace(kept)

    def _replace(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give parameters other values; returns those that they had."""
        kept = {}
        with self.full_params(values) if values else nullcontext():
            parameters = dict(self.model.named_parameters())
            for name, value in values.items():
                kept[name] = parameters[name].data
                parameters[name].data = value.to(kept[name].device)
        return kept

    def kernel_usage(self) -> dict[str, Any]:
        """Which kernel really ran at each site, how often, and why others were passed over; of a site that the model computes
        itself, by what."""
        bound = {
            name: {"ran": dict(binding.ran), "fallbacks": list(binding.fallbacks)}
            for name, binding in self.bindings.items()
        }
        return bound | {
            name: {"own": site.own, "fallbacks": [site.why_own] if site.why_own else []}
            for name, site in self.own_attention.items()
        }
