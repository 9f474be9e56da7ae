"""The attention kernels of all plugins: what they compute, and what they say that they support."""

from __future__ import annotations

import sys
from importlib import metadata
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import graftwork_flash
import graftwork_torch_attention
import graftwork_xformers
from graftwork import NoSettings
from graftwork.attention import kernels
from graftwork.attention.packing import pack
from graftwork.contracts import AttentionCase, AttentionSite

PLUGINS = (graftwork_torch_attention, graftwork_flash, graftwork_xformers)
KERNELS = {kernel.name: kernel(NoSettings()) for plugin in PLUGINS for kernel in plugin.attention_kernels()}
LENGTHS = {"whole": (6, 6), "cached": (3, 7), "single": (1, 7)}
PADDINGS = ("none", "left", "right")


def inputs(
    lengths: str = "whole", padding: str = "none", heads: int = 4, kv_heads: int = 2, head_dim: int = 16, batch: int = 3
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """q, k and v that require gradients, and the padding: none in the first sequence, more in every further one."""
    torch.manual_seed(0)
    queries, keys = LENGTHS[lengths]
    shapes = [(batch, heads, queries, head_dim)] + [(batch, kv_heads, keys, head_dim)] * 2
    if padding == "none":
        return [torch.randn(shape, requires_grad=True) for shape in shapes], None
    real = torch.arange(keys) >= torch.arange(batch)[:, None] * 2
    return [torch.randn(shape, requires_grad=True) for shape in shapes], real if padding == "left" else real.flip(1)


def defined(padding: torch.Tensor | None, causal: bool, queries: int, keys: int, batch: int = 3) -> torch.Tensor:
    """`[batch, 1, queries, 1]`: the queries whose output is defined, being real (if causal) and seeing a key."""
    if padding is None:
        return torch.ones(batch, 1, queries, 1, dtype=torch.bool)
    if causal:
        return padding[:, None, keys - queries :, None]
    return padding.any(1)[:, None, None, None].expand(-1, 1, queries, 1)


def by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    """Attention as the contract words it: query by query, in float64; 0 for a query that sees nothing."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    rows = []
    for row in range(batch):
        for head in range(heads):
            own = head * kv_heads // heads
            for query in range(queries):
                last = keys - queries + query if causal else keys - 1
                seen = [key for key in range(last + 1) if padding is None or padding[row, key]]
                shares = (k[row, own, seen] @ q[row, head, query] * scale).softmax(0)
                rows.append(shares @ v[row, own, seen])
    return torch.stack(rows).view(batch, heads, queries, -1)


# Kernels of PyTorch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [16, 256])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_kernel_computes_what_the_contract_defines(
    name: str, lengths: str, padding: str, causal: bool, kv_heads: int, head_dim: int
) -> None:
    tensors, real = inputs(lengths, padding, kv_heads=kv_heads, head_dim=head_dim)
    where = defined(real, causal, *LENGTHS[lengths])
    expected = by_hand(*tensors, real, causal, 0.1)
    expected_gradients = torch.autograd.grad((expected * where).square().sum(), tensors)

    output = KERNELS[name].forward(*tensors, padding=real, causal=causal, scale=0.1, dropout=0.0)
    gradients = torch.autograd.grad((output * where).square().sum(), tensors)

    assert output.isfinite().all()
    torch.testing.assert_close(output.double() * where, expected * where, atol=1e-5, rtol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_in_bfloat16_a_kernel_stays_near_the_definition(name: str, padding: str) -> None:
    tensors, real = inputs(padding=padding)
    tensors = [tensor.detach().bfloat16() for tensor in tensors]
    output = KERNELS[name].forward(*tensors, padding=real, causal=True, scale=0.25, dropout=0.0)
    where = defined(real, True, *LENGTHS["whole"])
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(
        output.double() * where, by_hand(*tensors, real, True, 0.25) * where, atol=0.03, rtol=0.03
    )


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_dropout_takes_shares_away_and_keeps_their_mean(name: str) -> None:
    q, k = torch.zeros(1, 2, 500, 8), torch.zeros(1, 1, 20, 8)
    output = KERNELS[name].forward(q, k, torch.ones_like(k), padding=None, causal=False, scale=1.0, dropout=0.5)
    assert output.std() > 0.1
    assert output.mean() == pytest.approx(1.0, abs=0.05)


def test_a_batch_without_its_padding_is_attended_to_sequence_by_sequence() -> None:
    for lengths, padding, causal in product(LENGTHS, ("left", "right"), (False, True)):
        (q, k, v), real = inputs(lengths, padding)
        assert real is not None
        packed = pack(q, k, v, real, causal)
        output = packed.unpack(
            ragged(packed.q, packed.k, packed.v, packed.sequences.q_lengths, packed.sequences.k_lengths, causal, 0.3)
        )
        where = defined(real, causal, *LENGTHS[lengths])
        torch.testing.assert_close(output * where, by_hand(q, k, v, real, causal, 0.3).float() * where)


def test_a_sequence_of_nothing_but_padding_gives_finite_numbers() -> None:
    tensors, _ = inputs()
    real = torch.ones(3, 6, dtype=torch.bool)
    real[1] = False
    for name in ("eager", "sdpa"):
        for causal in (False, True):
            output = KERNELS[name].forward(*tensors, padding=real, causal=causal, scale=1.0, dropout=0.0)
            assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), tensors))
    assert pack(*tensors, real, True).sequences.k_lengths == [6, 6, 6]


# Kernels of other libraries -------------------------------------------------------------------------------------------


def ragged(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_lengths: Any, k_lengths: Any, causal: bool, scale: float
) -> torch.Tensor:
    """What kernels for sequences of different lengths compute, on `[tokens, heads, head_dim]`."""
    sides = [tensor.split([int(n) for n in n]) for tensor, n in ((q, q_lengths), (k, k_lengths), (v, k_lengths))]
    outputs = []
    for sequence in zip(*sides, strict=True):
        if not len(sequence[0]):
            continue
        tensors = [tensor[None].transpose(1, 2) for tensor in sequence]
        outputs.append(by_hand(*tensors, None, causal, scale).float()[0].transpose(0, 1))
    return torch.cat(outputs)


def install_flash(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """A stand-in for FlashAttention, with the two functions as the library documents them."""

    def flash_attn_func(q: Any, k: Any, v: Any, *, softmax_scale: float, causal: bool) -> Any:
        output = by_hand(*(tensor.transpose(1, 2) for tensor in (q, k, v)), None, causal, softmax_scale)
        return output.float().transpose(1, 2)

    def flash_attn_varlen_func(
        q: Any,
        k: Any,
        v: Any,
        *,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int,
        max_seqlen_k: int,
        **rest: Any,
    ) -> Any:
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        q_lengths, k_lengths = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        assert (max_seqlen_q, max_seqlen_k) == (q_lengths.max(), k_lengths.max())
        output = ragged(q, k, v, q_lengths, k_lengths, rest["causal"], rest["softmax_scale"])
        return (output, "the normalisers") if module.endswith("cute") else output

    for name in ("flash_attn", module):
        library: Any = ModuleType(name)
        library.flash_attn_func, library.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, name, library)


def install_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for xFormers, with the one function and the three biases as the library documents them."""

    class Block:
        causal = False

        @classmethod
        def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int], *, device: torch.device) -> Block:
            block = cls()
            block.lengths = q_seqlen, kv_seqlen
            return block

    class CausalBlock(Block):
        causal = True

    class Triangle:
        causal = True

    def memory_efficient_attention(q: Any, k: Any, v: Any, attn_bias: Any, p: float, scale: float) -> Any:
        assert q.shape[2] == k.shape[2] == v.shape[2]
        causal = attn_bias is not None and attn_bias.causal
        lengths = getattr(attn_bias, "lengths", ([q.shape[1]] * len(q), [k.shape[1]] * len(k)))
        flat = [tensor.flatten(0, 1) for tensor in (q, k, v)]
        return ragged(*flat, *lengths, causal, scale).view(*q.shape[:2], q.shape[2], -1)

    biases = SimpleNamespace(
        BlockDiagonalMask=Block,
        BlockDiagonalCausalFromBottomRightMask=CausalBlock,
        LowerTriangularFromBottomRightMask=Triangle,
    )
    ops: Any = ModuleType("xformers.ops")
    ops.fmha = SimpleNamespace(attn_bias=biases, memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ["flash", "flash-4", "xformers"])
