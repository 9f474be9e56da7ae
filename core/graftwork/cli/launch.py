"""The option `--processes`, which runs a command on several processes of this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from graftwork import processes
from graftwork.cli import ARGUMENTS


def on_processes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--processes N`; it then runs on each of them, or on those that a launcher started."""

    @click.option(
        "--processes",
        "count",
        type=click.IntRange(1),
        metavar="N",
        help="Run on N processes of this machine; by default one, or those of a launcher such as torchrun.",
    )
    @wraps(command)
    def run(*arguments: Any, count: int | None, **options: Any) -> None:
        if count and count > 1 and not processes.launched_distributed():
            from graftwork.jobs.launching import launch

            ctx = click.get_current_context()
            ctx.exit(launch([sys.executable, "-m", "graftwork", *ctx.meta[ARGUMENTS]], count))
        with processes.join(options["device"], count):
            command(*arguments, **options)

    return run
