"""How commands write: for people in a terminal, uncut into a pipe, or as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from graftwork import processes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPE_WIDTH = 10_000
"""Columns of a pipe or a file: more than any line has."""


def is_terminal() -> bool:
    """Whether the standard output is a terminal, or should be treated as one (FORCE_COLOR)."""
    return sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))


def open_console() -> Console:
    """The standard output, as wide as the terminal, or as wide as need be where there is none.

    Of several processes only the first writes.
    """
    from rich.console import Console

    width = None if is_terminal() else PIPE_WIDTH
    return Console(highlight=False, emoji=False, width=width, quiet=not processes.is_first())


def progress_console(quiet: bool) -> Console:
    """Where progress goes: the standard output, or the standard error where the former is kept `quiet` for the result."""
    from rich.console import Console

    if not quiet:
        return open_console()
    options: dict[str, Any] = {"stderr": True, "highlight": False, "quiet": not processes.is_first()}
    console = Console(**options)
    return console if console.is_terminal else Console(**options, width=PIPE_WIDTH)


def make_table(headers: Sequence[str]) -> Table:
    """An empty table without a frame; the cells under headers that end in `*` are never wrapped."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for header in headers:
        table.add_column(header.rstrip("*"), no_wrap=header.endswith("*"))
    return table


def print_facts(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Labels with a text each."""
    from rich.table import Table

    table = Table.grid(padding=(0, 3))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for label, text in rows:
        table.add_row(label, text)
    console.print(table)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows as a table in a terminal, as columns into a pipe."""
    if not is_terminal():
        print_columns([header.rstrip("*") for header in headers], rows)
        return
    from rich.text import Text

    table = make_table(headers)
    for row in rows:
        table.add_row(*map(Text, row))
    open_console().print(table)


def print_columns(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows for a pipe: aligned, uncut, and without importing rich, which takes long."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in (headers, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_json(data: Any) -> None:
    """Plain data as indented JSON on the standard output, by the first of several processes."""
    if processes.is_first():
        click.echo(json.dumps(data, indent=2, ensure_ascii=False))
