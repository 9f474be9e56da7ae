"""`graftwork data value`: the same run on other data, and what the data changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from graftwork.cli.console import make_table, print_json, progress_console
from graftwork.cli.drawing import drawing
from graftwork.cli.options import DEVICE, JSON

if TYPE_CHECKING:
    from rich.console import Console

    from graftwork.cli import Session
    from graftwork.report.value import ValueReport


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "data",
    "--with",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    metavar="DATA",
    help="Other data: a data set, a data file, or a file or folder that a data source recognises.",
)
@click.option("--seeds", type=int, default=3, show_default=True, metavar="N", help="Runs on each data, at least 3.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("data-value"),
    show_default=True,
    metavar="DIR",
    help="Where the runs and the report go.",
)
@click.option("--resume", is_flag=True, help="Go on where it has stopped; runs that have ended are not done again.")
@DEVICE
@JSON
@click.pass_obj
def value(
    session: Session,
    /,
    run: Path,
    data: tuple[Path, ...],
    seeds: int,
    out: Path,
    resume: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Carry out the run file RUN on its own data and on other DATA, and say what the data is worth.

    Each data gets as many runs as there are seeds; all else is as RUN says. DIR gets report.html with the intervals of the differences,
    over seeds and questions, and the folders of the runs.
    """
    from graftwork.jobs.data_value import value_data

    console = progress_console(as_json)
    with drawing(console) as draw:
        made = value_data(
            run, data, out, seeds=seeds, resume=resume, device=device, on_event=draw, lookup=session.catalog
        )
    if as_json:
        print_json(made.to_json())
    else:
        print_value(console, made.report)
        console.print(f"\npage: {made.folder / 'report.html'}", markup=False, soft_wrap=True)
    click.get_current_context().exit(0 if made.report.comparisons else 1)


SHOWN = 5
"""How many columns a terminal has room for."""
STYLES = {"Where it hurts": "red", "Where it helps": "green"}


def print_value(console: Console, report: ValueReport) -> None:
    """The tables, and what they say."""
    from rich.text import Text

    for title, headers, rows in report.tables():
        console.print(f"\n[bold]{title}[/bold]")
        table = make_table([f"{header}*" if place > 1 else header for place, header in enumerate(headers[:SHOWN])])
        for row in rows:
            table.add_row(*map(Text, row[:SHOWN]))
        console.print(table)
    for title, sentences in report.findings.items():
        console.print(f"\n[bold]{title}[/bold]")
        for sentence in sentences:
            console.print(f"- {sentence}", style=STYLES.get(title), markup=False)
    for sentence in report.caveats:
        console.print(f"\n{sentence}", style="yellow", markup=False)
