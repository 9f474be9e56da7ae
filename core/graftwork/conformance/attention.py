"""What every attention kernel must compute, compared with the plain definition on this machine's device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from graftwork.attention.definition import limits
from graftwork.conformance.outcome import Check, Skipped, Subject
from graftwork.conformance.specimens import distance
from graftwork.contracts.anatomy import AttentionCase, AttentionSite
from graftwork.contracts.component import Support
from graftwork.contracts.kinds import AttentionKernel

if TYPE_CHECKING:
    from torch import Tensor

BATCH, SCALE = 3, 0.3
LENGTHS = {"as many queries as keys": (6, 6), "a cache": (3, 7), "one query": (1, 7)}
PADDINGS = ("no", "left", "right")
DTYPES = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""Dtype to how far its rounding may move a result, relative to the largest."""


@dataclass(frozen=True)
class Trial:
    """A case with the shapes to try it on."""

    case: AttentionCase
    lengths: str = "as many queries as keys"
    padding: str = "no"

    def __str__(self) -> str:
        site = self.case.site
        return (
            f"{site.heads} heads over {site.kv_heads}, head_dim {site.head_dim}, {self.case.dtype} on {self.case.device}, "
            f"{self.lengths}, {self.padding} padding{', causal' * site.causal}{f', dropout {site.dropout}' * (site.dropout > 0)}"
            f"{f', window {site.window}' * (site.window is not None)}{f', softcap {site.softcap}' * (site.softcap is not None)}{', masked' * site.mask}{', packed' * site.segments}"
        )


def trial(
    dtype: str,
    device: tuple[str, tuple[int, int] | None],
    *,
    kv_heads: int = 2,
    head_dim: int = 64,
    causal: bool = True,
    padding: str = "left",
    lengths: str = "as many queries as keys",
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    mask: bool = False,
    segments: bool = False,
) -> Trial:
    """A trial with four heads."""
    site = AttentionSite(
        "site", head_dim, 4, kv_heads, causal, padding != "no", dropout, window, softcap, mask, segments
    )
    return Trial(AttentionCase(site, dtype, *device), lengths, padding)


def device_here() -> tuple[str, tuple[int, int] | None]:
    """The device to compute on, and its compute capability."""
    import torch

    return ("cuda", torch.cuda.get_device_capability()) if torch.cuda.is_available() else ("cpu", None)


def trials(kernel: AttentionKernel[Any]) -> list[Trial]:
    """Every trial that the kernel says it supports here; Skipped with its reason when there is none.

    A kernel that computes no gradients is checked on the output alone.
    """
    device = device_here()
    expected = [
        trial(dtype, device, kv_heads=kv_heads, causal=causal, padding=padding, lengths=lengths)
        for dtype, kv_heads, causal, padding, lengths in product(DTYPES, (4, 2, 1), (False, True), PADDINGS, LENGTHS)
    ]
    expected += [trial(dtype, device, head_dim=head_dim) for dtype, head_dim in product(DTYPES, (16, 40, 128, 256))]
    further: list[dict[str, Any]] = [{"window": 3}, {"softcap": 0.5}, {"mask": True}]
    expected += [
        trial(dtype, device, causal=causal, lengths=lengths, **each)
        for each in further
        if kernel.computes.issuperset(each)
        for dtype, causal, lengths in product(DTYPES, (False, True), LENGTHS)
    ]
    if "segments" in kernel.computes:
        expected += [
            trial(dtype, device, causal=causal, padding=padding, segments=True)
            for dtype, causal, padding in product(DTYPES, (False, True), ("left", "right"))
        ]
    forward_only = [replace(each, case=replace(each.case, backward=False)) for each in expected]
    found = [each for each in expected if kernel.supports(each.case)]
    found = found or [each for each in forward_only if kernel.supports(each.case)]
    if not found:
        raise Skipped(f"it computes nothing here: {kernel.supports(expected[0].case).reason}")
    return found


