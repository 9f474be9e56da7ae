"""The picture of the learning map: the model, in which each block shows how far it moved."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from graftwork.checkpoint.learning import WORDS, LearningMap, ModuleLearning, RoleShape
from graftwork.report.learning_wording import percent
from graftwork.report.markup import Markup, tag

LEVELS = (0.01, 0.03, 0.1, 0.3)
"""Where one shade of movement ends and the next begins."""
GAP = 0.1
"""Between the last block and what lies outside of blocks, in widths of a block."""
SHADES = ("less than 1%", "1 to 3%", "3 to 10%", "10 to 30%", "more")
MEASURE = (
    "Each cell is a block, from the first on the left to the last; what lies outside of blocks stands at the end of a row. The "
    "colour says how far the trained values are from where they began, relative to their size."
)


def learning_map(learned: LearningMap) -> Markup:
    """The picture: a row for each role of the model, a cell for each of its blocks."""
    roles = {**learned.roles}
    for module in learned.modules:
        roles.setdefault(module.role, RoleShape(outside=True))
    legend = [tag("span", tag("i", class_=f"moved-{shade}"), name) for shade, name in enumerate(SHADES)]
    legend += [
        tag("span", tag("i", class_="unlearned"), "did not learn"),
        tag("span", tag("i", class_="frozen"), "frozen"),
    ]
    return tag(
        "figure",
        tag("p", *legend, class_="legend"),
        tag(
            "div", *(_row(role, shape, learned.of_role(role)) for role, shape in roles.items()), class_="bars learning"
        ),
        tag("figcaption", MEASURE),
    )


def _row(role: str, shape: RoleShape, modules: Sequence[ModuleLearning]) -> Markup:
    """A role: its blocks, and at the end what lies outside of them."""
    cells: list[list[ModuleLearning]] = [
        [m for m in modules if m.block and m.place == place] for place in range(shape.blocks)
    ]
    if shape.outside or not cells:
        cells.append([m for m in modules if not m.block])
    rects = [
        tag(
            "rect",
            tag("title", _told(role, found, place if place < shape.blocks else None)),
            class_=_shade(found),
            x=f"{place + GAP * (0 < shape.blocks <= place):g}",
            y=0,
            width=1,
            height=1,
        )
        for place, found in enumerate(cells)
    ]
    width = len(cells) + GAP * (0 < shape.blocks < len(cells))
    picture = tag("svg", *rects, viewBox=f"0 0 {width:g} 1", preserveAspectRatio="none", role="img")
    values = [m for m in modules if m.status == "learned"]
    dead = len(modules) - len(values)
    said = f"{dead} did not" if dead else percent(median(m.moved for m in values)) if values else "frozen"
    kind = "bad" if dead else "adapter" if values else "base"
    return tag(
        "div",
        tag("span", role or "elsewhere", class_="name"),
        picture,
        tag("span", tag("span", said, class_=kind), class_="values"),
        class_="bar",
    )


def _shade(modules: Sequence[ModuleLearning]) -> str:
    if not modules:
        return "frozen"
    if any(module.status != "learned" for module in modules):
        return "unlearned"
    moved = median(module.moved for module in modules)
    return f"moved-{sum(moved >= level for level in LEVELS)}"


def _told(role: str, modules: Sequence[ModuleLearning], place: int | None) -> str:
    """What a cell says when it is pointed at."""
    where = f"{role}, block {place}" if place is not None else f"{role}, outside of blocks"
    if not modules:
        return f"{where}: frozen"
    each = "; ".join(
        f"{m.name.removeprefix(m.block).lstrip('.') if m.block else m.name} {percent(m.moved) if m.status == 'learned' else WORDS[m.status]}"
        for m in modules
    )
    return f"{where}: {each}"
