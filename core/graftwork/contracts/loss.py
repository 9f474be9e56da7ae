"""The loss: the cross entropy of labelled tokens, computed only where there are labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from graftwork.contracts.batch import find_label_positions

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts.batch import Batch


def cross_entropy(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """The summed cross entropy of hidden states `[labels, width]`, by way of all their logits in fp32."""
    import torch

    return torch.nn.functional.cross_entropy(model.logits(hidden).float(), labels, reduction="sum")


def summed_loss(
    model: Any, batch: Batch, cross_entropy: Callable[[Any, Tensor, Tensor], Tensor] = cross_entropy
) -> Tensor:
    """The cross entropy in nats, summed over the labelled positions, by the weight of their records, and computed only there.

    Most positions are image or prompt; logits for them are never made (their size is tokens x vocabulary).
    """
    import torch

    label_positions = find_label_positions(batch.labels) if batch.label_positions is None else batch.label_positions
    hidden = model(batch).flatten(0, 1).index_select(0, label_positions)
    labels = batch.labels.flatten()[label_positions + 1]
    if not batch.weights:
        return cross_entropy(model, hidden, labels)
    places: dict[float, list[int]] = {}
    begin = 0
    for weight, count in batch.weights:
        places.setdefault(weight, []).extend(range(begin, begin + count))
        begin += count
    # One call for each weight, not for each row, as some ways to the loss keep something for each call.
    losses = []
    for weight in sorted(places):
        own = torch.tensor(places[weight], dtype=torch.int64).to(labels.device, non_blocking=True)
        losses.append(weight * cross_entropy(model, hidden.index_select(0, own), labels.index_select(0, own)))
    return sum(losses[1:], losses[0])