def inputs(of: Trial) -> tuple[list[Tensor], Tensor | None]:
    """q, k and v, and the padding: none in the first sequence, more in every further one."""
    import torch

    site = of.case.site
    queries, keys = LENGTHS[of.lengths]
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, heads, n, site.head_dim) for heads, n in ((site.heads, queries), *[(site.kv_heads, keys)] * 2)]
    dtype = getattr(torch, of.case.dtype)
    tensors = [torch.randn(shape, generator=generator).to(of.case.device, dtype).requires_grad_() for shape in shapes]
    if of.padding == "no":
        return tensors, None
    real = torch.arange(keys) >= torch.arange(BATCH)[:, None] * 2
    return tensors, (real if of.padding == "left" else real.flip(1)).to(of.case.device)


def mask_of(of: Trial) -> Tensor:
    """A mask that lets every query see its own key and every third one, `[batch, 1, queries, keys]`; the first sequence sees all."""
    import torch

    queries, keys = LENGTHS[of.lengths]
    places, sequences = torch.arange(keys), torch.arange(BATCH)[:, None, None, None]
    own = places[-queries:, None] == places
    return (own | ((places + sequences) % 3 == 0) | (sequences == 0)).to(of.case.device)


def segments_of(padding: Tensor) -> Tensor:
    """Two records a row, the first of two tokens or what is real."""
    numbers: Tensor = (padding.cumsum(-1) > 2) + 1
    return numbers * padding


def defined(of: Trial, padding: Tensor | None) -> Tensor | float:
    """1 at the queries whose output is defined, being real themselves if attention is causal, has a window, a mask or segments; 0 elsewhere."""
    site = of.case.site
    if padding is None or not (site.causal or site.window is not None or site.mask or site.segments):
        return 1.0
    return padding[:, None, -LENGTHS[of.lengths][0] :, None].float()


def run(compute: Any, of: Trial, tensors: list[Tensor], padding: Tensor | None) -> Tensor:
    """What a kernel, or the definition, computes in a trial."""
    site = of.case.site
    mask, segments = (
        mask_of(of) if site.mask else None,
        segments_of(padding) if site.segments and padding is not None else None,
    )
    further = limits(site.window, site.softcap, mask, segments)
    padding = None if site.segments else padding
    output: Tensor = compute(
        *tensors, padding=padding, causal=site.causal, scale=SCALE, dropout=site.dropout, **further
    )
    return output


def it_computes_attention(subject: Subject) -> Iterator[str]:
    """The output is the definition's, in the dtype of the inputs, wherever it is defined; and finite everywhere."""
    import torch

    from graftwork.attention.definition import plain_attention

    kernel = subject.ready()
    for each in trials(kernel):
        tensors, padding = inputs(each)
        where = defined(each, padding)
        with torch.no_grad():
            output = run(kernel.forward, each, tensors, padding)
            expected = run(plain_attention, each, [tensor.float() for tensor in tensors], padding)
        if output.dtype != tensors[2].dtype or output.shape != expected.shape:
            yield f"the output must be as 'q', and it is {tuple(output.shape)} in {output.dtype} in this case: {each}; fix 'forward'"
            return
        error, largest = distance(output * where, expected * where), float((expected * where).abs().max())
        if not output.isfinite().all() or error > DTYPES[each.case.dtype] * max(1.0, largest):
            yield f"the kernel must compute attention, and it is {error:.3g} away in this case: {each}; fix it, or refuse the case in 'supports'"


def its_gradients_are_right(subject: Subject) -> Iterator[str]:
    """The gradients of q, k and v are the definition's."""
    import torch

    from graftwork.attention.definition import plain_attention

    kernel = subject.ready()
    for each in trials(kernel):
        if not each.case.backward:
            raise Skipped("it says that it computes no gradients")
        tensors, padding = inputs(each)
        where = defined(each, padding)
        exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
        found = torch.autograd.grad(
            (run(kernel.forward, each, tensors, padding).float() * where).square().sum(), tensors
        )
        expected = torch.autograd.grad((run(plain_attention, each, exact, padding) * where).square().sum(), exact)
        for name, gradient, right in zip("qkv", found, expected, strict=True):
            if distance(gradient, right) > 5 * DTYPES[each.case.dtype] * max(1.0, float(right.abs().max())):
                yield f"the gradient of '{name}' must be attention's, and it is {distance(gradient, right):.3g} away in this case: {each}; fix it"


