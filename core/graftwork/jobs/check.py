"""The conformance kit against the components of one plugin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.errors import ComponentNotFound

if TYPE_CHECKING:
    from graftwork.conformance import Outcome
    from graftwork_registry import Catalog, PluginRow


def check(
    plugin: str,
    *,
    settings: Mapping[str, dict[str, Any]] | None = None,
    config: Path | None = None,
    files: Sequence[Path] = (),
    disable: Sequence[str] = (),
) -> Iterator[Outcome]:
    """Every check that fits a plugin, named as `graftwork list` does or by its file, and its components.

    `settings` are those of components by their names, `config` is a folder to configure models and towers from. `files` are
    other plugins to load, `disable` those not to load.
    """
    from graftwork_registry import Catalog

    if plugin.endswith(".py"):
        file = Path(plugin).resolve()
        if not file.is_file():
            raise ComponentNotFound(f"there is no file '{plugin}'; name a plugin, or its file")
        files, plugin = [*files, file], str(file)
    catalog = Catalog.discover(files=files, disable=disable)
    row = find_plugin(catalog, plugin)
    names = sorted(each.name for each in catalog.components() if each.plugin == row.name)
    if unknown := sorted((settings or {}).keys() - set(names)):
        known = ", ".join(names) or "none"
        raise ComponentNotFound(f"'{row.name}' has no component '{unknown[0]}' to set anything of; it has {known}")
    yield from examine_plugin(catalog, row, settings or {}, config, files)


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


def examine_plugin(
    catalog: Catalog,
    plugin: PluginRow,
    settings: Mapping[str, dict[str, Any]],
    config: Path | None,
    files: Sequence[Path],
) -> Iterator[Outcome]:
    """Every check that fits the plugin and its components, one after another."""
    from graftwork.conformance import Outcome, examine
    from graftwork.conformance.laziness import examine_imports

    broken = plugin.state == "broken"
    sentence = f"a plugin must load and bring sound components, and {plugin.sentence}; fix it" if broken else ""
    yield Outcome("plugin", plugin.name, "it loads and registers", "failed" if broken else "passed", sentence)
    others = [row.name for row in catalog.plugins() if row.name != plugin.name]
    yield from examine_imports(plugin.name, files, others)
    for row in catalog.components():
        if row.plugin == plugin.name:
            own = settings.get(row.name)
            yield from examine(row.component, settings=own, config=config, unmet_requirement=row.reason)
