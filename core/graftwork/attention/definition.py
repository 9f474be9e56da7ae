"""Attention: its plain definition, by which every kernel is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


BOUND = "graftwork_attention"
"""The attribute of a module that holds its binding; neither parameter, buffer nor child, so `state_dict` is unaffected."""


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
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Attention by the kernels that `module` is bound to; by the plain definition where it is not bound.

    Shapes, `padding`, `mask` and `segments` are those of `AttentionKernel.forward`, `window` and `softcap` those of `AttentionSite`; `scale` is
    head_dim ** -0.5 unless given. Under autocast all three tensors get autocast's dtype, otherwise that of `v` (rotary
    embeddings can leave q and k wider). Where a causal query is itself padding, the output is finite and otherwise unspecified.
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
        **limits(window, softcap, mask, segments),
    )


def limits(window: int | None, softcap: float | None, mask: Tensor | None, segments: Tensor | None) -> dict[str, Any]:
    """The further arguments of a kernel at a site that has these: those that are set, as not every kernel takes each."""
    named = {"window": window, "softcap": softcap, "mask": mask, "segments": segments}
    return {name: value for name, value in named.items() if value is not None}


def plain_attention(
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
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    visible = visible_keys(q, k, padding, causal, window, mask, segments)
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = functional.dropout(scores.softmax(-1).to(v.dtype), dropout)
    return (weights.view(batch, kv_heads, -1, keys) @ v).view(batch, heads, queries, -1)


def visible_keys(
    q: Tensor,
    k: Tensor,
    padding: Tensor | None,
    causal: bool,
    window: int | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor | None:
    """Which keys each query sees, bool, broadcastable to `[batch, heads, queries, keys]`; None when all see all."""
    import torch

    visible = None if padding is None else padding[:, None, None, :]
    queries, keys = q.shape[2], k.shape[2]
    if causal and queries > 1:
        triangle = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        visible = triangle if visible is None else visible & triangle
    if window is not None and window < keys:
        places = torch.arange(keys, device=q.device)
        near = (places[keys - queries :, None] - places).abs() < window
        visible = near if visible is None else visible & near
    own = None if segments is None else segments[:, None, -queries:, None] == segments[:, None, None, :]
    for each in (mask, own):
        if each is not None:
            visible = each if visible is None else visible & each
    return visible


def seeing_something(seen: Tensor) -> Tensor:
    """Which keys are seen, `[..., keys]`, but all where none is: attention to no key has no result, and PyTorch's can be NaN
    (pytorch/pytorch#110213)."""
    return seen | ~seen.any(-1, keepdim=True)


def one_query_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, dropout: float) -> Tensor:
    """Attention of a single query, as in decoding, by PyTorch's scaled_dot_product_attention; `seen` is as `visible_keys` gives it.

    The heads that share a key head become its queries. So the cache is read once, and neither repeated for every head nor copied without its
    padding, as it would be anew for each token and layer.
    """
    from torch.nn import functional

    batch, kv_heads = k.shape[:2]
    seen = None if seen is None else seeing_something(seen)
    stacked = q.reshape(batch, kv_heads, -1, q.shape[-1])
    output = functional.scaled_dot_product_attention(stacked, k, v, attn_mask=seen, dropout_p=dropout, scale=scale)
    return output.reshape(batch, -1, 1, v.shape[-1])
