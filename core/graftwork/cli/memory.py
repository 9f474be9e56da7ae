"""How a rehearsal is printed: the candidates, the peak by category, and the largest tensors in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftwork.cli.console import make_table
from graftwork.config.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console

    from graftwork.memory.budget import Candidate, CandidateSearch
    from graftwork.memory.timeline import Footprint

BAR = 30
"""Characters of the longest bar."""


def print_search(console: Console, search: CandidateSearch) -> None:
    """Everything that a rehearsal found out, the sentence that matters last."""
    best = search.best
    console.print()
    if best is None:
        for candidate in search.candidates:
            console.print(f"memory: {candidate.name} cannot be rehearsed: {candidate.problem}", style="yellow")
        return
    step = best.steps[-1]
    console.print(
        f"[bold]memory[/bold] of a step, rehearsed for {'a CUDA device' if search.device == 'cuda' else 'a CPU'} with {step.records}"
    )
    console.print()
    print_candidates(console, search)
    console.print()
    print_footprint(console, best, step.footprint)
    console.print()
    console.print(
        ("chosen: " if search.chosen is not None else "") + search.why,
        style=None if search.fits is None else "green" if search.fits else "bold red",
    )


def print_candidates(console: Console, search: CandidateSearch) -> None:
    """A row for each candidate."""
    table = make_table(["strategies", "at a time", "peak*", "", "flops*"])
    for column in (1, 2, 4):
        table.columns[column].justify = "right"
    plain = next((candidate.steps[-1].flops for candidate in search.candidates if candidate.steps), 1) or 1
    for place, candidate in enumerate(search.candidates):
        if not candidate.steps:
            table.add_row(candidate.name, "", "", candidate.problem, "")
            continue
        step = candidate.steps[-1]
        fits = "" if search.budget is None else "fits" if step.footprint.peak <= search.budget else "too much"
        table.add_row(
            candidate.name,
            str(step.micro_batch),
            format_size(step.footprint.peak),
            fits + (", chosen" if place == search.chosen and search.budget is not None else ""),
            f"{step.flops / plain:.2f} x",
        )
    console.print(table)
    if names := sorted({name for candidate in search.candidates for name in candidate.not_rehearsed}):
        console.print(f"calculated by the strategy, because one process cannot show it: {', '.join(names)}")


def print_footprint(console: Console, candidate: Candidate, footprint: Footprint) -> None:
    """Where the bytes are at the peak."""
    from rich.text import Text

    strategies = "" if candidate.name == "none" else f" with {candidate.name}"
    where = f", in {footprint.module}" if footprint.module else ""
    console.print(f"fullest{strategies}: {footprint.phase}{where} ({footprint.operation})")
    categories = make_table(["category*", "size*", ""])
    categories.columns[1].justify = "right"
    for category, size in footprint.categories.items():
        categories.add_row(category, format_size(size), "█" * round(BAR * size / max(1, footprint.peak)))
    console.print(categories)
    console.print()
    groups = make_table(["the largest tensors at the peak", "category*", "size*"])
    groups.columns[0].overflow = "fold"  # names are long, and their ends tell them apart
    groups.columns[2].justify = "right"
    for group in footprint.largest:
        shape = " x ".join(map(str, group.shape)) or "a number"
        name = Text.assemble(group.path or "the step itself", (f"\n  {group.count} of {shape}, {group.dtype}", "dim"))
        groups.add_row(name, group.category, format_size(group.bytes))
    console.print(groups)
