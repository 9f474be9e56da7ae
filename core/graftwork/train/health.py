"""Health: whether a training run succeeded, or only ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from graftwork.contracts.verdict import Verdict

SKIPPED_SHARE = 0.1
SPIKE_SHARE = 0.05
GIVE_UP_AFTER = 10


@dataclass
class Health:
    """What is monitored during training."""

    vocabulary: int
    precision: str = "fp32"
    overflows_in: Sequence[str] = ()
    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    skipped_in_a_row: int = 0

    def update(self, loss: float, *, skipped: bool = False) -> None:
        """Record one optimizer step; a skipped one had a loss or a gradient that is not finite."""
        self.losses.append(loss)
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    @property
    def should_abort(self) -> bool:
        """Whether going on is a waste: many steps in a row were not finite."""
        return self.skipped_in_a_row >= GIVE_UP_AFTER

    def verdict(self) -> Verdict:
        """The verdict on the steps so far."""
        chance = math.log(self.vocabulary)
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        reasons = []
        if len(finite) < len(self.losses):
            reasons.append(f"{len(self.losses) - len(finite)} of {len(self.losses)} losses are not finite numbers")
        if self.skipped and self.skipped > SKIPPED_SHARE * len(self.losses):
            reasons.append(f"{self.skipped} of {len(self.losses)} steps were skipped for gradients that are not finite")
        if self.precision in self.overflows_in:
            reasons.append(f"{self.precision} is known to overflow in this model; train in bf16 or fp32")
        if not finite:
            return Verdict(False, tuple(reasons or ["no step was taken"]), chance_loss=chance)
        tenth = max(1, len(finite) // 10)
        first, last = fmean(finite[:tenth]), fmean(finite[-tenth:])
        if finite[0] > 2 * chance:
            reasons.append(
                f"the loss starts at {finite[0]:.4g}, and a model that knows nothing has {chance:.3g}: the weights, the "
                "prompt or the precision are wrong"
            )
        if last > chance:
            reasons.append(f"the loss ends at {last:.4g}, above the {chance:.3g} of a model that knows nothing")
        if len(finite) > tenth and last > 1.1 * first + 0.05:
            reasons.append(f"the loss rose from {first:.4g} to {last:.4g}; lower the learning rate")
        spikes = count_spikes(finite)
        if spikes > SPIKE_SHARE * len(finite):
            reasons.append(f"the loss jumped {spikes} times in {len(finite)} steps; lower the learning rate")
        return Verdict(not reasons, tuple(reasons), first, last, chance)


def count_spikes(losses: Sequence[float], window: int = 20) -> int:
    """How many losses are over three times the median of the `window` before them, and over it by more than 1 nat."""
    spikes = 0
    for index in range(5, len(losses)):
        typical = median(losses[max(0, index - window) : index])
        spikes += losses[index] > max(3 * typical, typical + 1.0)
    return spikes
