"""`graftwork list` and `graftwork show`: what is installed, whether it works, and everything about one component."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from graftwork.cli import Session
from graftwork.cli.console import is_terminal, make_table, open_console, print_columns, print_json, print_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from graftwork.contracts.component import Approximation, Component
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
    from graftwork.config.settings import rows as settings_of

    row = session.catalog.row(kind, name)
    settings = settings_of(row.component.Settings)
    needs, refuses, approximates = _needs(row.component), _refused_plans(row.component), _approximation(row.component)
    about = _about(row.component)
    if as_json:
        table = [vars(setting) for setting in settings]
        facts = {"needs": needs, "refuses": refuses, "approximates": approximates}
        print_json({**row.to_json(), "about": about, "settings": table, **facts})
        return
    click.echo(f"{row.kind} {click.style(row.name, bold=True)}: {row.summary}")
    if about:
        click.echo(f"\n{about}")
    lines = {
        "plugin": f"{row.plugin}, from {row.distribution} {row.version}",
        "file": f"{row.file}:{row.line}",
        "needs": ", ".join(needs) or "nothing",
        "ready": "yes" if row.ready else f"no: {row.reason}",
        "refuses": refuses,
        "approximates": approximates,
    }
    click.echo()
    for fact, value in lines.items():
        if value:
            click.echo(f"{fact:<12} {value}")
    if settings:
        click.echo()
        print_table(("setting*", "type", "default", "help"), [(s.name, s.type, s.default, s.help) for s in settings])


def _about(component: type[Component[Any]]) -> str:
    """The docstring after its first line."""
    import inspect

    _, _, rest = (inspect.getdoc(component) or "").partition("\n")
    return rest.strip()


def _needs(component: type[Component[Any]]) -> list[str]:
    cuda = component.requires.cuda
    return [*component.requires.packages, *([f"CUDA compute capability {cuda[0]}.{cuda[1]}"] if cuda else [])]


def _approximation(component: type[Component[Any]]) -> str:
    """What a memory strategy approximates, and how far a step may be from a plain one; empty for all others."""
    approximates: Approximation | None = getattr(component, "approximates", None)
    return (
        f"{approximates.reason}: a step is within {approximates.tolerance:.0%} of a plain one" if approximates else ""
    )


def _refused_plans(component: type[Component[Any]]) -> str:
    """Which plans the component refuses, as it says; empty where it refuses none."""
    from graftwork.contracts.component import Component

    if component.validate is Component.validate:
        return ""
    return " ".join((component.validate.__doc__ or "some plans").split())
