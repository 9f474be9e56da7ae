"""The attention kernel `xformers`: memory-efficient attention (arXiv:2112.05682) of the xFormers library.

Limits: `xformers/ops/fmha` of xFormers 0.0.35, whose flash operators take 16-bit tensors on capability 8.0 and later, and
whose CUTLASS operators take fp32, older devices and a head_dim above 256, up to capability 9.0.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

from graftwork import SUPPORTED, NoSettings, Requires, Support, hookimpl, unsupported
from graftwork.attention import one_query_attention, pack, unmet_requirement
from graftwork.contracts import AttentionCase, AttentionKernel

if TYPE_CHECKING:
    from torch import Tensor


class XFormers(AttentionKernel[NoSettings]):
    """xFormers' memory-efficient attention: fp32 and older GPUs too, and any head_dim up to Hopper"""

    name = "xformers"
    preference = 20
    computes = frozenset({"segments"})
    requires = Requires(("xformers>=0.0.30",), cuda=(6, 0))

    def supports(self, case: AttentionCase) -> Support:
        """What one of the library's operators takes, forward and backward."""
        head_dim, capability = case.site.head_dim, case.capability or (0, 0)
        if reason := unmet_requirement(self.requires, case) or _other_torch():
            return unsupported(reason)
        if case.dtype not in ("float32", "float16", "bfloat16"):
            return unsupported(f"the tensors are {case.dtype}, and it needs float32, float16 or bfloat16")
        if case.dtype == "bfloat16" and capability < (8, 0):
            return unsupported("the tensors are bfloat16, which needs compute capability 8.0")
        halves = case.dtype != "float32"
        if head_dim % (multiple := 8 if halves else 4):
            return unsupported(f"head_dim is {head_dim}, and in {case.dtype} it must be a multiple of {multiple}")
        if capability > (9, 0) and not (halves and head_dim <= 256):
            return unsupported("above compute capability 9.0 it takes 16-bit tensors with a head_dim up to 256 only")
        flash = halves and head_dim <= 256 and capability >= (8, 0)
        if flash and head_dim > 224 and case.site.dropout and case.backward and capability not in ((8, 0), (9, 0)):
            return unsupported(f"head_dim is {head_dim}, and above 224 only A100 and H100 train with dropout")
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
        segments: Tensor | None = None,
    ) -> Tensor:
        """One call of memory_efficient_attention; with padding or segments on a packed batch with a block-diagonal mask. A single query among
        padding is PyTorch's."""
        if q.shape[2] == 1 and padding is not None:
            return one_query_attention(q, k, v, padding[:, None, None], scale, dropout)
        from xformers.ops import fmha

        group = q.shape[1] // k.shape[1]
        if group > 1:  # the library groups heads only without gradients
            k, v = (tensor[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for tensor in (k, v))
        if padding is None and segments is None:
            bias = fmha.attn_bias.LowerTriangularFromBottomRightMask() if causal else None
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            output: Tensor = fmha.memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=scale)
            return output.transpose(1, 2)
        packed = pack(q, k, v, padding, causal, segments)
        blocks = fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask if causal else fmha.attn_bias.BlockDiagonalMask
        bias = blocks.from_seqlens(packed.sequences.q_lengths, packed.sequences.k_lengths, device=q.device)
        q, k, v = packed.q[None], packed.k[None], packed.v[None]
        return packed.unpack(fmha.memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=scale)[0])


def _other_torch() -> str:
    """That the installed xFormers was built for another torch, by its metadata; empty when it fits."""
    from packaging.requirements import Requirement

    torch = metadata.version("torch")
    for requirement in map(Requirement, metadata.requires("xformers") or ()):
        if requirement.name == "torch" and not requirement.specifier.contains(torch, prereleases=True):
            return f"xformers {metadata.version('xformers')} needs {requirement}, and torch {torch} is installed"
    return ""


@hookimpl
def attention_kernels() -> list[type[AttentionKernel[Any]]]:
    """The kernel of this plugin."""
    return [XFormers]
