"""`graftwork check`: the conformance kit against the components of one plugin."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graftwork.cli import Session
from graftwork.cli.console import print_json
from graftwork.errors import ComponentNotFound

if TYPE_CHECKING:
    from graftwork.conformance import Outcome
    from graftwork_registry import Catalog, PluginRow

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

    session = ctx.obj
    if plugin.endswith(".py"):
        file = Path(plugin).resolve()
        if not file.is_file():
            raise ComponentNotFound(f"there is no file '{plugin}'; name a plugin, or its file")
        session = Session([*session.files, file], session.disable, session.debug)
        plugin = str(file)
    row = find_plugin(session.catalog, plugin)
    outcomes: list[Outcome] = []
    for outcome in examine_plugin(session, row, settings_of(session.catalog, row, overrides), config):
        outcomes.append(outcome)
        if not as_json:
            _print(outcome, first=len(outcomes) == 1 or outcome[:2] != outcomes[-2][:2])
    counts: Counter[str] = Counter(outcome.state for outcome in outcomes)
    if as_json:
        print_json({"plugin": row.name, **counts, "outcomes": [outcome._asdict() for outcome in outcomes]})
    else:
        click.echo("\n" + ", ".join(f"{counts[state]} {state}" for state in COLOURS if counts[state]))
    ctx.exit(1 if counts["failed"] else 0)


def find_plugin(catalog: Catalog, requested: str) -> PluginRow:
    """The plugin of that name or file; ComponentNotFound otherwise."""
    from graftwork.config.wording import suggestion

    rows = catalog.plugins()
    for row in rows:
        # A file's plugin has the file's name with hyphens, which is easily forgotten.
        if requested in (row.name, row.origin) or requested.replace("_", "-") == row.name:
            if row.state == "disabled":
                raise ComponentNotFound(f"{row.sentence}; enable it to check it")
            return row
    raise ComponentNotFound(f"no plugin is called '{requested}'{suggestion(requested, [row.name for row in rows])}")


def settings_of(catalog: Catalog, plugin: PluginRow, overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Component to the settings that `--set` gives it."""
    names = {row.name for row in catalog.components() if row.plugin == plugin.name}
    tables: dict[str, dict[str, Any]] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        name, dot, key = path.partition(".")
        if not (equals and dot and key) or name not in names:
            known = ", ".join(sorted(names)) or "none"
            raise click.UsageError(f"--set takes NAME.KEY=VALUE, not '{override}'; the components are {known}")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        tables.setdefault(name, {})[key] = value
    return tables


def examine_plugin(
    session: Session, plugin: PluginRow, settings: dict[str, dict[str, Any]], config: Path | None
) -> Iterator[Outcome]:
    """Every check that fits the plugin and its components, one after another."""
    from graftwork.conformance import Outcome, examine
    from graftwork.conformance.laziness import examine_imports

    broken = plugin.state == "broken"
    sentence = f"a plugin must load and bring sound components, and {plugin.sentence}; fix it" if broken else ""
    yield Outcome("plugin", plugin.name, "it loads and registers", "failed" if broken else "passed", sentence)
    others = [row.name for row in session.catalog.plugins() if row.name != plugin.name]
    yield from examine_imports(plugin.name, session.files, others)
    for row in session.catalog.components():
        if row.plugin == plugin.name:
            own = settings.get(row.name)
            yield from examine(row.component, settings=own, config=config, unmet_requirement=row.reason)


def _print(outcome: Outcome, *, first: bool) -> None:
    if first:
        click.echo(click.style(f"{outcome.kind} {outcome.component}", bold=True))
    reason = f": {outcome.sentence}" if outcome.sentence else ""
    click.echo(f"  {click.style(outcome.state.ljust(7), COLOURS[outcome.state])}  {outcome.check}{reason}")
