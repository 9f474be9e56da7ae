"""`graftwork data`: the commands on data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graftwork.cli import Session
from graftwork.cli.console import make_table, print_facts, print_json, progress_console
from graftwork.cli.drawing import drawing
from graftwork.cli.options import JSON, parse_settings
from graftwork.cli.records import print_data_set, print_history
from graftwork.cli.value import value
from graftwork.jobs.data_card import write_data_card
from graftwork.jobs.data_check import OUT, check_data
from graftwork.jobs.data_sets import DataSet, export_data, import_data, process_data
from graftwork.jobs.history import open_all, record_history
from graftwork.jobs.synthesis import synthesize_data

if TYPE_CHECKING:
    from rich.console import Console

    from graftwork.report.data import DataReport


OUT_DIR = click.option("-o", "--out", "out", type=click.Path(path_type=Path), required=True, metavar="DIR")
LIMIT = click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Read only the first N records.")
COPY = click.option("--copy", is_flag=True, help="Copy all images into the data set.")
REPORT = click.option(
    "--report/--no-report", default=True, help="Write a page on what is in it, which opens every image."
)
RESUME = click.option("--resume", is_flag=True, help="Go on where a command that was killed has stopped.")
SETTINGS = click.option(
    "settings", "--set", multiple=True, metavar="KEY=VALUE", help="A setting of the data source, such as image_folder."
)


@click.group()
def data() -> None:
    """Check data, process it into a data set, ask about its records, turn it into other formats, and say what it is worth."""


data.add_command(value)


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


def making(command: Callable[..., None]) -> Callable[..., None]:
    """The argument and the options of a command that makes a data set of a data file."""
    for add in (JSON, RESUME, REPORT, COPY, LIMIT, OUT_DIR, click.argument("data", type=click.Path(path_type=Path))):
        command = add(command)
    return command


@data.command()
@making
@click.pass_context
def process(ctx: click.Context, /, as_json: bool, **asked: Any) -> None:
    """Read DATA, apply its operators, and write a data set of which the origin of every record is known.

    DATA is a data file, a run file, or a file or folder that a data source recognises. DIR gets records.jsonl, dropped.jsonl,
    changed.jsonl, manifest.json and report.html.
    """
    _make(ctx, process_data, asked, as_json)


@data.command()
@making
@click.pass_context
def synthesize(ctx: click.Context, /, as_json: bool, **asked: Any) -> None:
    """Like process, with operators that make records of what a writer answers, and one that verifies them.

    DATA names the writer in [writer], and in [verify] how what it wrote is verified. DIR gets replies.jsonl as well: every prompt
    and raw reply. A reply that came is never asked for again.
    """
    _make(ctx, synthesize_data, asked, as_json)


def _make(ctx: click.Context, job: Callable[..., DataSet], asked: Mapping[str, Any], as_json: bool) -> None:
    console = progress_console(as_json)
    with drawing(console) as draw:
        made = job(**asked, on_event=draw, lookup=ctx.obj.catalog)
    print_data_set(console, made, as_json)


@data.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--from", "format", required=True, metavar="FORMAT", help="A data source, such as messages or parquet.")
@OUT_DIR
@SETTINGS
@LIMIT
@COPY
@RESUME
@JSON
@click.pass_context
def import_(
    ctx: click.Context,
    path: Path,
    format: str,
    out: Path,
    settings: tuple[str, ...],
    limit: int | None,
    copy: bool,
    resume: bool,
    as_json: bool,
) -> None:
    """Read data of another format, and write it as a data set."""
    console = progress_console(as_json)
    with drawing(console) as draw:
        made = import_data(
            path,
            out,
            format=format,
            settings=parse_settings(settings),
            limit=limit,
            copy=copy,
            resume=resume,
            on_event=draw,
            lookup=ctx.obj.catalog,
        )
    print_data_set(console, made, as_json)


@data.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--to", "format", required=True, metavar="FORMAT", help="A data source, such as llava or data-juicer.")
@OUT_DIR
@JSON
@click.pass_context
def export(ctx: click.Context, data: Path, format: str, out: Path, as_json: bool) -> None:
    """Write DATA, with its images, in another format."""
    console = progress_console(as_json)
    with drawing(console) as draw:
        written = export_data(data, out, format=format, on_event=draw, lookup=ctx.obj.catalog)
    if as_json:
        print_json({"path": str(written)})
    else:
        console.print(f"written: {written}", markup=False, soft_wrap=True)


@data.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.argument("id", required=False)
@JSON
@click.pass_context
def show(ctx: click.Context, folder: Path, id: str | None, as_json: bool) -> None:
    """Say what became of the record ID of a data set, with all that it was made from; without ID what each stage did.

    DIR is a data set, or a checkpoint or run that was trained on one. Of a record that a writer made, its prompts, raw replies and
    verification are shown.
    """
    console = progress_console(as_json)
    if id is None:
        for data_set in open_all(folder):
            print_data_set(console, data_set, as_json)
    elif as_json:
        print_json(record_history(folder, id))
    else:
        print_history(console, record_history(folder, id))


@data.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="By default README.md in DIR.")
@click.pass_context
def card(ctx: click.Context, folder: Path, out: Path | None) -> None:
    """Write the card of a data set: what is in it, where from, who wrote it, how it was verified, what it is not for."""
    click.echo(f"written: {write_data_card(folder, out)}")
