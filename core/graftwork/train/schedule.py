"""The learning-rate schedule."""

from __future__ import annotations

import math


def warmup_steps(steps: int, warmup_ratio: float) -> int:
    """In how many steps, from the first, the learning rate is below its highest and rises."""
    return math.ceil(warmup_ratio * steps)


def learning_rate_factor(step: int, steps: int, warmup_ratio: float, schedule: str) -> float:
    """The learning rate of step `step` (from 0) as a share of the highest: linear warm-up, then the schedule."""
    warmup = warmup_steps(steps, warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if schedule == "linear" else 1.0
