"""`graftwork check`: the conformance kit against the components of one plugin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graftwork.cli import Session
from graftwork.cli.console import print_json
from graftwork.cli.options import parse_settings
from graftwork.jobs import check as jobs

if TYPE_CHECKING:
    from graftwork.conformance import Outcome

COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}


@click.command()
@click.argument("plugin")
@click.option(
    "overrides",
    "--set",
    multiple=True,
    metavar="NAME.KEY=VALUE",
    help="A setting of the component NAME, such as a file that it reads.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path),
    metavar="DIR",
    help="A folder to configure models and towers from; by default the example that they write.",
)
@click.option("as_json", "--json", is_flag=True, help="Write JSON.")
@click.pass_context
def check(ctx: click.Context, plugin: str, overrides: tuple[str, ...], config: Path | None, as_json: bool) -> None:
    """Check that PLUGIN, by its name in `graftwork list` or by its FILE.py, meets the contracts of its kinds.

    One line for each check; the exit status is 1 when one failed.
    """
    from collections import Counter

    session: Session = ctx.obj
    found: list[Outcome] = []
    settings = parse_tables(overrides)
    for outcome in jobs.check(plugin, settings=settings, config=config, files=session.files, disable=session.disable):
        found.append(outcome)
        if not as_json:
            _print(outcome, first=len(found) == 1 or outcome[:2] != found[-2][:2])
    counts: Counter[str] = Counter(outcome.state for outcome in found)
    if as_json:
        print_json({"plugin": found[0].component, **counts, "outcomes": [outcome._asdict() for outcome in found]})
    else:
        click.echo("\n" + ", ".join(f"{counts[state]} {state}" for state in COLOURS if counts[state]))
    ctx.exit(1 if counts["failed"] else 0)


def parse_tables(overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`NAME.KEY=VALUE` options as a table of each component; a usage error for anything else."""
    tables: dict[str, dict[str, Any]] = {}
    for override in overrides:
        name, dot, rest = override.partition(".")
        if not dot or "=" in name:
            raise click.UsageError(f"--set takes NAME.KEY=VALUE, not '{override}'")
        tables.setdefault(name, {}).update(parse_settings((rest,), "NAME.KEY=VALUE"))
    return tables


def _print(outcome: Outcome, *, first: bool) -> None:
    if first:
        click.echo(click.style(f"{outcome.kind} {outcome.component}", bold=True))
    reason = f": {outcome.sentence}" if outcome.sentence else ""
    click.echo(f"  {click.style(outcome.state.ljust(7), COLOURS[outcome.state])}  {outcome.check}{reason}")
