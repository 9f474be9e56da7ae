"""`graftwork doctor`: this environment as Graftwork finds it, what is wrong with it, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from graftwork.cli import Session
from graftwork.cli.console import print_json
from graftwork.jobs import doctor as jobs

if TYPE_CHECKING:
    from graftwork.jobs.doctor import Examined


@click.command()
@click.option("as_json", "--json", is_flag=True, help="Write JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show what this environment is, what is wrong with it, and what to do; the exit status is 1 if anything is."""
    session: Session = ctx.obj
    examined = jobs.examine_environment(session.catalog)
    if as_json:
        print_json(examined.to_json())
    else:
        _print(examined)
    ctx.exit(1 if examined.problems else 0)


def _print(examined: Examined) -> None:
    facts, plugins, problems = examined.facts, examined.plugins, examined.problems
    width = max(map(len, [*facts, *(plugin.name for plugin in plugins)]))
    for name, fact in facts.items():
        click.echo(f"{name:<{width}}  {fact}")
    click.echo("\nPlugins")
    for plugin in plugins:
        click.echo(
            f"{plugin.name:<{width}}  {plugin.state:<8}  {plugin.distribution} {plugin.version}  {plugin.origin}"
        )
    click.echo("\nProblems" if problems else "\nNo problem was found.")
    for number, problem in enumerate(problems, 1):
        click.secho(f"{number}. {problem.what}", fg="red")
        click.echo(f"   What to do: {problem.remedy}")
        for line in problem.evidence.rstrip().splitlines():
            click.secho(f"   | {line}", dim=True)
