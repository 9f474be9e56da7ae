"""A report as Markdown, to paste into an issue or a pull request."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from graftwork.report.learning_wording import findings, role_lines, summary
from graftwork.report.wording import (
    SCORE_HEADERS,
    counts_sentence,
    evidence,
    grid,
    plan_facts,
    score_cells,
    text,
    words,
)

if TYPE_CHECKING:
    from graftwork.evaluate.comparison import Comparison
    from graftwork.report.content import ReportContent


def render_markdown(content: ReportContent) -> str:
    """The whole report."""
    return "\n\n".join(filter(None, _blocks(content))) + "\n"


def _blocks(content: ReportContent) -> Iterator[str]:
    yield f"# {escape(content.title)}"
    if content.summary not in (comparison.headline for comparison in content.comparisons):
        yield escape(content.summary)
    if content.verdict:
        yield f"**{escape(content.verdict.sentence())}**"
    yield from (f"> {escape(note)}" for note in content.notes)
    for comparison in content.comparisons:
        yield from comparison_blocks(comparison)
    if content.log:
        first, last = content.log[0], content.log[-1]
        yield "## Training"
        yield f"Loss {text(first['loss'])} at step {text(first['step'])}, {text(last['loss'])} at step {text(last['step'])}."
    if content.plan:
        yield "## What was trained"
        yield escape(counts_sentence(content.counts))
        yield table(("", ""), plan_facts(content.plan))
        train = dataclasses.asdict(content.plan.run_context.train)
        yield table(("training", ""), [(words(name), text(value)) for name, value in train.items()])
    if content.learned:
        yield "## What learned"
        yield escape(" ".join([summary(content.learned), *findings(content.learned)]))
        yield table(("role", "trained modules"), role_lines(content.learned))
    for title, rows in {"Roles": content.roles, "Data": content.data}.items():
        if rows:
            yield f"## {title}"
            yield table(*grid(rows))
    for title, facts in {
        "Attention": content.kernels,
        "Memory": content.memory,
        "Verification": content.verification,
        "Provenance": content.provenance,
    }.items():
        if facts:
            yield f"## {title}"
            yield table(("", ""), [(words(name), text(value)) for name, value in facts.items()])


def comparison_blocks(comparison: Comparison) -> Iterator[str]:
    """A comparison's heading, sentences and table."""
    yield f"## Base and adapter on {escape(comparison.evaluator)}"
    yield escape(" ".join([comparison.headline, *comparison.notes]))
    yield from (f"> {escape(sentence)}" for sentence in comparison.forgetting)
    yield table(SCORE_HEADERS, [score_cells(row, comparison) for row in comparison.rows])
    yield escape(evidence(comparison.provenance))


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(map(escape, line))} |" for line in lines)


def escape(value: str) -> str:
    """Text that Markdown shows as it is: one line, no HTML, no table of its own."""
    return " ".join(value.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