def test_a_library_is_called_in_its_own_layout(
    name: str, lengths: str, padding: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_flash(monkeypatch, "flash_attn.cute" if name == "flash-4" else "flash_attn")
    install_xformers(monkeypatch)
    tensors, real = inputs(lengths, padding)
    output = KERNELS[name].forward(*tensors, padding=real, causal=causal, scale=0.2, dropout=0.0)
    where = defined(real, causal, *LENGTHS[lengths])
    assert output.isfinite().all()
    torch.testing.assert_close(output * where, by_hand(*tensors, real, causal, 0.2).float() * where)


def test_a_library_that_another_one_hides_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").touch()
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("import sys\nsys.no_such_thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    tensors, _ = inputs()
    with pytest.raises(ImportError, match=r"has no attribute 'no_such_thing'.*install flash-attn-4 last"):
        KERNELS["flash-4"].forward(*tensors, padding=None, causal=True, scale=0.2, dropout=0.0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # flash-attn-4 warns when it is imported
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("name", ["eager", "sdpa", "flash", "flash-4", "xformers"])
def test_on_a_gpu_a_kernel_computes_what_the_contract_defines(name: str, head_dim: int) -> None:
    device = torch.device("cuda")
    site = AttentionSite("language", head_dim, heads=4, kv_heads=2, causal=True, padding=True)
    support = KERNELS[name].supports(kernels.case_of(site, torch.bfloat16, device, backward=True))
    if not support:
        pytest.skip(support.reason)
    for lengths, padding, causal in product(LENGTHS, PADDINGS, (False, True)):
        made, real = inputs(lengths, padding, head_dim=head_dim)
        tensors = [tensor.detach().bfloat16().requires_grad_() for tensor in made]
        moved = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
        where = defined(real, causal, *LENGTHS[lengths])
        expected = by_hand(*tensors, real, causal, 0.1) * where
        real = None if real is None else real.to(device)
        output = KERNELS[name].forward(*moved, padding=real, causal=causal, scale=0.1, dropout=0.0)
        assert output.isfinite().all()
        torch.testing.assert_close(output.cpu().double() * where, expected, atol=0.03, rtol=0.03)
        gradients = torch.autograd.grad((output * where.to(device)).sum(), moved)
        for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sum(), tensors), strict=True):
            torch.testing.assert_close(gradient.cpu(), wanted, atol=0.05, rtol=0.05)


# What they support ----------------------------------------------------------------------------------------------------


def case(
    dtype: str = "bfloat16", capability: tuple[int, int] | None = (9, 0), backward: bool = True, **site: Any
) -> Any:
    facts = {"head_dim": 64, "heads": 8, "kv_heads": 1, "causal": True, "padding": True, **site}
    return AttentionCase(
        AttentionSite("language", **facts), dtype, "cuda" if capability else "cpu", capability, backward
    )


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The distributions that seem to be installed; a test changes them."""
    installed = {"flash-attn": "2.8.3", "flash-attn-4": "4.0.0b36", "xformers": "0.0.35", "torch": "2.13.0+cu130"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy", "torch>=2.10"] if name == "xformers" else [])
    return installed


@pytest.mark.parametrize(
    ("name", "asked", "reason"),
    [
        ("flash", {}, ""),
        ("flash", {"dtype": "float16", "capability": (8, 6), "head_dim": 256}, ""),
        ("flash", {"capability": None}, "the tensors are on the cpu, and it needs a CUDA device"),
        ("flash", {"capability": (7, 5)}, "the compute capability is 7.5, and it needs 8.0"),
        ("flash", {"dtype": "float32"}, "the tensors are float32, and it needs float16 or bfloat16"),
        ("flash", {"head_dim": 512}, "head_dim is 512, at most 256 works"),
        ("flash", {"head_dim": 256, "dropout": 0.1}, ""),
        ("flash", {"head_dim": 256, "dropout": 0.1, "capability": (8, 9), "backward": False}, ""),
        (
            "flash",
            {"head_dim": 256, "dropout": 0.1, "capability": (8, 9)},
            "head_dim is 256, and above 192 only A100 and H100 train with dropout",
        ),
        ("flash-4", {"head_dim": 256}, ""),
        ("flash-4", {"head_dim": 256, "capability": (10, 0)}, ""),
        (
            "flash-4",
            {"head_dim": 192, "capability": (10, 0)},
            "head_dim is 192, which it lacks for compute capability 10.x",
        ),
        (
            "flash-4",
            {"head_dim": 256, "capability": (12, 0)},
            "head_dim is 256, which it lacks for compute capability 12.x",
        ),
        ("flash-4", {"head_dim": 512}, "head_dim is 512, which it lacks for compute capability 9.x"),
        ("flash-4", {"head_dim": 36}, "head_dim is 36, and must be a multiple of 8"),
        ("flash-4", {"capability": (8, 9)}, "the compute capability is 8.9, and it needs 9.0"),
        ("flash-4", {"dtype": "float32"}, "the tensors are float32, and it needs float16 or bfloat16"),
        ("flash-4", {"dropout": 0.1}, "it has no dropout"),
        ("xformers", {"head_dim": 256}, ""),
        ("xformers", {"head_dim": 512, "dtype": "float32"}, ""),
        ("xformers", {"dtype": "float16", "capability": (7, 5)}, ""),
        ("xformers", {"capability": None}, "the tensors are on the cpu, and it needs a CUDA device"),
        ("xformers", {"capability": (7, 5)}, "the tensors are bfloat16, which needs compute capability 8.0"),
        ("xformers", {"dtype": "float64"}, "the tensors are float64, and it needs float32, float16 or bfloat16"),
        ("xformers", {"head_dim": 36}, "head_dim is 36, and in bfloat16 it must be a multiple of 8"),
        ("xformers", {"head_dim": 256, "capability": (12, 0)}, ""),
        (
            "xformers",
            {"head_dim": 512, "capability": (12, 0)},
            "above compute capability 9.0 it takes 16-bit tensors with a head_dim up to 256 only",
        ),
        (
            "xformers",
            {"head_dim": 256, "dropout": 0.1, "capability": (8, 6)},
            "head_dim is 256, and above 224 only A100 and H100 train with dropout",
        ),
    ],
)
def test_a_kernel_says_what_it_supports_and_why_not(
    name: str, asked: dict[str, Any], reason: str, versions: dict[str, str]
) -> None:
    support = KERNELS[name].supports(case(**asked))
    assert (support.ok, support.reason) == (not reason, reason)


def test_fused_kernels_are_tried_before_the_plain_ones() -> None:
    in_order = sorted(KERNELS.values(), key=lambda kernel: -kernel.preference)
    assert [kernel.name for kernel in in_order] == ["flash", "flash-4", "xformers", "sdpa", "eager"]


def test_a_kernel_without_its_package_or_with_an_old_one_says_so(versions: dict[str, str]) -> None:
    versions.update({"flash-attn": "2.6.3", "xformers": "0.0.29"})
    assert KERNELS["flash"].supports(case()).reason == "flash-attn 2.6.3 is installed, and it needs flash-attn>=2.7"
    assert KERNELS["xformers"].supports(case()).reason == "xformers 0.0.29 is installed, and it needs xformers>=0.0.30"
    versions.clear()
    for name, package in {"flash": "flash-attn", "flash-4": "flash-attn-4", "xformers": "xformers"}.items():
        assert KERNELS[name].supports(case()).reason == f"{package} is not installed"


def test_an_xformers_for_another_torch_says_so(versions: dict[str, str]) -> None:
    versions["torch"] = "2.9.1"
    reason = "xformers 0.0.35 needs torch>=2.10, and torch 2.9.1 is installed"
    assert KERNELS["xformers"].supports(case()).reason == reason
