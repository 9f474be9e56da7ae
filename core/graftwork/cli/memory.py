"""What a rehearsal says to people: the rungs, the peak by category, and the largest things in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftwork.cli.console import make_table
from graftwork.config.sizes import shown_size

if TYPE_CHECKING:
    from rich.console import Console

    from graftwork.memory.budget import Ladder, Rung
    from graftwork.memory.timeline import Footprint

BAR = 30
"""Characters of the longest bar."""


def print_ladder(console: Console, ladder: Ladder) -> None:
    """Everything that a rehearsal found out, the sentence that matters last."""
    best = ladder.best
    console.print()
    if best is None:
        for rung in ladder.rungs:
            console.print(f"memory: {rung.name} cannot be rehearsed: {rung.problem}", style="yellow")
        return
    step = best.steps[-1]
    console.print(
        f"[bold]memory[/bold] of a step, rehearsed for {'a CUDA card' if ladder.device == 'cuda' else 'a CPU'} with records of "
        f"{step.tokens:,} tokens, {step.tokens - step.labels:,} of them a picture's and all others labelled"
    )
    console.print()
    print_rungs(console, ladder)
    console.print()
    print_footprint(console, best, step.footprint)
    console.print()
    console.print(
        ("takes " if ladder.taken is not None else "") + ladder.why,
        style=None if ladder.fits is None else "green" if ladder.fits else "bold red",
    )


def print_rungs(console: Console, ladder: Ladder) -> None:
    """A row for each rung."""
    table = make_table(["strategies", "at a time", "peak*", "", "multiplications*"])
    for column in (1, 2, 4):
        table.columns[column].justify = "right"
    plain = next((rung.steps[-1].multiplications for rung in ladder.rungs if rung.steps), 1) or 1
    for place, rung in enumerate(ladder.rungs):
        if not rung.steps:
            table.add_row(rung.name, "", "", rung.problem, "")
            continue
        step = rung.steps[-1]
        fits = "" if ladder.budget is None else "fits" if step.footprint.peak <= ladder.budget else "too much"
        table.add_row(
            rung.name,
            str(step.micro_batch),
            shown_size(step.footprint.peak),
            fits + (", taken" if place == ladder.taken and ladder.budget is not None else ""),
            f"{step.multiplications / plain:.2f} x",
        )
    console.print(table)
    if said := sorted({name for rung in ladder.rungs for name in rung.by_arithmetic}):
        console.print(f"by its own arithmetic, because one process cannot show it: {', '.join(said)}")


def print_footprint(console: Console, rung: Rung, footprint: Footprint) -> None:
    """Where the bytes are when there are most of them."""
    strategies = "" if rung.name == "none" else f" with {rung.name}"
    where = f", in {footprint.module}" if footprint.module else ""
    console.print(f"fullest{strategies}: {footprint.phase}{where} ({footprint.operation})")
    categories = make_table(["category*", "size*", ""])
    categories.columns[1].justify = "right"
    for category, size in footprint.categories.items():
        categories.add_row(category, shown_size(size), "█" * round(BAR * size / max(1, footprint.peak)))
    console.print(categories)
    console.print()
    things = make_table(["the largest things then", "category*", "shape*", "type*", "number", "size*"])
    for column in (4, 5):
        things.columns[column].justify = "right"
    for thing in footprint.largest:
        shape = " x ".join(map(str, thing.shape)) or "a number"
        things.add_row(
            thing.path or "the step itself",
            thing.category,
            shape,
            thing.dtype,
            str(thing.count),
            shown_size(thing.bytes),
        )
    console.print(things)
