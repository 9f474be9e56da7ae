"""The table at the end of the tests: how far the numbers are from the published ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MEASURED = "measured against published numbers"
"""The property of a test's report that holds what was compared, of which model, the largest error and the tolerance."""


def rows(reports: Iterable[Any]) -> list[str]:
    """A line for each quantity and model, with the largest error of all tests; none when nothing was compared."""
    worst: dict[tuple[str, str], tuple[float, float]] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == MEASURED:
                what, model, error, tolerance = value
                worst[what, model] = max(worst.get((what, model), (0.0, tolerance)), (error, tolerance))
    if not worst:
        return []
    lines = [f"{'quantity':24}{'model':24}{'largest error':>14}{'tolerance':>12}"]
    return lines + [f"{w:24}{m:24}{e:14.1e}{t:12.0e}" for (w, m), (e, t) in sorted(worst.items())]
