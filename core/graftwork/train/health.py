"""Health: whether a training run learned, did not learn, or broke."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING

from graftwork.contracts.verdict import Failure, Verdict
from graftwork.train.progress import Measurement

if TYPE_CHECKING:
    from torch import Tensor

SKIPPED_SHARE = 0.1
GIVE_UP_AFTER = 10
SURELY = 2.5
"""So many standard errors are taken for certain: about one chance in a hundred for each side of an interval."""
SETTLED = 0.1
"""A loss below this, in nats, leaves too little to learn for a rise or a fall of it to mean anything."""
NOTHING, LITTLE = 0.01, 0.15
"""The shares of a loss by which a fall is none, and by which it is little."""
SLOWED = 0.1
"""A loss that slowed down was, at some time, so much more of its fall ahead than of the learning rates that were spent."""
FEW_STEPS = 30
"""A shorter run is asked for less: as a loss falls faster and faster at first, by the square of its share of these steps."""
ENOUGH_STEPS = 20
"""In fewer, medians of gradients and the second half of a run say too little."""
ROSE, ROSE_ON_THE_WAY = 0.1, 0.2
"""The shares of a loss by which it must have risen, at the end and before, to have risen at all."""
ABSURD = 2.0
"""So many times the loss of a model that knows nothing is where no model in order can be, whatever it has yet to learn."""
GROWN_WEIGHTS, LARGE_WEIGHTS = 10.0, 0.3
"""Trained weights have exploded that grew so many times, and to so large a root mean square: some begin near zero."""
GROWN_GRADIENTS, FAINT = 50.0, 0.1
"""Gradients have exploded whose norm grew so many times; from a fainter one, of records known already, it may grow more."""
WORSE_THAN_GUESSING, STOPPED = 1.5, 0.05
"""So many times the loss of guessing by frequency is clearly above it, and this share of all the fall is little for a second half."""
WINDOW = 0.2
"""Without followed records, the share of steps over which the first and the last losses are averaged."""


@dataclass(frozen=True)
class Change:
    """A loss at two times, in nats, and the standard error of their difference."""

    start: float
    end: float
    error: float

    @property
    def fall(self) -> float:
        """How much lower it became."""
        return self.start - self.end

    def rose(self, share: float) -> bool:
        """Whether it surely rose, and by more than a share of what it was."""
        return -self.fall > max(SURELY * self.error, share * self.start, SETTLED / 2)

    def fell_less_than(self, share: float) -> bool:
        """Whether it surely fell by less than a share of what it was."""
        return self.fall + SURELY * self.error < share * self.start


def paired(before: Measurement, after: Measurement) -> Change:
    """The change between two measurements of the same records."""
    falls = [start - end for start, end in zip(before.losses, after.losses, strict=True)]
    error = stdev(falls) / math.sqrt(len(falls)) if len(falls) > 1 else 0.0
    return Change(fmean(before.losses), fmean(after.losses), error)


def smoothed(losses: Sequence[float]) -> Change:
    """The change from the first to the last losses of steps that had different records.

    The spread between records is taken from neighbouring steps, whose records differ and whose model hardly does.
    """
    window = max(1, round(WINDOW * len(losses)))
    steps = [later - earlier for earlier, later in pairwise(losses)]
    spread = math.sqrt(fmean(step * step for step in steps) / 2) if steps else math.inf
    return Change(fmean(losses[:window]), fmean(losses[-window:]), spread * math.sqrt(2 / window))


@dataclass
class Health:
    """What is monitored during training."""

    vocabulary: int
    precision: str = "fp32"
    overflows_in: Sequence[str] = ()
    data_faults: Sequence[str] = ()
    """Why nothing can be learned from the data, as clauses."""
    unlearned: Sequence[str] = ()
    """What should have learned and did not, as clauses (see `LearningMap.faults`)."""
    guessing: float = math.inf
    """The loss of guessing labels by their frequency (see `progress.loss_of_guessing`)."""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    """The gradients' norm before clipping, of each step."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    measurements: list[Measurement] = field(default_factory=list)

    def update(self, loss: float, norm: float = math.nan, *, skipped: bool = False) -> None:
        """Record one optimizer step; a skipped one had a loss or a gradient that is not finite."""
        self.losses.append(loss)
        self.norms.append(norm)
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs of it, as tensors."""
        import torch

        rows = [[one.step, one.travelled, one.weights, *one.losses] for one in self.measurements]
        return {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "norms": torch.tensor(self.norms, dtype=torch.float64),
            "skipped": torch.tensor([self.skipped, self.skipped_in_a_row]),
            "measurements": torch.tensor(rows, dtype=torch.float64),
            "guessing": torch.tensor(self.guessing, dtype=torch.float64),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned; older checkpoints hold the losses and the skipped steps alone."""
        self.losses = state["losses"].tolist()
        self.skipped, self.skipped_in_a_row = state["skipped"].tolist()
        self.norms = state["norms"].tolist() if "norms" in state else []
        self.guessing = float(state.get("guessing", math.inf))
        rows = state["measurements"].tolist() if "measurements" in state else []
        self.measurements = [
            Measurement(int(step), travelled, weights, tuple(losses)) for step, travelled, weights, *losses in rows
        ]

    @property
    def should_abort(self) -> bool:
        """Whether going on is a waste: many steps in a row were not finite."""
        return self.skipped_in_a_row >= GIVE_UP_AFTER

    @property
    def chance(self) -> float:
        """The loss of a model that knows nothing."""
        return math.log(self.vocabulary)

    def verdict(self, *, ended: bool = True) -> Verdict:
        """The verdict on the steps so far. A run that has not `ended` may have broken, and cannot yet have failed to learn."""
        change = self.change()
        failure: Failure = ""
        if reasons := list(self.breaks(change)):
            failure = "broke"
        elif ended and (reasons := list(self.lessons_missed(change))):
            failure = "did not learn"
        first, last = (change.start, change.end) if change else (None, None)
        return Verdict(not reasons, tuple(reasons), first, last, self.chance, failure, self.followed)

    @property
    def followed(self) -> int:
        """How many records can be compared before and after; 0 where none were followed, or their losses are not finite."""
        if len(self.measurements) < 2 or not (self.measurements[0].is_finite and self.measurements[-1].is_finite):
            return 0
        return len(self.measurements[0].losses)

    @property
    def whose(self) -> str:
        """The loss that is compared, as the subject of a sentence."""
        return f"the loss of the same {self.followed} records" if self.followed else "the loss"

    def change(self) -> Change | None:
        """From the first loss to the last, of the followed records if there are some, else of all steps; None without steps."""
        if self.followed:
            return paired(self.measurements[0], self.measurements[-1])
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        return smoothed(finite) if finite else None

    def breaks(self, change: Change | None) -> Iterator[str]:
        """Why the run broke."""
        steps = len(self.losses)
        last = self.measurements[-1].losses if self.measurements else ()
        if odd := sum(not math.isfinite(loss) for loss in self.losses):
            yield f"{odd} of {steps} losses are not finite numbers"
        elif odd := sum(not math.isfinite(loss) for loss in last):
            yield f"the losses of {odd} of the same {len(last)} records are not finite numbers in the end"
        if self.skipped > SKIPPED_SHARE * steps:
            yield f"{self.skipped} of {steps} steps were skipped for gradients that are not finite"
        if self.precision in self.overflows_in:
            yield f"{self.precision} is known to overflow in this model; train in bf16 or fp32"
        if change is None:
            return
        if change.end > ABSURD * self.chance:
            yield (
                f"the loss starts at {change.start:.4g} and ends at {change.end:.4g}, and a model that knows nothing has "
                f"{self.chance:.3g}: the weights, the prompt or the precision are wrong"
            )
        yield from self.rises(change)
        yield from self.explosions()

    def rises(self, change: Change) -> Iterator[str]:
        """Whether the loss rose, in the end or on the way."""
        if change.rose(ROSE):
            yield f"{self.whose} rose from {change.start:.3g} to {change.end:.3g}; lower the learning rate"
            return
        between = [(paired(self.measurements[0], one), one.step) for one in self.measurements[1:-1] if one.is_finite]
        worst, step = max(between, key=lambda found: found[0].end, default=(change, 0))
        if worst.rose(ROSE_ON_THE_WAY):
            yield (
                f"{self.whose} rose from {worst.start:.3g} to {worst.end:.3g} by step {step}, before it came to "
                f"{change.end:.3g}; lower the learning rate"
            )

    def explosions(self) -> Iterator[str]:
        """What grew beyond measure."""
        if len(self.measurements) > 1:
            before, after = self.measurements[0].weights, self.measurements[-1].weights
            if after > max(GROWN_WEIGHTS * before, LARGE_WEIGHTS):
                yield f"the trained weights grew from {before:.3g} to {after:.3g} (root mean square); lower the learning rate"
        norms = [norm for norm in self.norms if math.isfinite(norm)]
        if len(norms) >= ENOUGH_STEPS:
            window = len(norms) // 4
            before, after = median(norms[:window]), median(norms[-window:])
            if after > GROWN_GRADIENTS * max(before, FAINT):
                yield f"the gradients' norm grew from {before:.3g} to {after:.3g}; lower the learning rate"

    def lessons_missed(self, change: Change | None) -> Iterator[str]:
        """Why the run did not learn, though nothing broke."""
        steps = len(self.losses)
        if change is None:
            yield "no step was taken"
            return
        yield from self.data_faults
        unchanged = self.followed and self.measurements[0].losses == self.measurements[-1].losses
        if self.norms and not any(self.norms):
            yield f"no gradient reached what is trained in any of {steps} steps: the loss does not depend on it"
        elif not unchanged:
            yield from self.unlearned
        if unchanged:
            yield f"nothing changed: {self.whose} was {change.end:.4g} before, and is the same for each of them"
        elif change.start >= SETTLED:
            yield from self.small_falls(change, min(1.0, steps / FEW_STEPS) ** 2)

    def small_falls(self, change: Change, share: float) -> Iterator[str]:
        """Whether the loss fell by too little; a run of few steps is asked for only a `share` of what others are."""
        fell = f"{self.whose} was {change.start:.4g} at first and {change.end:.4g} after {len(self.losses)} steps"
        if change.fell_less_than(NOTHING * share) or (self.followed and change.fall <= 0):
            yield fell
        elif change.fell_less_than(LITTLE * share) and self.still_at_the_start(change):
            yield f"{fell}, and fell no more slowly in the end: the learning rate is too low, or the run too short"
        elif change.end > self.chance and change.fell_less_than(LITTLE * share):
            yield f"{fell}, and a model that knows nothing has {self.chance:.3g}"
        elif self.stuck_above_guessing(change):
            yield f"{fell}, where it stopped, and guessing by frequency has {self.guessing:.4g}; lower the learning rate"

    def still_at_the_start(self, change: Change) -> bool:
        """Whether the loss has fallen no more slowly than the learning rate was spent: nowhere near what can be learned."""
        if not self.followed or not (last := self.measurements[-1]).travelled:
            return False
        shares = (
            paired(self.measurements[0], one).fall / change.fall - one.travelled / last.travelled
            for one in self.measurements[1:-1]
        )
        return max(shares, default=1.0) < SLOWED

    def stuck_above_guessing(self, change: Change) -> bool:
        """Whether it hardly fell in the second half, and never came near the loss of guessing."""
        if len(self.losses) < ENOUGH_STEPS or self.followed == 0 or len(self.measurements) < 3:
            return False
        lowest = min(fmean(one.losses) for one in self.measurements)
        return (
            lowest > WORSE_THAN_GUESSING * self.guessing
            and paired(self.measurements[-2], self.measurements[-1]).fall < STOPPED * change.fall
        )
