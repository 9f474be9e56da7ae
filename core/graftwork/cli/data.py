"""`graftwork data`: the commands on data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from graftwork.cli import Session
from graftwork.cli.console import make_table, print_facts, print_json, progress_console
from graftwork.cli.drawing import drawing
from graftwork.cli.options import JSON
from graftwork.jobs.data_check import OUT, check_data

if TYPE_CHECKING:
    from rich.console import Console

    from graftwork.report.data import DataReport


@click.group()
def data() -> None:
    """Say what a data set is made of, and what is wrong with it."""


@data.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "against",
    "--against",
    multiple=True,
    metavar="EVALUATOR",
    help="Search for the questions and images of this evaluator, or of those of a run file.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), default=OUT, show_default=True, metavar="DIR")
@JSON
@click.pass_context
def check(ctx: click.Context, data: Path, against: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Show what DATA is made of, and what is wrong with it; the exit status is 1 if anything is that must not be.

    DATA is a run file, a data file, or a file or folder that a data source recognises.
    """
    session: Session = ctx.obj
    console = progress_console(as_json)
    with drawing(console) as draw:
        checked = check_data(data, against=against, out=out, on_event=draw, lookup=session.catalog)
    if as_json:
        print_json(checked.to_json())
    else:
        _print(console, checked.report)
        console.print(f"\npage: {checked.folder / 'report.html'}", markup=False, soft_wrap=True)
    ctx.exit(0 if checked.ok else 1)


def _print(console: Console, report: DataReport) -> None:
    from rich.text import Text

    from graftwork.report.data_wording import (
        SHARE_HEADERS,
        SPREAD_HEADERS,
        leak_sentence,
        share_row,
        spread_rows,
        tiles,
    )

    print_facts(console, [(name, number) for name, number in tiles(report.facts).items()])
    for headers, rows in (
        (SPREAD_HEADERS, spread_rows(report.facts)),
        (SHARE_HEADERS, [share_row(share) for share in report.facts.answers.blind]),
    ):
        table = make_table([f"{header}*" for header in headers])
        for row in rows:
            table.add_row(*map(Text, row))
        console.print()
        console.print(table)
    if report.facts.leaks.compared:
        console.print(f"\n{leak_sentence(report.facts)}", markup=False)
    for level, style in (("must", "red"), ("should", "yellow")):
        findings = [finding for finding in report.findings if finding.level == level]
        if findings:
            console.print(f"\n[bold]{'Must not be' if level == 'must' else 'Should be looked at'}[/bold]")
        for finding in findings:
            console.print(f"- {finding.what}: {finding.remedy}", style=style, markup=False)
            for example in finding.examples[:3]:
                console.print(f"  {example}", markup=False)
    console.print(f"\n{report.verdict}", style="green" if report.ok else "red", markup=False)
