"""The report on a data set: what a person wants to see of it, on one page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.data.facts import DataFacts, OddRecord
from graftwork.data.findings import Finding
from graftwork.report import elements
from graftwork.report.charts import histogram, share_bars
from graftwork.report.data_wording import (
    ANSWER_HEADERS,
    CHANGE_HEADERS,
    LEAK_HEADERS,
    QUESTION_HEADERS,
    SHARE_HEADERS,
    SPREAD_HEADERS,
    answer_rows,
    change_rows,
    count_facts,
    image_facts,
    leak_rows,
    leak_sentence,
    length_facts,
    question_row,
    share_row,
    shortened,
    spread_rows,
    tiles,
)
from graftwork.report.markdown import escape
from graftwork.report.markdown import table as markdown_table
from graftwork.report.markup import Markup, tag
from graftwork.report.wording import grid, text, words

TURN_LETTERS = 240
"""How much of a turn is shown."""
TURNS = 4


@dataclass(frozen=True)
class DataReport:
    """What is said of a data set."""

    title: str
    facts: DataFacts
    findings: Sequence[Finding]
    stages: Sequence[Mapping[str, Any]]
    """A row for each source and operator (see `pipeline.StageCount`)."""
    before: DataFacts | None = None
    """The same facts about what the sources gave, where operators were applied."""
    notes: Sequence[str] = ()
    """Sentences that a reader must not miss, such as why lengths are not in tokens."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing was found that must not be."""
        return all(finding.level != "must" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """A sentence."""
        must = sum(finding.level == "must" for finding in self.findings)
        should = len(self.findings) - must
        look = f"{should} thing{'s' * (should != 1)} should be looked at"
        if not must:
            return "Nothing is wrong" + (f"; {look}." if should else ".")
        return f"{must} thing{'s' * (must != 1)} must not be" + (f", and {look}." if should else ".")

    def to_json(self) -> dict[str, Any]:
        """What `report.json` holds."""
        return {
            "title": self.title,
            "ok": self.ok,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "notes": [*self.notes],
            "stages": [dict(stage) for stage in self.stages],
            "facts": self.facts.to_json(),
            "before": self.before.to_json() if self.before else None,
            "provenance": dict(self.provenance),
        }


def write_data_report(folder: Path, report: DataReport) -> None:
    """Write `report.json`, `report.md` and `report.html` into `folder`; the page needs no other file and no network."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(content + "\n", encoding="utf-8")
    (folder / "report.md").write_text(render_markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(elements.page(report.title, _sections(report)), encoding="utf-8")


# Markdown -----------------------------------------------------------------------------------------------------------------


def render_markdown(report: DataReport) -> str:
    """The whole report, but for images."""
    return "\n\n".join(filter(None, _blocks(report))) + "\n"


def _blocks(report: DataReport) -> Iterator[str]:
    facts = report.facts
    yield f"# {escape(report.title)}"
    yield f"**{escape(report.verdict)}**"
    yield from (f"> {escape(note)}" for note in report.notes)
    if report.findings:
        yield "\n".join(f"- **{f.level}**: {escape(f'{f.what}; {f.remedy}')}" for f in report.findings)
    yield markdown_table([*tiles(facts)], [[*tiles(facts).values()]])
    if report.before:
        yield "## Before and after"
        yield markdown_table(CHANGE_HEADERS, change_rows(report.before, facts))
    yield "## Records"
    yield markdown_table(*grid(report.stages))
    yield markdown_table(("", ""), count_facts(facts))
    yield "## Lengths and sizes"
    yield markdown_table(SPREAD_HEADERS, spread_rows(facts))
    yield markdown_table(("", ""), length_facts(facts)) if facts.lengths else ""
    yield "## Images"
    yield markdown_table(("", ""), image_facts(facts))
    yield "## Questions and answers"
    yield markdown_table(SHARE_HEADERS, map(share_row, facts.answers.blind))
    yield markdown_table(ANSWER_HEADERS, answer_rows(facts))
    yield markdown_table(QUESTION_HEADERS, map(question_row, facts.answers.commonest_questions))
    if facts.leaks.compared:
        yield "## Leaks"
        yield leak_sentence(facts)
        yield markdown_table(LEAK_HEADERS, leak_rows(facts))
        yield "\n".join(f"- {escape(f'{where}: {leak.sentence}')}" for where, leak in facts.leaks.pairs)
    yield "## Records to look at"
    rows = [(odd.id, odd.where, odd.why or "–", _talk(odd)) for odd in facts.odd]
    yield markdown_table(("record", "read from", "why", "conversation"), rows)
    yield "## Provenance"
    yield markdown_table(("", ""), [(words(name), text(value)) for name, value in report.provenance.items()])


def _talk(odd: OddRecord) -> str:
    return shortened(" / ".join(content for _, content in odd.turns), TURN_LETTERS)


def render_fragment(report: DataReport) -> str:
    """The report as HTML for a notebook, whose own style stays as it is."""
    return elements.fragment(_sections(report))


# HTML ---------------------------------------------------------------------------------------------------------------------


def _sections(report: DataReport) -> Iterator[Markup]:
    facts = report.facts
    yield tag("h1", report.title)
    for level in ("must", "should"):
        findings = [finding for finding in report.findings if finding.level == level]
        if findings or (level == "must" and report.ok):
            yield _box(report, level, findings)
    yield from (tag("p", note, class_="note") for note in report.notes)
    numbers = (tag("div", tag("b", number), tag("span", name)) for name, number in tiles(facts).items())
    yield tag("div", *numbers, class_="tiles")
    if report.before:
        table = elements.table(CHANGE_HEADERS, change_rows(report.before, facts))
        yield elements.section("Before and after", table)
    yield elements.section("Records to look at", tag("div", *map(_record, facts.odd), class_="flips"))
    yield elements.section("Records", elements.rows(report.stages), elements.facts(count_facts(facts)))
    yield elements.section("Lengths and sizes", *_spreads(facts))
    yield elements.section("Images", elements.facts(image_facts(facts)))
    if facts.answers.questions:
        yield elements.section("Questions and answers", *_answers(facts))
    if facts.leaks.compared:
        pairs = (tag("li", f"{where}: {leak.sentence}") for where, leak in facts.leaks.pairs)
        shown = tag("ul", *pairs, class_="note") if facts.leaks.pairs else Markup()
        table = elements.table(LEAK_HEADERS, leak_rows(facts))
        yield elements.section("Leaks", tag("p", leak_sentence(facts)), shown, table)
    yield elements.section("Provenance", elements.facts((words(n), text(v)) for n, v in report.provenance.items()))


def _box(report: DataReport, level: str, findings: Sequence[Finding]) -> Markup:
    if not findings:
        return tag("div", tag("strong", report.verdict), class_="verdict good")
    title = f"{len(findings)} {'must not be' if level == 'must' else 'should be looked at'}"
    return tag(
        "div",
        tag("strong", title),
        tag(
            "ul",
            *(
                tag("li", f"{each.what[:1].upper()}{each.what[1:]}: {each.remedy}.", _examples(each))
                for each in findings
            ),
        ),
        class_=f"verdict {'bad' if level == 'must' else ''}",
    )


def _examples(finding: Finding) -> Markup:
    if not finding.examples:
        return Markup()
    lines = (tag("li", example) for example in finding.examples)
    return tag("details", tag("summary", f"{len(finding.examples)} of them"), tag("ul", *lines, class_="small"))


def _spreads(facts: DataFacts) -> Iterator[Markup]:
    tokens = facts.lengths.tokens if facts.lengths else None
    limit = float(facts.lengths.max_length) if facts.lengths else None
    measured = [
        ("tokens of a record", tokens, limit) if tokens else ("words of a record", facts.words, None),
        ("width of an image in pixels", facts.images.width, None),
        ("height of an image in pixels", facts.images.height, None),
    ]
    charts = [histogram(name, found, end) for name, found, end in measured if found and found.least < found.most]
    yield tag("div", *charts, class_="charts")
    yield elements.table(SPREAD_HEADERS, spread_rows(facts))
    if facts.lengths:
        yield elements.facts(length_facts(facts))


def _answers(facts: DataFacts) -> Iterator[Markup]:
    blind = facts.answers.blind
    yield tag(
        "p",
        "Whoever sees no image, and gives each question the answer that it has most often in the other half of the data, is right "
        f"{blind[0].blind:.1%} of the time; whoever always gives the commonest answer of all, {blind[0].majority:.1%}. A model "
        "that learns to look has to do better.",
    )
    yield share_bars([(share.name, share.blind, share.majority) for share in blind])
    yield elements.table(ANSWER_HEADERS, answer_rows(facts))
    yield elements.table(QUESTION_HEADERS, map(question_row, facts.answers.commonest_questions))


def _record(odd: OddRecord) -> Markup:
    lines = (
        tag("p", shortened(content, TURN_LETTERS), class_="question" if role == "user" else None)
        for role, content in odd.turns[:TURNS]
    )
    more = len(odd.turns) - TURNS
    return tag(
        "article",
        elements.embed(odd.image) if odd.image else Markup(),
        *lines,
        tag("p", f"… and {more} more turns", class_="small") if more > 0 else Markup(),
        tag("p", f"{odd.why[:1].upper()}{odd.why[1:]}", class_="odd") if odd.why else Markup(),
        tag("p", odd.where or odd.id, class_="small"),
    )
