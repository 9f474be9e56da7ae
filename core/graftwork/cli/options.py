"""The options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

TAKE_OVER = click.option(
    "--take-over", is_flag=True, help="Write into a folder whose lock, another machine's, was silent for ten minutes."
)
DEVICE = click.option("--device", metavar="NAME", help="Such as cpu or cuda:1; by default cuda where there is one.")


def place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say where the base and the towers of a folder of other code are."""
    base = click.option(
        "base",
        "--base",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="What it was trained from: a folder, or a hub id.",
    )
    part = click.option(
        "parts", "--part", multiple=True, metavar="NAME=DIR", help="The tower of one part, such as low=DIR."
    )
    search = click.option(
        "search",
        "--search",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Search below this folder for both; their names do not matter.",
    )
    return base(part(search(command)))


FOLDER = click.argument("checkpoint", type=click.Path(path_type=Path))


PRECISION = click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="What to store; by default as the base weights are.",
)


JSON = click.option("as_json", "--json", is_flag=True, help="Print JSON.")


def base_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say where base weights are now."""
    base = click.option(
        "base",
        "--base-weights",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Where the base weights are now: a folder, or a hub id.",
    )
    part = click.option(
        "parts", "--part", multiple=True, metavar="NAME=DIR", help="Where the weights of one part are now."
    )
    return base(part(command))


def parse_parts(parts: tuple[str, ...]) -> dict[str, Path]:
    """`NAME=DIR` options as a dictionary; a usage error for anything else."""
    named = {}
    for given in parts:
        name, equals, folder = given.partition("=")
        if not (name and equals and folder):
            raise click.UsageError(f"--part takes NAME=DIR, such as low=weights/clip, not '{given}'")
        named[name] = Path(folder)
    return named


def parse_settings(overrides: tuple[str, ...], form: str = "KEY=VALUE, such as split=test") -> dict[str, Any]:
    """`KEY=VALUE` options as a table; a usage error for anything else."""
    from graftwork.jobs.run import override_value

    table: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not (key and equals):
            raise click.UsageError(f"--set takes {form}, not '{override}'")
        table[key] = override_value(value)
    return table
