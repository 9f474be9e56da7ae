"""Attention: its plain definition, the choice of a kernel for every site, and the entry for transformers' models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftwork.component import Requires
from graftwork.errors import GraftworkError
from graftwork.kinds import AttentionCase, AttentionKernel, AttentionSite

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ATTN_IMPLEMENTATION = "graftwork"
"""The `attn_implementation` under which transformers' models find Graftwork's kernels, once `register` was called."""

BOUND = "graftwork_attention"
"""The attribute of a module that holds its binding; neither parameter, buffer nor child, so `state_dict` is unaffected."""


# What is computed -----------------------------------------------------------------------------------------------------


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    padding: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention by the kernels that `module` is bound to; by the plain definition where it is not bound.

    Shapes and `padding` are those of `AttentionKernel.forward`; `scale` is head_dim ** -0.5 unless given. Under autocast
    all three tensors get autocast's dtype, otherwise that of `v` (rotary embeddings can leave q and k wider). Where a
    causal query is itself padding, the output is finite and otherwise unspecified.
    """
    import torch

    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else v.dtype
    compute: Callable[..., Tensor] = getattr(module, BOUND, plain_attention)
    return compute(
        q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        padding=padding,
        causal=causal and q.shape[2] > 1,  # a single query is the last position and sees every key
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        dropout=dropout,
    )


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, *, padding: Tensor | None, causal: bool, scale: float, dropout: float
) -> Tensor:
    """The definition that every kernel is measured by (see `AttentionKernel.forward`), with a softmax in fp32.

    A query that sees no key gets the mean of all values.
    """
    import torch
    from torch.nn import functional

    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    # The queries of the heads that share a key head are stacked, so that no key is repeated.
    scores = q.reshape(batch, kv_heads, -1, head_dim) @ k.transpose(-1, -2)
    scores = scores.view(batch, heads, queries, keys).float() * scale
    seen = visible_keys(q, k, padding, causal)
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    shares = functional.dropout(scores.softmax(-1).to(v.dtype), dropout)
    return (shares.view(batch, kv_heads, -1, keys) @ v).view(batch, heads, queries, -1)


def visible_keys(q: Tensor, k: Tensor, padding: Tensor | None, causal: bool) -> Tensor | None:
    """Which keys each query sees, bool, broadcastable to `[batch, heads, queries, keys]`; None when all see all."""
    import torch

    seen = None if padding is None else padding[:, None, None, :]
    queries, keys = q.shape[2], k.shape[2]
    if causal and queries > 1:
        triangle = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        seen = triangle if seen is None else seen & triangle
    return seen


@dataclass(frozen=True)
class Packed:
    """A batch without its padding: one sequence after another, for kernels that take sequences of different lengths."""

    q: Tensor
    """`[real queries, heads, head_dim]`."""
    k: Tensor
    """`[real keys, kv_heads, head_dim]`."""
    v: Tensor
    """As `k`."""
    q_lengths: Tensor
    """`[batch]`: how many queries each sequence has."""
    k_lengths: Tensor
    """`[batch]`: how many keys each sequence has, at least one."""
    rows: Tensor
    """`[real queries]`: where the queries lie in the padded batch, with batch and positions in one dimension."""
    queries: int
    """How many queries each sequence of the padded batch has."""

    def unpack(self, output: Tensor) -> Tensor:
        """From `[real queries, heads, head_dim]` to `[batch, heads, queries, head_dim]`, with 0 at padding."""
        batch = len(self.q_lengths)
        padded = output.new_zeros(batch * self.queries, *output.shape[1:]).index_copy(0, self.rows, output)
        return padded.view(batch, self.queries, *output.shape[1:]).transpose(1, 2)


