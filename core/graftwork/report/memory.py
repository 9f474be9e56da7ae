"""The chart of a step's memory: where the bytes are, by category, from its first operation to its last."""

from __future__ import annotations

from itertools import accumulate, groupby

from graftwork.config.sizes import format_size
from graftwork.memory.timeline import CATEGORIES, Footprint
from graftwork.report.charts import HEIGHT, WIDTH, axis_ticks
from graftwork.report.markup import Markup, tag


def memory_course(footprint: Footprint) -> Markup:
    """The categories stacked over the operations of a step."""
    timeline = [sizes for _, sizes in footprint.timeline]
    if len(timeline) < 2:
        return Markup()
    top = footprint.peak / 2**30
    ticks = axis_ticks(0.0, top, 4)
    stacks = [[0, *accumulate(sizes[category] for category in CATEGORIES)] for sizes in timeline]

    def x(place: int) -> float:
        return place / (len(timeline) - 1) * WIDTH

    def y(size: float) -> float:
        return (1 - size / max(1, footprint.peak)) * HEIGHT

    def band(number: int) -> Markup:
        upper = [f"{x(place):.1f},{y(stack[number + 1]):.1f}" for place, stack in enumerate(stacks)]
        lower = [f"{x(place):.1f},{y(stack[number]):.1f}" for place, stack in enumerate(stacks)]
        return tag("polygon", class_=f"memory-{number}", points=" ".join([*upper, *reversed(lower)]))

    plot = tag(
        "svg",
        tag("title", f"Memory of a step, {format_size(footprint.peak)} where it is fullest"),
        *map(band, range(len(CATEGORIES))),
        *(
            tag("line", class_="grid", x1=0, x2=WIDTH, y1=f"{y(tick * 2**30):.1f}", y2=f"{y(tick * 2**30):.1f}")
            for tick in ticks
        ),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
    )
    up = (tag("span", f"{tick:g}", style=f"top:{y(tick * 2**30) / HEIGHT:.2%}") for tick in ticks)
    phases, start = [], 0
    for phase, moments in groupby(phase for phase, _ in footprint.timeline):
        length = len(list(moments))
        if length > len(timeline) / 20:
            phases.append(
                tag("span", phase, style=f"left:{(start + length / 2) / len(timeline):.2%};transform:translateX(-50%)")
            )
        start += length
    legend = (tag("span", tag("i", class_=f"memory-{number}"), name) for number, name in enumerate(CATEGORIES))
    return tag(
        "figure",
        tag("p", *legend, class_="legend"),
        tag("div", tag("div", *up, class_="up"), plot, tag("div", *phases, class_="along"), class_="curve"),
        tag("figcaption", "GiB in the order of a step's operations, as rehearsed; the last micro-batch of a step."),
    )
