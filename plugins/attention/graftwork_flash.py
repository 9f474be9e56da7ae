"""FlashAttention on NVIDIA GPUs: `flash` is version 2 (arXiv:2307.08691), `flash-4` is version 4 for Hopper and Blackwell.

They are two distributions, `flash-attn` and `flash-attn-4`, with different limits; either or both may be installed.
Limits: README of flash-attn 2.8, and `flash_attn/cute/interface.py` of flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from graftwork import SUPPORTED, NoSettings, Requires, Support, hookimpl, unsupported
from graftwork.attention import one_query_attention, pack, unmet_requirement
from graftwork.contracts import AttentionCase, AttentionKernel

if TYPE_CHECKING:
    from torch import Tensor


class FlashKernel(AttentionKernel[NoSettings]):
    """What both versions share: 16-bit tensors, `[batch, tokens, heads, head_dim]`, and sequences without padding."""

    computes = frozenset({"segments"})

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
        segments: Tensor | None = None,
    ) -> Tensor:
        """The dense function, or with padding or segments the one for sequences of different lengths, on a packed batch; a single query among
        padding is PyTorch's."""
        import torch

        if q.shape[2] == 1 and padding is not None:
            return one_query_attention(q, k, v, padding[:, None, None], scale, dropout)
        options: dict[str, Any] = {"softmax_scale": scale, "causal": causal}
        if dropout:
            options["dropout_p"] = dropout  # version 4 does not know the name
        try:
            dense, ragged = self.functions()
        except AttributeError as error:
            # flash-attn has an old `flash_attn.cute` of its own, which hides that of flash-attn-4.
            raise ImportError(
                f"what is installed as flash_attn does not load ({error}); where flash-attn and flash-attn-4 are both wanted, install "
                "flash-attn-4 last"
            ) from error
        if padding is None and segments is None:
            return _first(dense(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)).transpose(1, 2)
        packed = pack(q, k, v, padding, causal, segments)
        for side, lengths in {"q": packed.sequences.q_lengths, "k": packed.sequences.k_lengths}.items():
            options[f"cu_seqlens_{side}"] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q.device)
            options[f"max_seqlen_{side}"] = max(lengths)
        return packed.unpack(_first(ragged(packed.q, packed.k, packed.v, **options)))

    @abstractmethod
    def functions(self) -> tuple[Any, Any]:
        """The library's functions for batches without and with different lengths."""


class Flash(FlashKernel):
    """FlashAttention 2: 16-bit tensors on Ampere GPUs and later, head_dim up to 256"""

    name = "flash"
    preference = 40
    requires = Requires(("flash-attn>=2.7",), cuda=(8, 0), install="--no-build-isolation 'flash-attn>=2.7'")

    def supports(self, case: AttentionCase) -> Support:
        """fp16 and bf16 up to head_dim 256, but above 192 no dropout in training except on A100 and H100."""
        head_dim = case.site.head_dim
        if reason := unmet_requirement(self.requires, case) or _wrong_dtype(case):
            return unsupported(reason)
        if head_dim > 256:
            return unsupported(f"head_dim is {head_dim}, at most 256 works")
        if head_dim > 192 and case.site.dropout and case.backward and case.capability not in ((8, 0), (9, 0)):
            return unsupported(f"head_dim is {head_dim}, and above 192 only A100 and H100 train with dropout")
        return SUPPORTED

    def functions(self) -> tuple[Any, Any]:
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        return flash_attn_func, flash_attn_varlen_func


class Flash4(FlashKernel):
    """FlashAttention 4: 16-bit tensors on Hopper and Blackwell GPUs, no dropout"""

    name = "flash-4"
    preference = 30  # below version 2 as long as it is a pre-release
    requires = Requires(("flash-attn-4>=4.0.0b36",), cuda=(9, 0))

    def supports(self, case: AttentionCase) -> Support:
        """fp16 and bf16 without dropout; head_dim in eights up to 256 on Hopper, up to 128 or just 256 on Blackwell."""
        head_dim = case.site.head_dim
        if reason := unmet_requirement(self.requires, case) or _wrong_dtype(case):
            return unsupported(reason)
        if case.site.dropout:
            return unsupported("it has no dropout")
        if head_dim % 8:
            return unsupported(f"head_dim is {head_dim}, and must be a multiple of 8")
        generation = case.capability[0] if case.capability else 0
        if head_dim <= 128 or (generation == 9 and head_dim <= 256) or (generation in (10, 11) and head_dim == 256):
            return SUPPORTED
        return unsupported(f"head_dim is {head_dim}, which it lacks for compute capability {generation}.x")

    def functions(self) -> tuple[Any, Any]:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        return flash_attn_func, flash_attn_varlen_func


def _wrong_dtype(case: AttentionCase) -> str:
    if case.dtype in ("float16", "bfloat16"):
        return ""
    return f"the tensors are {case.dtype}, and it needs float16 or bfloat16"


def _first(result: Any) -> Tensor:
    """The output alone: version 4 returns the softmax's normalisers as well."""
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


@hookimpl
def attention_kernels() -> list[type[AttentionKernel[Any]]]:
    """The kernels of this plugin."""
    return [Flash, Flash4]
