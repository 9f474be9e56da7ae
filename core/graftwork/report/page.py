"""A report as one HTML page that holds everything it shows."""

from __future__ import annotations

import dataclasses
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.contracts.records import Image
from graftwork.data import load_image
from graftwork.errors import DataError
from graftwork.evaluate.comparison import Comparison, Flip
from graftwork.evaluate.scores import ADAPTER, BASE, format_change, format_score
from graftwork.report.charts import loss_curve, score_bars
from graftwork.report.markup import Markup, tag
from graftwork.report.memory import memory_course
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
    from PIL.Image import Image as PILImage

    from graftwork.report.content import ReportContent

FLIPS = 12
"""How many gained and how many lost answers are shown."""
IMAGE_SIDE = 240


def render_page(content: ReportContent) -> str:
    """The whole page."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", content.title),
        tag("style", Markup(_style())),
    )
    body = tag("body", tag("main", *_sections(content)))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def render_sections(content: ReportContent) -> Markup:
    """The sections alone, with a style that holds for nothing else on the page."""
    nested = _style().replace(":root {", "& {").replace("body {", "& {").replace("margin: 0; background", "background")
    return tag("div", tag("style", Markup(f".graftwork {{{nested}}}")), *_sections(content), class_="graftwork")


def _style() -> str:
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


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
        yield _section(f"Base and adapter on {comparison.evaluator}", *_comparison(comparison))
    if content.log:
        yield _section("Training", loss_curve(content.log), _log_table(content.log))
    if content.plan or content.counts or content.roles:
        yield _section("What was trained", *_plan(content))
    if content.kernels:
        yield _section("Attention", _kernels(content.kernels))
    if content.memory:
        chart = memory_course(content.footprint) if content.footprint else Markup()
        yield _section("Memory", chart, _facts(content.memory.items()))
    if content.data:
        yield _section("Data", _rows(content.data))
    if content.verification:
        yield _section(
            "Verification", _facts((words(name), text(value)) for name, value in content.verification.items())
        )
    if content.provenance:
        facts = ((words(name), text(value)) for name, value in content.provenance.items())
        yield _section("Provenance", _facts(facts))


def _section(title: str, *children: Markup) -> Markup:
    return tag("section", tag("h2", title), *children)


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
    yield _table(SCORE_HEADERS, [score_cells(row, comparison) for row in comparison.rows], marked=comparison.untrained)
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
        embed(flip.image) if flip.image else Markup(),
        tag("p", flip.question.replace("<image>", "").strip(), class_="question"),
        tag("p", tag("span", right), tag("q", getattr(flip, right)), class_="answer right"),
        tag("p", tag("span", wrong), tag("q", getattr(flip, wrong)), class_="answer wrong"),
        tag("p", tag("span", "expected"), tag("b", ", ".join(dict.fromkeys(flip.reference))), class_="answer"),
    )


def embed(image: Image) -> Markup:
    """An image as part of the page, scaled down; a sentence where it cannot be read any more."""
    try:
        decoded = load_image(image)
    except DataError as error:
        return tag("p", error.sentence, class_="small")
    decoded.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    kind, data = min((_encode(decoded, kind) for kind in ("png", "jpeg")), key=lambda encoded: len(encoded[1]))
    source = f"data:image/{kind};base64,{b64encode(data).decode()}"
    return tag("img", src=source, alt="The image that the question is about", loading="lazy")


def _encode(image: PILImage, kind: str) -> tuple[str, bytes]:
    buffer = BytesIO()
    image.save(buffer, kind, quality=85)
    return kind, buffer.getvalue()


def _log_table(log: Sequence[Mapping[str, Any]]) -> Markup:
    """The first and the last logged step, and some between."""
    places = sorted({round(part * (len(log) - 1) / 4) for part in range(5)})
    return _rows([log[place] for place in places])


def _plan(content: ReportContent) -> Iterator[Markup]:
    if sentence := counts_sentence(content.counts):
        yield tag("p", sentence)
    if content.plan:
        yield _facts(plan_facts(content.plan))
    if content.roles:
        yield _rows(content.roles)
    if content.plan:
        train = dataclasses.asdict(content.plan.run_context.train)
        facts = _facts((words(name), text(value)) for name, value in train.items())
        yield tag("details", tag("summary", "Settings of training"), facts)


def _kernels(kernels: Mapping[str, Mapping[str, Any]]) -> Markup:
    rows = [
        (site, text(found.get("ran")), "; ".join(map(str, found.get("fallbacks", ()))) or "none")
        for site, found in kernels.items()
    ]
    return _table(("site", "kernel, calls", "passed over"), rows)


def _facts(facts: Iterable[tuple[str, str]]) -> Markup:
    rows = (tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in facts)
    return tag("div", tag("table", tag("tbody", *rows), class_="facts"), class_="wide")


def _rows(rows: Sequence[Mapping[str, Any]]) -> Markup:
    return _table(*grid(rows))


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]], marked: Sequence[str] = ()) -> Markup:
    """A table that scrolls on narrow screens; rows whose name is `marked` get an asterisk."""
    head = tag("tr", *(tag("th", header, scope="col") for header in headers))
    lines = (
        tag(
            "tr",
            tag("th", name, " *" if name in marked else "", scope="row"),
            *(tag("td", cell, class_="number" if cell[:1] in "+-–0123456789<" else None) for cell in cells),
        )
        for name, *cells in rows
    )
    return tag("div", tag("table", tag("thead", head), tag("tbody", *lines)), class_="wide", tabindex="0")
