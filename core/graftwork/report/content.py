"""What a report says, before it is written in any form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftwork.checkpoint import learning
from graftwork.checkpoint.learning import LearningMap
from graftwork.contracts.plan import Plan
from graftwork.contracts.verdict import Verdict
from graftwork.evaluate.comparison import Comparison
from graftwork.memory.timeline import Footprint


@dataclass(frozen=True)
class ReportContent:
    """What a report says; a part that is left out leaves its section out."""

    title: str
    summary: str = ""
    """A sentence under the title, left out where a comparison begins with the same one."""
    verdict: Verdict | None = None
    comparisons: Sequence[Comparison] = ()
    log: Sequence[Mapping[str, Any]] = ()
    """A row for each logged step, with `step`, `loss` and whatever else the training log holds."""
    plan: Plan | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    """Parameters: `total` and `trained`."""
    roles: Sequence[Mapping[str, Any]] = ()
    """A row for each role of the model (see `outline.RoleRow`)."""
    learned: LearningMap | None = None
    """What each trained module learned."""
    kernels: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What `Assembly.kernel_usage` returned."""
    data: Sequence[Mapping[str, Any]] = ()
    """A row for each source and operator (see `pipeline.StageCount`)."""
    verification: Mapping[str, Any] = field(default_factory=dict)
    """What shows that the checkpoint works, such as how far its logits differ, the hash, and that a fresh process opened it."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Versions, machine, command and time."""
    memory: Mapping[str, str] = field(default_factory=dict)
    """What was predicted and what was measured."""
    footprint: Footprint | None = None
    """The memory of a step, as rehearsed."""
    notes: Sequence[str] = ()
    """Sentences that a reader must not miss."""

    def to_json(self) -> dict[str, Any]:
        """What `report.json` holds."""
        content = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        content["comparisons"] = [comparison.to_json() for comparison in self.comparisons]
        content["verdict"] = dataclasses.asdict(self.verdict) if self.verdict else None
        content["learned"] = learning.to_json(self.learned) if self.learned else None
        content["plan"] = self.plan.to_json() if self.plan else None
        content["footprint"] = self.footprint.to_json() if self.footprint else None
        plain: dict[str, Any] = _plain(content)
        return plain


def _plain(value: Any) -> Any:
    """JSON without NaN and infinities, which JSON does not have: they become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
