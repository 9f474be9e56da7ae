"""The paired test: the losses of the same few records before, during and after training, so that their spread cancels out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftwork import processes
from graftwork.contracts.batch import IGNORED, Encoded, as_array
from graftwork.contracts.model import batch_of

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts.assembly import Assembly

RECORDS = 32
"""How many records are followed through a run."""
VALIDATED = 256
"""How many records at most are asked for the validation loss."""


@dataclass(frozen=True)
class Measurement:
    """The followed records after a step."""

    step: int
    travelled: float
    """The sum of the learning rates of the steps so far, as shares of the highest."""
    weights: float
    """The root mean square of what is trained."""
    losses: tuple[float, ...]
    """Each record's mean over its labelled tokens, in nats."""

    @property
    def is_finite(self) -> bool:
        """Whether all losses are finite numbers."""
        return all(map(math.isfinite, self.losses))


def steps_to_measure(steps: int, warmup: int) -> frozenset[int]:
    """The steps, of a run of so many, after which the records are measured: 0, the last, and four between.

    The first of those comes soon after the warm-up, when too high a learning rate does its damage; some runs come back.
    """
    between = {warmup + 2, -(-steps // 8), -(-steps // 4), -(-steps // 2)}
    return frozenset({0, steps, *(step for step in between if step < steps)})


def followed(count: int, seed: int, encode: Callable[[Sequence[int]], Mapping[int, Encoded]]) -> list[Encoded]:
    """The records, encoded, that are followed through a run: some of `count`, drawn by the seed, all of which can be used."""
    import torch

    found: list[Encoded] = []
    for index in torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist():
        if len(found) == RECORDS:
            break
        found += encode([index]).values()
    return found


def measure(assembly: Assembly, examples: Sequence[Encoded], size: int) -> tuple[float, ...]:
    """Each record's mean loss over its labelled tokens, in nats, as the model is now; `size` records at a time. Collective."""
    import torch

    model = assembly.model
    training = model.training
    model.eval()
    try:
        # Not in inference mode: what sharding strategies fetch here may be kept for training.
        with torch.no_grad():
            parts = [examples[start : start + size] for start in range(0, len(examples), size)]
            losses = tuple(loss for part in parts for loss in _losses(assembly, part))
    finally:
        model.train(training)
    (of_first, *_) = processes.all_gather_object(losses)  # so that all come to one verdict, whatever rounding does
    return of_first


def mean_loss(assembly: Assembly, examples: Sequence[Encoded], size: int) -> float:
    """The mean loss over all labelled tokens of the records, in nats; `size` records at a time. Collective."""
    losses, counts = measure(assembly, examples, size), [example.num_label_tokens for example in examples]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / max(1, sum(counts))


def _losses(assembly: Assembly, examples: Sequence[Encoded]) -> list[float]:
    import torch

    batch = batch_of(assembly.processor, examples).to(assembly.device)
    positions = batch.label_positions
    assert positions is not None
    counts = torch.bincount(positions // batch.labels.shape[1], minlength=len(examples)).tolist()
    labels = torch.split(batch.labels.flatten()[positions + 1], counts)

    def compute() -> list[Tensor]:
        with assembly.autocast():
            hidden = torch.split(assembly.model(batch).flatten(0, 1).index_select(0, positions), counts)
            sums = zip(hidden, labels, strict=True)
            return [assembly.cross_entropy(assembly.model, states, wanted) for states, wanted in sums]

    return [float(loss) / max(1, count) for loss, count in zip(assembly.run_forward(compute), counts, strict=True)]


def size_of_weights(assembly: Assembly) -> float:
    """The root mean square of what is trained, over all processes; not a number where an engine keeps it elsewhere, or it is
    zero. Collective."""
    parts = [getattr(parameter, "to_local", lambda p=parameter: p)() for parameter in assembly.trained().values()]
    mine = sum(float(part.detach().float().square().sum()) for part in parts), sum(part.numel() for part in parts)
    squares, counts = zip(*processes.all_gather_object(mine), strict=True)
    return math.sqrt(sum(squares) / max(1, sum(counts))) or math.nan


def loss_of_guessing(examples: Sequence[Encoded]) -> float:
    """The loss of guessing by frequency: of a model that knows how often each token is a label, and nothing else.

    It is the entropy of the labels in nats, by the Miller-Madow estimate, as few labels show too few of the rare tokens.
    """
    counts = Counter(label for example in examples for label in as_array(example.labels).tolist() if label != IGNORED)
    total = counts.total()
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    return entropy + (len(counts) - 1) / (2 * total)