def pack(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, causal: bool) -> Packed:
    """Take the padding out of a batch; shapes are those of `AttentionKernel.forward`.

    Causal queries are the last positions of the keys, so that padding among them goes too, and the queries that stay are
    still the last of the keys that stay: a causal kernel must align its mask at the bottom right. Other queries all stay.
    """
    import torch

    queries = q.shape[2]
    padding = padding | ~padding.any(1, keepdim=True)  # a sequence without any key would have no defined result
    real = padding[:, -queries:] if causal else torch.ones_like(padding[:, :1]).expand(-1, queries)
    rows, columns = real.flatten().nonzero()[:, 0], padding.flatten().nonzero()[:, 0]

    def lines(tensor: Tensor, index: Tensor) -> Tensor:
        return tensor.transpose(1, 2).flatten(0, 1)[index]

    return Packed(lines(q, rows), lines(k, columns), lines(v, columns), real.sum(1), padding.sum(1), rows, queries)


# Which kernel computes it ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """The first kernel that computes a case, and why those before it do not."""

    name: str | None
    """None when no kernel computes the case."""
    passed_over: tuple[tuple[str, str], ...]
    """The names of kernels, each with its reason."""


def choose(case: AttentionCase, kernels: Iterable[tuple[str, AttentionKernel[Any]]]) -> Chosen:
    """The first of the named kernels, in order of preference, that supports the case. Imports no torch."""
    passed_over: list[tuple[str, str]] = []
    for name, kernel in kernels:
        support = kernel.supports(case)
        if support:
            return Chosen(name, tuple(passed_over))
        passed_over.append((name, support.reason))
    return Chosen(None, tuple(passed_over))


def lacking(requires: Requires, case: AttentionCase) -> str:
    """What a kernel's card asks for and a case does not have, as a clause; empty when nothing is lacking.

    For kernels to call first in `supports`. Packages are asked of metadata, and nothing is imported.
    """
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    if requires.cuda and case.device != "cuda":
        return f"the tensors are on the {case.device}, and it needs a CUDA device"
    if requires.cuda and (case.capability is None or case.capability < requires.cuda):
        found = "unknown" if case.capability is None else "{}.{}".format(*case.capability)
        return "the compute capability is {}, and it needs {}.{}".format(found, *requires.cuda)
    for requirement in map(Requirement, requires.packages):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            return f"{requirement.name} is not installed"
        if not requirement.specifier.contains(installed, prereleases=True):
            return f"{requirement.name} {installed} is installed, and it needs {requirement}"
    return ""


@dataclass
class Binding:
    """The kernels of one site, by name and in order of preference, and what really ran there."""

    site: AttentionSite
    kernels: Sequence[tuple[str, AttentionKernel[Any]]]
    ran: Counter[str] = field(default_factory=Counter)
    """Kernel to the number of calls; a block that is computed again for its gradients counts again."""
    fallbacks: list[str] = field(default_factory=list)
    """Each reason for which a preferred kernel was passed over, once."""
    _settled: dict[Hashable, tuple[str, AttentionKernel[Any]]] = field(default_factory=dict, repr=False)
    _failed: dict[Hashable, dict[str, str]] = field(default_factory=dict, repr=False)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, padding: Tensor | None, causal: bool, scale: float, dropout: float
    ) -> Tensor:
        """Attention by the first kernel that computes the case at hand (see `AttentionKernel.forward`).

        Raises GraftworkError with every kernel's reason when there is none.
        """
        import torch

        backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        shape = (q.shape[-1], q.shape[1], k.shape[1])
        key = (*shape, causal, padding is not None, dropout, q.dtype, q.device, backward)
        while True:
            if key not in self._settled:
                site = AttentionSite(self.site.name, *shape, causal, padding is not None, dropout)
                self._settled[key] = self._choose(case_of(site, q.dtype, q.device, backward), self._failed.get(key, {}))
            name, kernel = self._settled[key]
            try:
                output = kernel.forward(q, k, v, padding=padding, causal=causal, scale=scale, dropout=dropout)
            except (ImportError, NotImplementedError) as error:
                # A library that was built for another torch or device says so only when it is used.
                reason = str(error).partition("\n")[0] or type(error).__name__
                self._failed.setdefault(key, {})[name] = reason
                del self._settled[key]
                continue
            self.ran[name] += 1
            return output

    def _choose(self, case: AttentionCase, failed: Mapping[str, str]) -> tuple[str, AttentionKernel[Any]]:
        chosen = choose(case, [(name, kernel) for name, kernel in self.kernels if name not in failed])
        passed_over = [*failed.items(), *chosen.passed_over]
        if chosen.name is None:
            raise GraftworkError(
                f"no kernel under 'attention' computes what '{self.site.name}' needs; list one more that does",
                [f"{name}: {reason}" for name, reason in passed_over],
            )
        for name, reason in passed_over:
            line = f"{name} passed over at {self.site.name}: {reason}"
            if line not in self.fallbacks:
                self.fallbacks.append(line)
        return chosen.name, dict(self.kernels)[chosen.name]


