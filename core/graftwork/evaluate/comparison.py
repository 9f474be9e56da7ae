"""A comparison: what an adapter changed, answer by answer, and what it made the model forget."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graftwork.contracts.records import Image, image_key
from graftwork.errors import DataError
from graftwork.evaluate.evaluation import Result
from graftwork.evaluate.scores import ADAPTER, BASE, Row, describe_change, describe_ratio, format_score, is_percent


@dataclass(frozen=True)
class Flip:
    """A question that exactly one of the two variants answers correctly."""

    id: str
    group: str
    question: str
    reference: tuple[str, ...]
    base: str
    adapter: str
    gained: bool
    """Whether the adapter is the one that answers correctly."""
    image: Image | None = None


@dataclass(frozen=True)
class Comparison:
    """Base and adapter on the same questions."""

    evaluator: str
    metric: str
    percent: bool
    """Whether scores lie from 0 to 1 and are shown in per cent."""
    read: int
    """Questions that were read: those that were asked, and those that could not be."""
    questions: int
    """Those that were asked, of both."""
    images: int
    """How many images, or questions without one, were drawn from for the intervals."""
    bad: int
    """Questions that could not be asked."""
    limit: int | None
    """The first so many whole questions were asked and no others; None where all were."""
    rows: tuple[Row, ...]
    """The metric first, then the groups."""
    flips: tuple[Flip, ...]
    headline: str
    """The overall result in a sentence."""
    notes: tuple[str, ...]
    """Sentences about the whole: its ratio to the base, `Result.notes`, a variant that always answers the same."""
    forgetting: tuple[str, ...]
    """A sentence for each group that the adapter was not trained on; empty when the trained groups are not known."""
    untrained: tuple[str, ...]
    """The names of those groups."""
    provenance: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As plain data; images are named, not embedded."""
        flips = [
            {**dataclasses.asdict(dataclasses.replace(flip, image=None)), "image": str(flip.image or "")}
            for flip in self.flips
        ]
        return {**dataclasses.asdict(dataclasses.replace(self, flips=())), "flips": flips}


def compare(result: Result, trained_groups: Collection[str] | None = None) -> Comparison:
    """Compare the two variants of an evaluation, which must have run both.

    Differences and ratios are paired: both variants are resampled together (see `graftwork.evaluate.statistics`). `trained_groups` are
    the groups of the training data; None when they are not known.
    """
    if set(result.answered[0].answers) != {BASE, ADAPTER}:
        raise DataError(
            f"the evaluation of '{result.evaluator.name}' did not ask base and adapter both; evaluate both variants"
        )
    rows = result.rows
    percent = is_percent(rows)
    flips = tuple(
        Flip(
            one.record.id,
            one.group,
            one.record.question,
            one.record.reference,
            one.answers[BASE],
            one.answers[ADAPTER],
            one.correct(ADAPTER),
            one.record.images[0] if one.record.images else None,
        )
        for one in result.answered
        if one.correct(ADAPTER) != one.correct(BASE)
    )
    images = len({image_key(one.record) for one in result.answered})
    groups = {one.group for one in result.answered}
    untrained = [
        row for row in rows[1:] if trained_groups is not None and row.name in groups.difference(trained_groups)
    ]
    headline = (
        f"{describe_change(rows[0], rows[0].name, percent)}, on {rows[0].records:,} questions about {images:,} images; "
        f"always answering '{rows[0].majority_answer}' scores {format_score(rows[0].majority, percent)}."
    )
    return Comparison(
        evaluator=result.evaluator.name,
        metric=result.evaluator.metric,
        percent=percent,
        read=result.counts.read,
        questions=result.counts.used,
        images=images,
        bad=result.counts.left_out,
        limit=result.limit,
        rows=rows,
        flips=flips,
        headline=headline[:1].upper() + headline[1:],
        notes=(describe_ratio(rows[0]), *result.notes, *_monotonous(result)),
        forgetting=tuple(
            describe_change(row, f"{row.name}, which was not trained on,", percent) + "." for row in untrained
        ),
        untrained=tuple(row.name for row in untrained),
        provenance=result.provenance,
    )


def _monotonous(result: Result) -> Iterator[str]:
    """A sentence for each variant that gave all questions, which have different answers, one and the same."""
    if len({one.record.reference for one in result.answered}) > 1:
        for variant in (BASE, ADAPTER):
            texts = {one.answers[variant] for one in result.answered}
            if len(texts) == 1:
                yield f"The {variant} gave one and the same answer to every question: '{texts.pop()[:80]}'."
