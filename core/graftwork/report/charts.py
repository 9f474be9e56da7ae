"""The figures of a report: the curve of the loss, and scores with their intervals, as SVG that grows with the page.

Only shapes are SVG, stretched to the width of the page; words are HTML, so that they stay readable on a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from graftwork.data.facts import Spread
from graftwork.evaluate.comparison import Comparison
from graftwork.evaluate.scores import ADAPTER, BASE, Row, format_score
from graftwork.evaluate.statistics import Interval
from graftwork.report.markup import Markup, tag
from graftwork.report.wording import text

POINTS = 800
"""How many points a curve has at most."""
WIDTH, HEIGHT = 1000, 300


def loss_curve(log: Sequence[Mapping[str, Any]]) -> Markup:
    """The loss over the steps: each logged one, and their running mean."""
    points = thin([(float(row["step"]), float(row["loss"])) for row in log if is_number(row["loss"])])
    if len(points) < 2:
        return Markup()
    steps = axis_ticks(points[0][0], points[-1][0], 5)
    losses = axis_ticks(0.0, max(loss for _, loss in points), 4)
    first, last, top = points[0][0], points[-1][0], max(losses[-1], max(loss for _, loss in points))

    def x(step: float) -> float:
        return (step - first) / (last - first) * WIDTH

    def y(loss: float) -> float:
        return (1 - loss / top) * HEIGHT

    def line(points: Sequence[tuple[float, float]], kind: str) -> Markup:
        return tag("polyline", class_=kind, points=" ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points))

    smooth = list(zip([step for step, _ in points], running_mean([loss for _, loss in points]), strict=True))
    plot = tag(
        "svg",
        tag("title", f"Loss from {text(points[0][1])} at step {first:g} to {text(points[-1][1])} at step {last:g}"),
        *(tag("line", class_="grid", x1=0, x2=WIDTH, y1=f"{y(loss):.1f}", y2=f"{y(loss):.1f}") for loss in losses),
        line(points, "raw"),
        line(smooth, "smooth"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
    )
    up = (tag("span", f"{loss:g}", style=f"top:{y(loss) / HEIGHT:.2%}") for loss in losses)
    along = (
        tag("span", f"{step:,g}", style=f"left:{x(step) / WIDTH:.2%};transform:translateX(-{x(step) / WIDTH:.0%})")
        for step in steps
    )
    return tag(
        "figure",
        tag("div", tag("div", *up, class_="up"), plot, tag("div", *along, class_="along"), class_="curve"),
        tag(
            "figcaption",
            "Loss in nats per labelled token, by optimizer step; the strong line is the running mean.",
        ),
    )


def is_number(value: Any) -> bool:
    """Whether something can be drawn: a loss may be missing, or not finite."""
    return value is not None and math.isfinite(value)


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS` points: neighbouring ones are averaged."""
    size = math.ceil(len(points) / POINTS)
    groups = (
        [points[start : start + size] for start in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    )
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def running_mean(values: Sequence[float]) -> list[float]:
    """Each value averaged with its neighbours within a twentieth of the whole to either side."""
    reach = max(1, len(values) // 40)
    windows = (values[max(0, place - reach) : place + reach + 1] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def axis_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`, about as many as asked for."""
    rough = max((high - low) / about, 1e-12)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def score_bars(comparison: Comparison) -> Markup:
    """Both variants' scores with their intervals, overall and by group."""
    values = [v for row in comparison.rows for s in row.scores.values() for v in (s.value, s.high or 0.0)]
    top = 1.0 if comparison.percent else max([*values, 1e-12])
    legend = [("base", "base"), ("adapter", "adapter"), ("majority", "always the most common answer")]
    return tag(
        "figure",
        tag("p", *(tag("span", tag("i", class_=kind), name) for kind, name in legend), class_="legend"),
        tag("div", *(_bars(row, comparison.percent, top) for row in comparison.rows), class_="bars"),
        tag(
            "figcaption",
            f"{comparison.metric} on {comparison.evaluator}; the lines are 95% bootstrap intervals over "
            f"{comparison.images:,} images.",
        ),
    )


def _bars(row: Row, percent: bool, top: float) -> Markup:
    base, adapter = row.scores[BASE], row.scores[ADAPTER]
    majority = f"{_place(row.majority, top):.2f}"
    chart = tag(
        "svg",
        tag(
            "title",
            f"{row.name}: base {format_score(base.value, percent)}, adapter {format_score(adapter.value, percent)}",
        ),
        tag("rect", class_="track", x=0, y=0, width=100, height=28),
        *_bar(base, top, "base", 3),
        *_bar(adapter, top, "adapter", 16),
        tag("line", class_="majority", x1=majority, x2=majority, y1=0, y2=28),
        viewBox="0 0 100 28",
        preserveAspectRatio="none",
        role="img",
    )
    values = tag(
        "span",
        tag("span", format_score(base.value, percent), class_="base"),
        tag("span", format_score(adapter.value, percent), class_="adapter"),
        class_="values",
    )
    return tag("div", tag("span", row.name, class_="name"), chart, values, class_="bar")


def _bar(score: Interval, top: float, kind: str, y: int) -> list[Markup]:
    bar = tag("rect", class_=kind, x=0, y=y, width=f"{_place(score.value, top):.2f}", height=9)
    if score.low is None or score.high is None:
        return [bar]
    ends = {"x1": f"{_place(score.low, top):.2f}", "x2": f"{_place(score.high, top):.2f}"}
    return [bar, tag("line", class_="interval", y1=y + 4.5, y2=y + 4.5, **ends)]


def _place(value: float, top: float) -> float:
    return 100 * min(max(value / top, 0.0), 1.0)


def histogram(name: str, found: Spread, limit: float | None = None) -> Markup:
    """How many lie in each of the steps of a spread; those that reach beyond a limit are marked."""
    top, steps = max(found.bins), len(found.bins)
    width = max(found.most - found.least, 1.0) / steps
    bars = (
        tag(
            "rect",
            class_="over" if limit is not None and found.least + (step + 1) * width > limit + 1e-9 else "adapter",
            x=f"{step * WIDTH / steps:.1f}",
            y=f"{(1 - number / top) * HEIGHT:.1f}",
            width=f"{0.9 * WIDTH / steps:.1f}",
            height=f"{number / top * HEIGHT:.1f}",
        )
        for step, number in enumerate(found.bins)
    )
    plot = tag(
        "svg",
        tag("title", f"{name}: {found.least:,.0f} to {found.most:,.0f}, median {found.median:,.0f}"),
        *bars,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
    )
    ends = tag("div", tag("span", f"{found.least:,.0f}"), tag("span", f"{found.most:,.0f}"), class_="ends")
    return tag("figure", plot, ends, tag("figcaption", name), class_="histogram")


def share_bars(rows: Sequence[tuple[str, float, float]]) -> Markup:
    """For each name how often a blind guess is right, and how often the commonest answer of all."""
    legend = [("adapter", "commonest answer to the same question"), ("base", "commonest answer of all")]
    return tag(
        "figure",
        tag("p", *(tag("span", tag("i", class_=kind), name) for kind, name in legend), class_="legend"),
        tag("div", *(_share_bar(*row) for row in rows), class_="bars"),
    )


def _share_bar(name: str, blind: float, majority: float) -> Markup:
    chart = tag(
        "svg",
        tag("title", f"{name}: {blind:.1%} right without an image, {majority:.1%} by the commonest answer"),
        tag("rect", class_="track", x=0, y=0, width=100, height=28),
        tag("rect", class_="base", x=0, y=3, width=f"{100 * majority:.2f}", height=9),
        tag("rect", class_="adapter", x=0, y=16, width=f"{100 * blind:.2f}", height=9),
        viewBox="0 0 100 28",
        preserveAspectRatio="none",
        role="img",
    )
    values = tag(
        "span",
        tag("span", f"{majority:.1%}", class_="base"),
        tag("span", f"{blind:.1%}", class_="adapter"),
        class_="values",
    )
    return tag("div", tag("span", name, class_="name"), chart, values, class_="bar")
