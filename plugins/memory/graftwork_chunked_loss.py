"""The memory strategy `chunked-loss`: the loss over a large vocabulary without all its logits at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from graftwork import hookimpl, setting
from graftwork.contracts import MemoryStrategy

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts import Assembly, Plan


@dataclass(frozen=True)
class ChunkedLossSettings:
    """How many logits there are at a time."""

    labels: int = setting(256, "Labels whose logits are in memory at the same time", minimum=1)


class ChunkedLoss(MemoryStrategy[ChunkedLossSettings]):
    """Computes the loss and its gradients for some labels at a time, and keeps no logits

    The gradients of the hidden states, and of the head where it is trained, are computed in the forward pass, while the
    logits are there; the backward pass only scales them. Nothing is computed twice. Under autocast the logits have its
    dtype and the softmax is in fp32, as in the plain loss.
    """

    name = "chunked-loss"
    Settings = ChunkedLossSettings

    def validate(self, plan: Plan) -> Iterable[str]:
        """fp16, whose loss scaling would come after the gradients of the logits."""
        if plan.run_context.train.precision == "fp16":
            yield "its gradients exist before fp16's loss scaling could keep them from vanishing; use bf16 or fp32"

    def loss(self, assembly: Assembly) -> Callable[[Any, Tensor, Tensor], Tensor]:
        return partial(cross_entropy, size=self.settings.labels)


def cross_entropy(model: Any, hidden: Tensor, labels: Tensor, *, size: int) -> Tensor:
    """The summed cross entropy of hidden states `[labels, width]`, `size` of them at a time; fp32, without a dimension.

    A function of its own for autograd: its inputs are the hidden states and the parameters of the head that are trained,
    whichever `model.logits` uses.
    """
    import torch

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, *trained: Tensor) -> Tensor:
            total = hidden.new_zeros((), dtype=torch.float32)
            gradients = [torch.zeros_like(tensor) for tensor in (hidden, *trained)]
            for start in range(0, len(labels), size):
                rows = slice(start, start + size)
                loss, (of_hidden, *of_trained) = one_chunk(model, hidden[rows], labels[rows], trained)
                total += loss
                gradients[0][rows] = of_hidden
                for gathered, gradient in zip(gradients[1:], of_trained, strict=True):
                    gathered += gradient
            ctx.save_for_backward(*gradients)
            return total

        @staticmethod
        def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, ...]:
            # In fp32 and in place: a gradient of the head is as large as the head.
            return tuple(gradient.float().mul_(scale).to(gradient.dtype) for gradient in ctx.saved_tensors)

    if not torch.is_grad_enabled():
        losses = [
            torch.nn.functional.cross_entropy(model.logits(part).float(), wanted, reduction="sum")
            for part, wanted in zip(torch.split(hidden, size), torch.split(labels, size), strict=True)
        ]
        return torch.stack(losses).sum()
    return Loss.apply(hidden, *trained_leaves(model.logits(hidden[:1].detach())))  # type: ignore[no-untyped-call, no-any-return]


def one_chunk(
    model: Any, hidden: Tensor, labels: Tensor, trained: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of some labels, and its gradients by their hidden states and by what is trained of the head.

    The softmax replaces the logits in place and becomes their gradient: one fp32 tensor `[labels, vocabulary]` in all.
    """
    import torch

    rows = torch.arange(len(labels), device=labels.device)
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        logits = model.logits(hidden)
    scores = logits.detach().to(torch.float32, copy=True)
    scores -= scores.amax(-1, keepdim=True)
    wanted = scores[rows, labels]
    sums = scores.exp_().sum(-1, keepdim=True)
    loss = (sums.squeeze(-1).log() - wanted).sum()
    scores /= sums
    scores[rows, labels] -= 1.0
    return loss, torch.autograd.grad(logits, (hidden, *trained), scores.to(logits.dtype))


def trained_leaves(result: Tensor) -> list[Tensor]:
    """The parameters that require gradients and that a result was computed from."""
    found: dict[int, Tensor] = {}
    nodes, seen = [result.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found[id(leaf)] = leaf
        nodes += [following for following, _ in node.next_functions]
    return list(found.values())


@hookimpl
def memory_strategies() -> list[type[MemoryStrategy[Any]]]:
    """The strategy of this plugin."""
    return [ChunkedLoss]
