"""What to tell at the end of a run: notes, and facts about memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftwork.checkpoint.manifest import Manifest
from graftwork.config.sizes import format_size
from graftwork.contracts.plan import Plan
from graftwork.contracts.records import RecordCounts

if TYPE_CHECKING:
    from graftwork.memory.budget import CandidateSearch

MAX_NAMED = 5
"""How many unusable records are named."""


def title_of(plan: Plan) -> str:
    """What a report is called: the method, and the model that it was used on."""
    spec = plan.model_spec
    return f"{spec.peft.name if spec.peft else 'training'} on {spec.model.name}"


def provenance_of(read: Manifest) -> dict[str, str]:
    """How a checkpoint came about: what its run began with, if with something, and by which versions, where and when."""
    return ({"began with": read.began_with} if read.began_with else {}) | read.provenance


def memory_facts(search: CandidateSearch | None, measured: int | None) -> dict[str, str]:
    """What was predicted of the memory, and what was measured."""
    facts = {}
    if search and search.best:
        facts["rehearsed"] = search.why
        facts["rehearsed with"] = search.best.steps[-1].records
        facts["predicted peak"] = format_size(search.best.steps[-1].footprint.peak)
    if search or measured:
        facts["measured peak"] = (
            format_size(measured) if measured else "not measured: PyTorch does not track a CPU's memory"
        )
    return facts


def notes(data: Mapping[str, Any], newly_initialised: Sequence[str] = (), quantized: Sequence[str] = ()) -> list[str]:
    """Sentences that a reader of the report must not miss."""
    sentences = [*_left_out(data), *_validated(data)]
    if newly_initialised:
        sentences.append(
            f"The base weights lack {', '.join(newly_initialised)}: what is called the base here has them as trained in this run."
        )
    if quantized:
        sentences.append(
            f"Trained on a base that {' and '.join(quantized)} quantized, and evaluated on the unquantized one."
        )
    return sentences


def _validated(data: Mapping[str, Any]) -> Iterator[str]:
    """A sentence on the records that were kept for validation."""
    if losses := data.get("validation_losses"):
        finite = [(math.inf if loss is None else loss, step) for step, loss in losses]
        (first, begun), (last, _), (lowest, step) = finite[0], finite[-1], min(finite)
        best = f", lowest after step {step:,} ({lowest:.4g})" if lowest < last else ""
        before = f"after step {begun:,}" if begun else "before"
        yield (
            f"Validation loss, of {data['validation']:,} records about images that were not trained on: {first:.4g} {before}, "
            f"{last:.4g} in the end{best}."
        )
    elif data.get("validation"):
        yield "None of the records that were kept for validation could be used, so that nothing was validated."
    if unusable := data.get("validation_unusable"):
        yield f"{len(unusable):,} records for validation could not be used, such as {unusable[0]}."


def _left_out(data: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on the records that were not used, or not to their end."""
    counts, number = RecordCounts.recorded(data), data.get("bad_in_all", len(data["bad"]))
    if counts and counts.left_out:
        by = ", ".join(f"{row['dropped']:,} by {row['name']}" for row in data["stages"][:-1] if row["dropped"])
        yield f"{counts.left_out:,} of {counts.read:,} records could not be used, {counts.used:,} were; left out: {by}."
    elif number and not counts:
        yield f"{number:,} records could not be used."
    if late := data.get("left_out_in_training"):
        yield (
            f"{late:,} of them were found only in training: their batches were smaller, and the number of steps is that of the "
            "data with them. Images that are read before (by a data operator) are left out before steps are counted."
        )
    if long := data["too_long"]:
        records = "record is" if long == 1 else "records are"
        yield f"{long:,} {records} longer than train.max_length: {data['too_long_were']}."
    if cut := data.get("answers_cut"):
        yield (
            f"{cut:,} answers were cut, so that where they end was not learned, and what the model learned of them may go on for "
            'ever; train.too_long = "skip" leaves such records out.'
        )


def data_notes(data: Mapping[str, Any]) -> Iterator[str]:
    """What of the data was not used, and the first few places."""
    yield from notes(data)
    yield from (f"  {line}" for line in data["bad"][:MAX_NAMED])
    if (more := data["left_out"] - MAX_NAMED) > 0:
        yield f"  … and {more:,} more"
