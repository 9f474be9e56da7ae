"""`graftwork new`: a plugin package that works, to start from."""

from __future__ import annotations

from pathlib import Path

import click

from graftwork.contracts.kinds import KINDS
from graftwork.jobs.scaffold import write_plugin


@click.command()
@click.argument("kind", type=click.Choice([*KINDS]))
@click.argument("name")
@click.option(
    "--into", type=click.Path(file_okay=False, path_type=Path), default=".", help="The folder to write it to."
)
def new(kind: str, name: str, into: Path) -> None:
    """Write a plugin package with a working component of a KIND, called NAME, with its tests.

    What it does is small and real; replace it with your own.
    """
    module, *others = write_plugin(kind, name, into)
    names = ", ".join(file.name for file in (module, *others))
    click.echo(f"Wrote {names} into '{module.parent}'. Try it without installing it, or install it:")
    click.echo(f"  graftwork --plugin {module} show {kind} {name}")
    click.echo(f"  pip install -e {module.parent} && graftwork check {name}")
