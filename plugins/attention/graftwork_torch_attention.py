"""Attention by PyTorch alone: `eager`, the plain definition, and `sdpa`, PyTorch's fused kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftwork import SUPPORTED, NoSettings, Support, hookimpl
from graftwork.attention import one_query_attention, plain_attention, seeing_something, visible_keys
from graftwork.contracts import AttentionCase, AttentionKernel, device_type

if TYPE_CHECKING:
    from torch import Tensor


class Eager(AttentionKernel[NoSettings]):
    """The plain definition with a softmax in fp32: runs everywhere, keeps every score in memory"""

    name = "eager"
    computes = frozenset({"window", "softcap", "mask", "segments"})

    def supports(self, case: AttentionCase) -> Support:
        """Every case."""
        return SUPPORTED

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """See `graftwork.attention.plain_attention`."""
        return plain_attention(q, k, v, **options)


class Sdpa(AttentionKernel[NoSettings]):
    """PyTorch's scaled_dot_product_attention: fused kernels on CPU and GPU, and a fallback for every case"""

    name = "sdpa"
    preference = 10
    computes = frozenset({"window", "mask", "segments"})

    def supports(self, case: AttentionCase) -> Support:
        """Every case: where no fused kernel fits (dropout on a CPU), PyTorch composes plain operations."""
        return SUPPORTED

    def forward(
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
        mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """One call of scaled_dot_product_attention, with a mask only where there is one, padding, a window or a cache."""
        from torch.nn import functional

        plain = padding is None and mask is None
        whole = causal and q.shape[2] == k.shape[2] and window is None and segments is None
        seen = None if plain and whole else visible_keys(q, k, padding, causal, window, mask, segments)
        if q.shape[2] == 1:
            return one_query_attention(q, k, v, seen, scale, dropout)
        if seen is not None and not plain:
            seen = seeing_something(seen)
        if q.shape[1] != k.shape[1] and device_type(q.device) == "cuda" and not _groups_heads(q, seen):
            group = q.shape[1] // k.shape[1]
            k, v = (tensor[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for tensor in (k, v))
        return functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=seen,
            dropout_p=dropout,
            is_causal=whole and seen is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )


def _groups_heads(q: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused CUDA kernel takes fewer key heads than heads: the flash kernel alone does.

    With `enable_gqa` in any other case PyTorch silently composes plain operations, which keep every score in memory
    (huggingface/transformers#46960, pytorch/pytorch#139586).
    """
    return mask is None and q.element_size() == 2 and q.shape[-1] <= 256


@hookimpl
def attention_kernels() -> list[type[AttentionKernel[Any]]]:
    """The kernels of this plugin."""
    return [Eager, Sdpa]
