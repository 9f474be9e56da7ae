"""A kernel that computes attention by its definition and records every case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graftwork.attention.definition import plain_attention
from graftwork.contracts.anatomy import AttentionCase, AttentionSite
from graftwork.contracts.component import SUPPORTED, NoSettings, Support
from graftwork.contracts.kinds import AttentionKernel

if TYPE_CHECKING:
    from torch import Tensor


def recorder() -> tuple[type[AttentionKernel[NoSettings]], list[AttentionCase]]:
    """The kernel, and the list of its cases, which grows with every call."""
    cases: list[AttentionCase] = []

    class Recorder(AttentionKernel[NoSettings]):
        """Attention by its definition, with a record of every case"""

        name = "conformance-recorder"
        computes = frozenset({"window", "softcap", "mask", "segments"})

        def supports(self, case: AttentionCase) -> Support:
            cases.append(case)
            return SUPPORTED

        def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            return plain_attention(q, k, v, **options)

    return Recorder, cases


def misfit(computed: AttentionSite, declared: Sequence[AttentionSite]) -> str:
    """Why attention that was computed is none of the declared sites, as a clause; empty when it is one."""
    for site in declared:
        shape = (computed.head_dim, computed.heads, computed.kv_heads) == (site.head_dim, site.heads, site.kv_heads)
        if (
            shape
            and computed.causal <= site.causal
            and computed.padding <= site.padding
            and computed.dropout <= site.dropout
            and (computed.window, computed.softcap) == (site.window, site.softcap)
            and computed.mask <= site.mask
            and computed.segments <= site.segments
        ):
            return ""
    return f"{_described(computed)} is computed, and declared is {' or '.join(map(_described, declared))}"


def _described(site: AttentionSite) -> str:
    words = [f"{site.heads} heads over {site.kv_heads} of head_dim {site.head_dim}"]
    words += ["causal"] * site.causal + ["padding"] * site.padding + [f"dropout {site.dropout}"] * bool(site.dropout)
    words += [
        f"{name} {value}" for name, value in (("window", site.window), ("softcap", site.softcap)) if value is not None
    ]
    words += ["a mask of its own"] * site.mask + ["packed records"] * site.segments
    return ", ".join(words)
