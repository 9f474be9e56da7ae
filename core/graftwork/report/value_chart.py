"""The picture of what data is worth: for each number the mean on each data with its interval, every seed, and the base."""

from __future__ import annotations

from graftwork.evaluate.scores import format_score
from graftwork.evaluate.seeds import DataComparison, SeedRow, SeedScores
from graftwork.report.charts import axis_ticks
from graftwork.report.markup import Markup, tag

LANE = 18
"""The height that each data has in a row."""
COLOURS = 6
"""How many the style sheet has."""


def value_chart(comparison: DataComparison) -> Markup:
    """A row for each number, in which each data has a lane."""
    top = 1.0 if comparison.percent else _top(comparison)
    names = [*comparison.rows[0].data]
    legend = [tag("span", tag("i", class_=f"data-{place % COLOURS}"), name) for place, name in enumerate(names)]
    if comparison.rows[0].base is not None:
        legend.append(tag("span", tag("i", class_="majority"), "base"))
    ticks = [tick for tick in axis_ticks(0.0, top, 4) if tick <= top]
    along = (
        tag("span", format_score(tick, comparison.percent), style=f"left:{tick / top:.2%};transform:translateX(-50%)")
        for tick in ticks
    )
    return tag(
        "figure",
        tag("p", *legend, class_="legend"),
        tag("div", *(_row(row, comparison.percent, top, ticks) for row in comparison.rows), class_="bars"),
        tag("div", tag("span", class_="name"), tag("div", *along, class_="along"), tag("span"), class_="bar axis"),
        tag(
            "figcaption",
            f"{comparison.metric} on {comparison.evaluator}: the mean over the seeds with its 95% interval over seeds and "
            f"{comparison.questions:,} questions about {comparison.images:,} images; a dot is a seed.",
        ),
    )


def _top(comparison: DataComparison) -> float:
    """The end of the axis where it is not 100 per cent."""
    scores = [scores for row in comparison.rows for scores in row.data.values()]
    values = [v for each in scores for v in (each.score.high or 0.0, *each.by_seed.values())]
    return max([*values, *(row.base or 0.0 for row in comparison.rows), 1e-12])


def _row(row: SeedRow, percent: bool, top: float, ticks: list[float]) -> Markup:
    height, base = LANE * len(row.data), row.base
    told = ", ".join(f"{name} {format_score(each.score.value, percent)}" for name, each in row.data.items())
    chart = tag(
        "svg",
        tag("title", f"{row.name}: {told}" + (f", base {format_score(base, percent)}" if base is not None else "")),
        tag("rect", class_="track", x=0, y=0, width=100, height=height),
        *(_line("grid", tick, tick, 0, height, top) for tick in ticks),
        _line("majority", base, base, 0, height, top) if base is not None else Markup(),
        *(lane for place, each in enumerate(row.data.values()) for lane in _lane(place, each, top)),
        viewBox=f"0 0 100 {height}",
        preserveAspectRatio="none",
        role="img",
        style=f"height:{height / 16}rem",
    )
    values = tag(
        "span",
        *(
            tag("span", format_score(each.score.value, percent), class_=f"data-{place % COLOURS}")
            for place, each in enumerate(row.data.values())
        ),
        class_="values lanes",
    )
    return tag("div", tag("span", row.name, class_="name"), chart, values, class_="bar")


def _lane(place: int, scores: SeedScores, top: float) -> list[Markup]:
    """The interval, the seeds and the mean of one data."""
    y, value, colour = LANE * (place + 0.5), scores.score.value, f"data-{place % COLOURS}"
    marks = [_line(f"seed {colour}", each, each, y, y, top) for each in scores.by_seed.values()]
    if scores.score.low is not None and scores.score.high is not None:
        marks.append(_line(f"interval {colour}", scores.score.low, scores.score.high, y, y, top))
    return [*marks, _line(f"mean {colour}", value, value, y - 0.3 * LANE, y + 0.3 * LANE, top)]


def _line(kind: str, start: float, end: float, y1: float, y2: float, top: float) -> Markup:
    """A line between two scores; what lies beyond the axis is cut off. Without a length it is a dot, round however wide the page is."""
    x1, x2 = (f"{100 * min(max(value / top, 0.0), 1.0):.2f}" for value in (start, end))
    return tag("line", class_=kind, x1=x1, x2=x2, y1=f"{y1:g}", y2=f"{y2:g}")
