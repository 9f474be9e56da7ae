"""A report as one HTML page that holds everything it shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftwork.evaluate.comparison import Comparison, Flip
from graftwork.evaluate.scores import ADAPTER, BASE, format_change, format_score
from graftwork.report import elements
from graftwork.report.charts import loss_curve, score_bars
from graftwork.report.learning import learning_map
from graftwork.report.learning_wording import findings, summary
from graftwork.report.markup import Markup, tag
from graftwork.report.memory import memory_course
from graftwork.report.wording import SCORE_HEADERS, counts_sentence, evidence, plan_facts, score_cells, text, words

if TYPE_CHECKING:
    from graftwork.report.content import ReportContent

FLIPS = 12
"""How many gained and how many lost answers are shown."""


def render_page(content: ReportContent) -> str:
    """The whole page."""
    return elements.page(content.title, _sections(content))


def render_sections(content: ReportContent) -> Markup:
    """The sections alone, with a style that holds for nothing else on the page."""
    return elements.fragment(_sections(content))


def _sections(content: ReportContent) -> Iterator[Markup]:
    if content.title:
        yield tag("h1", content.title)
    if content.summary not in ("", *(comparison.headline for comparison in content.comparisons)):
        yield tag("p", content.summary, class_="summary")
    if content.verdict:
        verdict = content.verdict
        name, _, why = verdict.sentence().partition(": ")
        reasons = verdict.reasons or [why]
        yield tag(
            "div",
            tag("strong", name.capitalize()),
            tag("ul", *(tag("li", reason[:1].upper() + reason[1:]) for reason in reasons if reason)),
            class_=f"verdict {'good' if verdict.healthy else 'bad'}",
        )
    yield from (tag("p", note, class_="note") for note in content.notes)
    for comparison in content.comparisons:
        yield elements.section(f"Base and adapter on {comparison.evaluator}", *_comparison(comparison))
    if content.log:
        yield elements.section("Training", loss_curve(content.log), _log_table(content.log))
    if content.plan or content.counts or content.roles:
        yield elements.section("What was trained", *_plan(content))
    if content.learned:
        said = (tag("p", sentence, class_="note") for sentence in findings(content.learned))
        yield elements.section("What learned", tag("p", summary(content.learned)), *said, learning_map(content.learned))
    if content.kernels:
        yield elements.section("Attention", _kernels(content.kernels))
    if content.memory:
        chart = memory_course(content.footprint) if content.footprint else Markup()
        yield elements.section("Memory", chart, elements.facts(content.memory.items()))
    if content.data:
        yield elements.section("Data", elements.rows(content.data))
    if content.verification:
        yield elements.section(
            "Verification", elements.facts((words(name), text(value)) for name, value in content.verification.items())
        )
    if content.provenance:
        facts = ((words(name), text(value)) for name, value in content.provenance.items())
        yield elements.section("Provenance", elements.facts(facts))


def _comparison(comparison: Comparison) -> Iterator[Markup]:
    whole, percent = comparison.rows[0], comparison.percent
    assert whole.difference is not None
    tiles = {
        "base": format_score(whole.scores[BASE].value, percent),
        "adapter": format_score(whole.scores[ADAPTER].value, percent),
        "difference in points" if percent else "difference": format_change(
            dataclasses.replace(whole.difference, low=None), percent
        ),
        "always the most common answer": format_score(whole.majority, percent),
    }
    yield tag(
        "div", *(tag("div", tag("b", number), tag("span", name)) for name, number in tiles.items()), class_="tiles"
    )
    yield tag("p", comparison.headline)
    yield from (tag("p", note) for note in comparison.notes)
    if comparison.forgetting:
        yield tag("ul", *(tag("li", sentence) for sentence in comparison.forgetting), class_="note")
    yield score_bars(comparison)
    yield elements.table(
        SCORE_HEADERS, [score_cells(row, comparison) for row in comparison.rows], marked=comparison.untrained
    )
    yield tag(
        "p",
        "Differences are paired, in percentage points where scores are in per cent; intervals draw whole images; p is of "
        "McNemar's exact test, which takes questions as independent."
        + (" * A group that was not trained on." if comparison.untrained else ""),
        class_="small",
    )
    if sentence := evidence(comparison.provenance):
        yield tag("p", sentence, class_="small")
    for gained, title in ((True, "Gained"), (False, "Lost")):
        flips = [flip for flip in comparison.flips if flip.gained is gained]
        if flips:
            shown_flips = flips[:: max(1, len(flips) // FLIPS)][:FLIPS]
            count = f"{len(shown_flips)} of {len(flips):,}" if len(flips) > FLIPS else f"{len(flips):,}"
            yield tag(
                "h3", title, tag("small", f" {count} answers that only the {'adapter' if gained else 'base'} has right")
            )
            yield tag("div", *map(_flip, shown_flips), class_="flips")


def _flip(flip: Flip) -> Markup:
    right, wrong = ("adapter", "base") if flip.gained else ("base", "adapter")
    return tag(
        "article",
        elements.embed(flip.image) if flip.image else Markup(),
        tag("p", flip.question.replace("<image>", "").strip(), class_="question"),
        tag("p", tag("span", right), tag("q", getattr(flip, right)), class_="answer right"),
        tag("p", tag("span", wrong), tag("q", getattr(flip, wrong)), class_="answer wrong"),
        tag("p", tag("span", "expected"), tag("b", ", ".join(dict.fromkeys(flip.reference))), class_="answer"),
    )


def _log_table(log: Sequence[Mapping[str, Any]]) -> Markup:
    """The first and the last logged step, and some between."""
    places = sorted({round(part * (len(log) - 1) / 4) for part in range(5)})
    return elements.rows([log[place] for place in places])


def _plan(content: ReportContent) -> Iterator[Markup]:
    if sentence := counts_sentence(content.counts):
        yield tag("p", sentence)
    if content.plan:
        yield elements.facts(plan_facts(content.plan))
    if content.roles:
        yield elements.rows(content.roles)
    if content.plan:
        train = dataclasses.asdict(content.plan.run_context.train)
        facts = elements.facts((words(name), text(value)) for name, value in train.items())
        yield tag("details", tag("summary", "Settings of training"), facts)


def _kernels(kernels: Mapping[str, Mapping[str, Any]]) -> Markup:
    rows = [
        (site, text(found.get("own") or found.get("ran")), "; ".join(map(str, found.get("fallbacks", ()))) or "none")
        for site, found in kernels.items()
    ]
    return elements.table(("site", "kernel, calls", "passed over"), rows)
