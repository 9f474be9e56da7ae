"""What jobs return: objects that a notebook shows as tables and curves, and that a job reports to its listener."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.contracts.verdict import Verdict
    from graftwork.evaluate.comparison import Comparison
    from graftwork.evaluate.evaluation import Result


@dataclass(frozen=True)
class Scored:
    """One variant was scored, without a base to compare it with."""

    result: Result
    folder: Path
    """Where the answers are."""

    def to_json(self) -> dict[str, Any]:
        """The scores as plain data."""
        return {**self.result.to_json(), "out": str(self.folder)}


@dataclass(frozen=True)
class Compared:
    """Base and adapter were asked the same questions."""

    comparison: Comparison
    folder: Path
    """Where the answers and the report are."""

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain data."""
        return {**self.comparison.to_json(), "out": str(self.folder)}

    def __str__(self) -> str:
        from graftwork.report import render_comparison

        return render_comparison(self.comparison)

    def _repr_html_(self) -> str:
        from graftwork.report import render_fragment

        return render_fragment(comparisons=[self.comparison])


@dataclass(frozen=True)
class TrainResult:
    """A run that ended."""

    out: Path
    checkpoint: Path
    verdict: Verdict
    comparisons: Sequence[Compared] = ()
    scores: Sequence[Scored] = ()
    """Where there is no base to compare with."""
    log: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    """A row for each logged step."""
    verification: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What shows that the checkpoint reopened as it was saved."""

    @property
    def report(self) -> Path:
        """The page that holds all of it."""
        return self.out / "report.html"

    def __str__(self) -> str:
        return "\n\n".join([f"{self.checkpoint}: {self.verdict.sentence()}", *map(str, self.comparisons)])

    def _repr_html_(self) -> str:
        from graftwork.report import render_fragment

        compared = [each.comparison for each in self.comparisons]
        return render_fragment(verdict=self.verdict, log=self.log, comparisons=compared)
