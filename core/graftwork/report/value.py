"""The report on what data is worth: the same run on several data sets, with several seeds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from graftwork.evaluate.seeds import DataComparison
from graftwork.report import elements
from graftwork.report.markdown import escape
from graftwork.report.markdown import table as markdown_table
from graftwork.report.markup import Markup, tag
from graftwork.report.value_chart import value_chart
from graftwork.report.value_wording import (
    OWN,
    RUN_HEADERS,
    SCORE_HEADERS,
    DataRuns,
    better,
    caveats,
    run_rows,
    score_rows,
    undecided,
    worse,
)
from graftwork.report.wording import text, words

HOW = (
    "Means over the seeds; differences are paired by question and by seed. Each 95% interval is over questions (whole images are drawn) "
    "and over seeds (Student's t); of twenty such intervals one misses by chance."
)

HURTS, HELPS = "Where it hurts", "Where it helps"
KINDS = {HURTS: "bad", HELPS: "good"}
"""How these findings look."""


@dataclass(frozen=True)
class ValueReport:
    """What is said of the worth of data."""

    title: str
    runs: Sequence[DataRuns]
    """The run's own data first."""
    seeds: Sequence[int]
    comparisons: Sequence[DataComparison]
    """One for each evaluator; none where no run is healthy."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def findings(self) -> Mapping[str, Sequence[str]]:
        """Titles with their sentences: where data hurts, where it helps, and what cannot be told."""
        if not self.comparisons:
            return {"Nothing can be said": ["No run is healthy."]}
        hurts = [sentence for each in self.comparisons for sentence in worse(each)]
        found = {
            HURTS: hurts or [f"Nothing is measurably worse than on {OWN}, or than the base."],
            HELPS: [sentence for each in self.comparisons for sentence in better(each)],
            "Not told from noise": [sentence for each in self.comparisons for sentence in undecided(each)],
        }
        return {title: sentences for title, sentences in found.items() if sentences}

    @cached_property
    def caveats(self) -> Sequence[str]:
        """Sentences that a reader must not miss."""
        return [*caveats(self.runs, self.comparisons)]

    def tables(self) -> Iterator[tuple[str, Sequence[str], list[tuple[str, ...]]]]:
        """What each table is about, its headers and its rows."""
        yield "Runs", RUN_HEADERS, run_rows(self.runs)
        for each in self.comparisons:
            yield each.evaluator, SCORE_HEADERS, score_rows(each)

    def to_json(self) -> dict[str, Any]:
        """What `report.json` holds."""
        return {
            "title": self.title,
            "findings": {title: [*sentences] for title, sentences in self.findings.items()},
            "caveats": [*self.caveats],
            "seeds": [*self.seeds],
            "runs": [dataclasses.asdict(each) for each in self.runs],
            "comparisons": [each.to_json() for each in self.comparisons],
            "provenance": dict(self.provenance),
        }


def write_value_report(folder: Path, report: ValueReport) -> None:
    """Write `report.json`, `report.md` and `report.html` into `folder`; the page needs no other file and no network."""
    content = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(content + "\n", encoding="utf-8")
    (folder / "report.md").write_text(render_markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(elements.page(report.title, _sections(report)), encoding="utf-8")


def render_markdown(report: ValueReport) -> str:
    """The whole report, but for the pictures."""
    return "\n\n".join(filter(None, _blocks(report))) + "\n"


def _blocks(report: ValueReport) -> Iterator[str]:
    yield f"# {escape(report.title)}"
    yield from (f"> {escape(sentence)}" for sentence in report.caveats)
    for title, sentences in report.findings.items():
        yield f"## {title}"
        yield "\n".join(f"- {escape(sentence)}" for sentence in sentences)
    for title, headers, rows in report.tables():
        yield f"## {escape(title)}"
        yield markdown_table(headers, rows)
    yield HOW
    yield "## Provenance"
    yield markdown_table(("", ""), [(words(name), text(value)) for name, value in report.provenance.items()])


def render_fragment(report: ValueReport) -> str:
    """The report as HTML for a notebook, whose own style stays as it is."""
    return elements.fragment(_sections(report))


def _sections(report: ValueReport) -> Iterator[Markup]:
    yield tag("h1", report.title)
    for title, sentences in report.findings.items():
        kind = KINDS.get(title, "") if title != HURTS or any(map(worse, report.comparisons)) else ""
        items = tag("ul", *(tag("li", sentence) for sentence in sentences))
        yield tag("div", tag("strong", title), items, class_=f"verdict {kind}".strip())
    yield from (tag("p", sentence, class_="note") for sentence in report.caveats)
    (title, headers, rows), *tables = report.tables()
    yield elements.section(title, elements.table(headers, rows))
    for comparison, (title, headers, rows) in zip(report.comparisons, tables, strict=True):
        chart, how = value_chart(comparison), tag("p", HOW, class_="small")
        yield elements.section(title, chart, elements.table(headers, rows), how)
    facts = ((words(name), text(value)) for name, value in report.provenance.items())
    yield elements.section("Provenance", elements.facts(facts))