def a_sequence_of_padding_gives_finite_numbers(subject: Subject) -> Iterator[str]:
    """Forward and backward."""
    import torch

    kernel = subject.ready()
    for each in [each for each in trials(kernel) if each.padding != "no" and each.lengths != "one query"]:
        tensors, padding = inputs(each)
        assert padding is not None
        padding[1] = False
        output = run(kernel.forward, each, tensors, padding)
        computed = [output, *(torch.autograd.grad(output.float().sum(), tensors) if each.case.backward else ())]
        if not all(tensor.isfinite().all() for tensor in computed):
            yield f"a query that sees no key must give finite numbers, and here some are not: {each}; let it see something"


def dropout_keeps_the_mean(subject: Subject) -> Iterator[str]:
    """Where dropout is supported it does something, and what remains is scaled up."""
    import torch

    kernel, device = subject.ready(), device_here()
    cases = [trial(dtype, device, padding="no", causal=False, dropout=0.5) for dtype in DTYPES]
    for each in [each for each in cases if kernel.supports(each.case)][:1]:
        dtype = getattr(torch, each.case.dtype)
        q, k = (torch.zeros(1, heads, 200, 64, dtype=dtype, device=each.case.device) for heads in (4, 2))
        with torch.no_grad():
            output = run(kernel.forward, each, [q, k, torch.ones_like(k)], None).float()
        if not 0.9 < float(output.mean()) < 1.1:
            yield f"dropout must keep the mean, and with 0.5 of it a mean of 1 became {float(output.mean()):.3g}; scale what is kept"
        if float(output.std()) < 1e-3:
            yield "dropout must drop something, and with 0.5 of it nothing changed; apply it, or refuse it in 'supports'"
        return
    raise Skipped("it says that it has no dropout")


def questions() -> list[AttentionCase]:
    """Cases of all kinds of machines, most of which are not this one."""
    sites = [
        AttentionSite("site", head_dim, 8, kv_heads, causal, padding, dropout)
        for head_dim, kv_heads in ((7, 8), (64, 2), (256, 1), (1024, 8))
        for causal, padding, dropout in ((False, False, 0.0), (True, True, 0.1))
    ]
    machines = [
        ("cpu", None),
        *(("cuda", capability) for capability in (None, (6, 0), (7, 5), (8, 0), (9, 0), (12, 0))),
    ]
    dtypes = (*DTYPES, "float64")
    return [
        AttentionCase(site, dtype, device, capability, backward)
        for site, dtype, (device, capability), backward in product(sites, dtypes, machines, (True, False))
    ]


def supports_answers_every_question(subject: Subject) -> Iterator[str]:
    """Yes, or no with a reason; and no wherever something is missing that `requires` names."""
    from graftwork.attention.kernels import unmet_requirement

    kernel = subject.create()
    for case in questions():
        answer = kernel.supports(case)
        if not isinstance(answer, Support):
            yield f"'supports' must return a Support, and it returned {answer!r} for {case}; return SUPPORTED or unsupported(reason)"
            return
        if not answer and not answer.reason.strip():
            yield f"a no must have a reason, and 'supports' gave none for {case}; write unsupported(reason)"
        if answer and (reason := unmet_requirement(kernel.requires, case)):
            yield f"'supports' must refuse what 'requires' rules out, and it says yes although {reason}; ask graftwork.attention.unmet_requirement first"


CHECKS: tuple[Check, ...] = (
    supports_answers_every_question,
    it_computes_attention,
    its_gradients_are_right,
    a_sequence_of_padding_gives_finite_numbers,
    dropout_keeps_the_mean,
)
