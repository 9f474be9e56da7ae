"""The verdict on a training run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """The judgement on a run: healthy, or the reasons why not."""

    healthy: bool
    reasons: tuple[str, ...] = ()
    first_loss: float | None = None
    last_loss: float | None = None
    chance_loss: float | None = None
    """ln(vocabulary): the loss of a model that knows nothing."""

    def sentence(self) -> str:
        """The verdict for a person."""
        if not self.healthy:
            return "unhealthy: " + "; ".join(self.reasons)
        if self.first_loss is None or self.last_loss is None or self.chance_loss is None:
            return "; ".join(self.reasons) or "healthy"
        return (
            f"healthy: loss {self.first_loss:.3f} to {self.last_loss:.3f} "
            f"(a model that knows nothing has {self.chance_loss:.3f})"
        )
