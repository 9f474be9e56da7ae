"""The verdict on a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Failure = Literal["", "did not learn", "broke"]


@dataclass(frozen=True)
class Verdict:
    """The judgement on a run: healthy, or how it failed and the reasons."""

    healthy: bool
    reasons: tuple[str, ...] = ()
    first_loss: float | None = None
    last_loss: float | None = None
    chance_loss: float | None = None
    """ln(vocabulary): the loss of a model that knows nothing."""
    failure: Failure = ""
    """How a run failed; empty for a healthy one, and for a failed one whose checkpoint is older than the distinction."""
    records: int = 0
    """Of how many records the first and the last loss are, the same ones; 0 where they are means over the first and the last steps."""

    def sentence(self) -> str:
        """The verdict for a person."""
        if not self.healthy:
            return f"{self.failure or 'unhealthy'}: " + "; ".join(self.reasons)
        if self.first_loss is None or self.last_loss is None or self.chance_loss is None:
            return "; ".join(self.reasons) or "healthy"
        same = f" on the same {self.records} records" if self.records else ""
        return (
            f"healthy: loss {self.first_loss:.3f} to {self.last_loss:.3f}{same} "
            f"(a model that knows nothing has {self.chance_loss:.3f})"
        )
