"""`graftwork list` and `graftwork show`: what is installed, whether it works, and everything about one component."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from graftwork.cli import Session
from graftwork.cli.console import is_terminal, make_table, open_console, print_columns, print_json, print_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from graftwork_registry import ComponentRow, PluginRow

WIDE = 180
"""A terminal with this many columns shows a component in one line."""
HEADERS = ("kind", "name", "plugin", "distribution", "ready", "summary")


@click.command("list")
@click.argument("kind", required=False)
@click.option("as_json", "--json", is_flag=True, help="Write JSON.")
@click.pass_obj
def list_components(session: Session, kind: str | None, as_json: bool) -> None:
    """List the installed components, of one KIND or of all, and the plugins that do not work."""
    rows = session.catalog.components(kind)
    plugins = session.catalog.plugins()
    if as_json:
        print_json({"components": [r.to_json() for r in rows], "plugins": [p.to_json() for p in plugins]})
        return
    failed = [plugin for plugin in plugins if plugin.state != "ok"]
    if is_terminal():
        _print_on_terminal(rows, failed)
        return
    print_columns(HEADERS, [_cells(row) for row in rows])
    for plugin in failed:
        click.echo(plugin.sentence)


def _cells(row: ComponentRow) -> tuple[str, ...]:
    origin = f"{row.distribution} {row.version}"
    return row.kind, row.name, row.plugin, origin, row.reason or "ready", row.summary


def _print_on_terminal(rows: Sequence[ComponentRow], failed: Sequence[PluginRow]) -> None:
    console = open_console()
    if console.width >= WIDE:
        console.print(_table(rows))
    else:
        _print_stacked(console, rows)
    for plugin in failed:
        style = "red" if plugin.state == "broken" else "dim"
        console.print(plugin.sentence, style=style, markup=False, soft_wrap=True)


def _table(rows: Sequence[ComponentRow]) -> Table:
    from rich.text import Text

    table = make_table([*(f"{header}*" for header in HEADERS[:4]), *HEADERS[4:]])
    for row in rows:
        styles = ("", "bold", "", "", "green" if row.ready else "yellow", "")
        table.add_row(*map(Text, _cells(row), styles))
    return table


def _print_stacked(console: Console, rows: Sequence[ComponentRow]) -> None:
    """Components under their kinds: a line that says where each comes from, and its summary below."""
    from itertools import groupby

    from rich.padding import Padding
    from rich.text import Text

    width = max((len(row.name) for row in rows), default=0)
    for kind, group in groupby(rows, key=lambda row: row.kind):
        console.print(kind, style="bold underline")
        for row in group:
            origin = f"  {row.plugin} · {row.distribution} {row.version}"
            ready = ("  ready", "green") if row.ready else ("  not ready", "yellow")
            console.print(Text.assemble("  ", (row.name.ljust(width), "bold"), (origin, "dim"), ready))
            console.print(Padding(Text(row.summary), (0, 0, 0, 4)))
            if not row.ready:
                console.print(Padding(Text(row.reason, "yellow"), (0, 0, 0, 4)))


@click.command()
@click.argument("kind")
@click.argument("name")
@click.option("as_json", "--json", is_flag=True, help="Write JSON.")
@click.pass_obj
def show(session: Session, kind: str, name: str, as_json: bool) -> None:
    """Show everything about the component NAME of a KIND: its settings, what it needs, and where it is."""
    from graftwork.jobs.catalogue import describe_component

    found = describe_component(session.catalog, kind, name)
    row = found.row
    if as_json:
        print_json(found.to_json())
        return
    click.echo(f"{row.kind} {click.style(row.name, bold=True)}: {row.summary}")
    if found.about:
        click.echo(f"\n{found.about}")
    lines = {
        "plugin": f"{row.plugin}, from {row.distribution} {row.version}",
        "file": f"{row.file}:{row.line}",
        "needs": ", ".join(found.needs) or "nothing",
        "ready": "yes" if row.ready else f"no: {row.reason}",
        "refuses": found.refuses,
        "approximates": found.approximates,
    }
    click.echo()
    for fact, value in lines.items():
        if value:
            click.echo(f"{fact:<12} {value}")
    if found.settings:
        click.echo()
        print_table(
            ("setting*", "type", "default", "help"), [(s.name, s.type, s.default, s.help) for s in found.settings]
        )