def case_of(site: AttentionSite, dtype: torch.dtype, device: torch.device, backward: bool) -> AttentionCase:
    """A site on a device, as kernels are asked about it."""
    import torch

    cuda = device.type == "cuda" and torch.cuda.is_available()  # fake tensors can be on a device that is not here
    capability = torch.cuda.get_device_capability(device) if cuda else None
    return AttentionCase(site, str(dtype).removeprefix("torch."), device.type, capability, backward)


def bind(modules: Iterable[nn.Module], binding: Binding) -> None:
    """Let the modules, when they call `attend` or are asked by transformers, use the binding's kernels."""
    for module in modules:
        setattr(module, BOUND, binding)


def report(bindings: Mapping[str, Binding]) -> dict[str, dict[str, Any]]:
    """What ran at each site, ready for JSON: `{site: {"ran": {kernel: calls}, "fallbacks": [reason]}}`."""
    return {
        name: {"ran": dict(binding.ran), "fallbacks": list(binding.fallbacks)} for name, binding in bindings.items()
    }


# Models of transformers -----------------------------------------------------------------------------------------------


def register() -> None:
    """Make `ATTN_IMPLEMENTATION` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTN_IMPLEMENTATION, _transformers_attention)
    AttentionMaskInterface.register(ATTN_IMPLEMENTATION, _transformers_padding)


def _transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls an attention function: the output is `[batch, queries, heads, head_dim]`."""
    unknown = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if attention_mask is not None and attention_mask.dim() != 2:
        unknown.append(f"attention_mask of shape {tuple(attention_mask.shape)}")
    if unknown:
        raise _beyond(", ".join(unknown))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    output = attend(module, query, key, value, padding=attention_mask, causal=causal, scale=scaling, dropout=dropout)
    return output.transpose(1, 2).contiguous(), None


def _transformers_padding(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    q_offset: Any = 0,
    kv_offset: int = 0,
    **others: Any,
) -> Tensor | None:
    """What transformers calls a mask function, called once in a forward pass: here the real keys, `[batch, keys]`.

    None where no real query can see padding. That is so without any padding, and where causal queries, as many as keys,
    are padded on the right: the padding lies in every real query's future.
    """
    from torch._subclasses.fake_tensor import FakeTensor
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    causal = mask_function is causal_mask_function
    if not causal and mask_function is not bidirectional_mask_function:
        raise _beyond("a mask of its own (a sliding window, blocks, or packed sequences)")
    if causal and q_offset + q_length != kv_offset + kv_length:
        raise _beyond("a cache longer than what it holds (a static cache)")
    if attention_mask is None:
        return None
    padding = attention_mask[:, -kv_length:]
    whole = causal and q_length == kv_length
    if isinstance(padding, FakeTensor):  # it has no values: as in training, which pads on the right
        return None if whole else padding
    matters = (padding[:, 1:] > padding[:, :-1]).any() if whole else ~padding.all()
    return padding if matters else None


def _beyond(what: str) -> GraftworkError:
    return GraftworkError(
        f"this model's attention uses {what}, and Graftwork's kernels know causal and full attention with padding only; "
        "build the model with one of transformers' own attention implementations"
    )
