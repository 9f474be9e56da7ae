"""What attention does otherwise on a CUDA device, as far as a CPU can show it: by case, and by what is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graftwork_flash
import graftwork_torch_attention
import graftwork_xformers
from graftwork import NoSettings
from graftwork.attention import kernels, plain_attention
from graftwork.attention.packing import pack
from graftwork.contracts import AttentionSite
from graftwork.contracts.device import standing_for
from graftwork.memory.tracking import Tracker

Eager, Sdpa = graftwork_torch_attention.attention_kernels()
(XFormers,), (Flash, Flash4) = graftwork_xformers.attention_kernels(), graftwork_flash.attention_kernels()
ROWS, HEADS, KV_HEADS, KEYS, HEAD_DIM = 5, 4, 2, 7, 16


def inputs(queries: int = KEYS) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k and v, and padding on the left, none in the first row and more in every further one."""
    torch.manual_seed(0)
    shapes = [(ROWS, heads, n, HEAD_DIM) for heads, n in ((HEADS, queries), (KV_HEADS, KEYS), (KV_HEADS, KEYS))]
    return [torch.randn(shape) for shape in shapes], torch.arange(KEYS) >= torch.arange(ROWS)[:, None]


@pytest.mark.parametrize("kernel", [Flash, Flash4, XFormers, Sdpa])
def test_a_single_query_among_padding_copies_no_cache(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys, which are a layer's cache, are neither repeated for every head nor packed, and no library is needed."""
    for plugin in (graftwork_flash, graftwork_xformers):
        monkeypatch.setattr(plugin, "pack", None)
    (q, k, v), real = inputs(1)
    options: Any = {"padding": real, "causal": False, "scale": 0.3, "dropout": 0.0}
    compute, seen = torch.nn.functional.scaled_dot_product_attention, []

    def watched(q: Any, k: Any, v: Any, **options: Any) -> Any:
        seen.append((k, v))
        return compute(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with standing_for("cuda"):
        output = kernel(NoSettings()).forward(q, k, v, **options)
    torch.testing.assert_close(output, plain_attention(q, k, v, **options))
    assert seen == [(k, v)]


@pytest.mark.parametrize("padded", [False, True])
def test_more_rows_than_a_grid_of_cuda_has_are_computed_in_parts(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MOST_ROWS", 2)
    rows: list[int] = []

    class Counted(Eager):  # type: ignore[misc, valid-type]
        def forward(self, q: Any, *others: Any, **options: Any) -> Any:
            rows.append(len(q))
            return super().forward(q, *others, **options)

    tensors, real = inputs()
    options: Any = {"padding": real if padded else None, "causal": True, "scale": 0.3, "dropout": 0.0}
    site = AttentionSite("site", HEAD_DIM, HEADS, KV_HEADS, causal=True, padding=padded)
    binding = kernels.Binding(site, [("eager", Counted(NoSettings()))])
    whole = binding(*tensors, **options)
    with standing_for("cuda"):
        torch.testing.assert_close(binding(*tensors, **options), whole)
    assert rows == [5, 2, 2, 1]


def test_a_rehearsal_of_cuda_sees_key_heads_repeated_where_they_will_be() -> None:
    """PyTorch groups heads on CUDA in its flash kernel alone, which takes no fp32; a CPU groups them always."""

    def repeated(dtype: torch.dtype, device: str) -> int:
        tensors, tracker = [tensor.to(dtype) for tensor in inputs()[0]], Tracker()
        with standing_for(device), tracker.following():
            Sdpa(NoSettings()).forward(*tensors, padding=None, causal=True, scale=1.0, dropout=0.0)
        return sum(
            each.shape == (ROWS, KV_HEADS, HEADS // KV_HEADS, KEYS, HEAD_DIM) for each in tracker.timeline.allocations
        )

    assert [repeated(torch.float32, "cpu"), repeated(torch.bfloat16, "cuda")] == [0, 0]
    assert repeated(torch.float32, "cuda") == 2


def test_where_sequences_lie_is_found_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device the host waits for it. A mask that was changed, and another one, are looked at again."""
    tensors, real = inputs()
    looked: list[int] = []
    nonzero = torch.Tensor.nonzero

    def watched(self: torch.Tensor) -> torch.Tensor:
        looked.append(1)
        return nonzero(self)

    monkeypatch.setattr(torch.Tensor, "nonzero", watched)
    first, second = (pack(*tensors, real, True).sequences for _ in range(2))
    assert first is second and len(looked) == 2
    real[0, 0] = False
    assert pack(*tensors, real, True).sequences.k_lengths[0] == KEYS - 1
    assert pack(*tensors, real.clone(), False).sequences.q_lengths == [KEYS] * ROWS
    assert len(looked) == 6
