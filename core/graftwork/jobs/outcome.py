"""What the end of a run has to say: notes, and facts about memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftwork.config.sizes import shown_size

if TYPE_CHECKING:
    from graftwork.memory.budget import Ladder

FEW = 5
"""How many unusable records are named."""


def memory_facts(ladder: Ladder | None, measured: int | None) -> dict[str, str]:
    """What was predicted of the memory, and what was measured."""
    facts = {}
    if ladder and ladder.best:
        facts["rehearsed"] = ladder.why
        facts["predicted peak"] = shown_size(ladder.best.steps[-1].footprint.peak)
    if ladder or measured:
        facts["measured peak"] = (
            shown_size(measured) if measured else "not measured: PyTorch keeps no account of a CPU's memory"
        )
    return facts


def notes(data: Mapping[str, Any], fresh: Sequence[str] = (), rounded: Sequence[str] = ()) -> list[str]:
    """Sentences that a reader of the report must not miss."""
    said = []
    if data["bad"]:
        said.append(f"{len(data['bad']):,} records could not be used, {data['records']:,} were.")
    if data["too_long"]:
        said.append(f"{data['too_long']:,} records are longer than train.max_length, and were {data['too_long_were']}.")
    if fresh:
        said.append(
            f"The base weights lack {', '.join(fresh)}: what is called the base here has them as trained in this run."
        )
    if rounded:
        said.append(f"Trained on a base that {' and '.join(rounded)} rounded, and evaluated on the whole one.")
    return said


def data_notes(data: Mapping[str, Any]) -> Iterator[str]:
    """What of the data was not used, and the first few places."""
    yield from notes(data)
    yield from (f"  {line}" for line in data["bad"][:FEW])
