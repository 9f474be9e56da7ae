"""The choice of a kernel for every attention site, and what really ran there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftwork.attention.definition import BOUND, limits
from graftwork.contracts.anatomy import AttentionCase, AttentionSite
from graftwork.contracts.component import Requires, missing_requirements
from graftwork.contracts.device import device_type
from graftwork.contracts.kinds import AttentionKernel
from graftwork.errors import GraftworkError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MOST_ROWS = 65_535
"""The most rows that fused CUDA kernels take: they lie along a dimension of the grid that allows no more."""


@dataclass(frozen=True)
class Chosen:
    """The first kernel that computes a case, and why those before it do not."""

    name: str | None
    """None when no kernel computes the case."""
    kernel: AttentionKernel[Any] | None
    passed_over: tuple[tuple[str, str], ...]
    """The names of kernels, each with its reason."""


def choose(case: AttentionCase, kernels: Iterable[tuple[str, AttentionKernel[Any]]]) -> Chosen:
    """The first of the named kernels, in order of preference, that supports the case. Imports no torch."""
    passed_over: list[tuple[str, str]] = []
    for name, kernel in kernels:
        reason = _not_computed(case.site, kernel) or ("" if (support := kernel.supports(case)) else support.reason)
        if not reason:
            return Chosen(name, kernel, tuple(passed_over))
        passed_over.append((name, reason))
    return Chosen(None, None, tuple(passed_over))


def _not_computed(site: AttentionSite, kernel: AttentionKernel[Any]) -> str:
    """What of a site's masks and scores a kernel does not say that it computes, as a clause; empty when nothing is left."""
    wanted = {
        "window": site.window is not None and f"a sliding window of {site.window} keys",
        "softcap": site.softcap is not None and f"scores capped at {site.softcap:g}",
        "mask": site.mask and "a mask of the model's own",
        "segments": site.segments and "packed records",
    }
    lacking = [phrase for name, phrase in wanted.items() if phrase and name not in kernel.computes]
    return f"it does not compute {' and '.join(lacking)}" if lacking else ""


def unmet_requirement(requires: Requires, case: AttentionCase) -> str:
    """What a kernel requires and a case, or this environment, does not have, as a clause; empty when all is there.

    For kernels to call first in `supports`. Only package metadata is read, and nothing is imported.
    """
    if requires.cuda and case.device != "cuda":
        return f"the tensors are on the {case.device}, and it needs a CUDA device"
    if requires.cuda and (case.capability is None or case.capability < requires.cuda):
        found = "unknown" if case.capability is None else "{}.{}".format(*case.capability)
        return "the compute capability is {}, and it needs {}.{}".format(found, *requires.cuda)
    return " and ".join(map(_package_problem, missing_requirements(requires)))


def _package_problem(requirement: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    name = Requirement(requirement).name
    try:
        return f"{name} {version(name)} is installed, and it needs {requirement}"
    except PackageNotFoundError:
        return f"{name} is not installed"


@dataclass
class Binding:
    """The kernels of one site, by name and in order of preference, and what really ran there."""

    site: AttentionSite
    kernels: Sequence[tuple[str, AttentionKernel[Any]]]
    ran: Counter[str] = field(default_factory=Counter)
    """Kernel to the number of calls; a block that is computed again for its gradients counts again, and a compiled one does not count."""
    fallbacks: list[str] = field(default_factory=list)
    """Each reason for which a preferred kernel was passed over, once."""
    _chosen: dict[Hashable, tuple[str, AttentionKernel[Any]]] = field(default_factory=dict, repr=False)
    _failed: dict[Hashable, dict[str, str]] = field(default_factory=dict, repr=False)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        padding: Tensor | None,
        causal: bool,
        scale: float,
        dropout: float,
        window: int | None = None,
        softcap: float | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Attention by the first kernel that computes the case at hand (see `AttentionKernel.forward`).

        Raises GraftworkError with every kernel's reason when there is none.
        """
        import torch

        backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        facts: tuple[Any, ...] = (q.shape[-1], q.shape[1], k.shape[1], causal, padding is not None, dropout)
        facts += (window, softcap, mask is not None, segments is not None)
        key = (*facts, q.dtype, q.device, backward)
        further = limits(window, softcap, mask, segments)
        if key in self._chosen and torch.compiler.is_compiling():  # what is chosen and counted is no part of a graph
            kernel = self._chosen[key][1]
            return kernel.forward(q, k, v, padding=padding, causal=causal, scale=scale, dropout=dropout, **further)
        while True:
            if key not in self._chosen:
                site = AttentionSite(self.site.name, *facts)
                self._chosen[key] = self._choose(case_of(site, q.dtype, q.device, backward), self._failed.get(key, {}))
            name, kernel = self._chosen[key]
            try:
                output = in_grids(
                    kernel, q, k, v, padding=padding, causal=causal, scale=scale, dropout=dropout, **further
                )
            except (ImportError, NotImplementedError) as error:
                # A library that was built for another torch or device raises only when it is used.
                reason = str(error).partition("\n")[0] or type(error).__name__
                self._failed.setdefault(key, {})[name] = reason
                del self._chosen[key]
                continue
            self.ran[name] += 1
            return output

    def _choose(self, case: AttentionCase, failed: Mapping[str, str]) -> tuple[str, AttentionKernel[Any]]:
        chosen = choose(case, [(name, kernel) for name, kernel in self.kernels if name not in failed])
        passed_over = [*failed.items(), *chosen.passed_over]
        if chosen.name is None or chosen.kernel is None:
            raise GraftworkError(
                f"no kernel under 'attention' computes what '{self.site.name}' needs; list one more that does",
                [f"{name}: {reason}" for name, reason in passed_over],
            )
        for name, reason in passed_over:
            line = f"{name} passed over at {self.site.name}: {reason}"
            if line not in self.fallbacks:
                self.fallbacks.append(line)
        return chosen.name, chosen.kernel


def in_grids(kernel: AttentionKernel[Any], q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """What a kernel computes, on a CUDA device at most `MOST_ROWS` rows at a time."""
    import torch

    if device_type(q.device) != "cuda" or len(q) <= MOST_ROWS:
        return kernel.forward(q, k, v, **options)

    def part(value: Any, start: int) -> Any:
        has_rows = isinstance(value, torch.Tensor) and len(value) == len(q)
        return value[start : start + MOST_ROWS] if has_rows else value

    outputs = [
        kernel.forward(
            *(part(tensor, start) for tensor in (q, k, v)),
            **{name: part(value, start) for name, value in options.items()},
        )
        for start in range(0, len(q), MOST_ROWS)
    ]
    return torch.cat(outputs)


def case_of(site: AttentionSite, dtype: torch.dtype, device: torch.device, backward: bool) -> AttentionCase:
    """The case that a site on a device presents to `supports`."""
    import torch

    cuda = device.type == "cuda" and torch.cuda.is_available()  # fake tensors can be on a device that is not here
    capability = torch.cuda.get_device_capability(device) if cuda else None
    return AttentionCase(site, str(dtype).removeprefix("torch."), device.type, capability, backward)


def bind(modules: Iterable[nn.Module], binding: Binding) -> None:
    """Let the modules use the binding's kernels, whether they call `attend` or transformers calls them."""
    for module in modules:
        setattr(module, BOUND, binding)
