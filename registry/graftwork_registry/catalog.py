"""The catalogue: every plugin and component of this environment, and the lookup of one by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pluggy

from graftwork.contracts import hookspecs
from graftwork.contracts.kinds import KINDS
from graftwork.contracts.lookup import Found
from graftwork.errors import ComponentNotFound
from graftwork_registry.loading import Loaded, load
from graftwork_registry.rows import ComponentRow, PluginRow
from graftwork_registry.sources import Source, find_sources
from graftwork_registry.wording import in_one_line, nearest

DISABLE = "GRAFTWORK_DISABLE"
"""The environment variable that names plugins not to load, with commas between them; `*` for all installed ones."""


class Catalog:
    """The plugins of an environment and their components; a `graftwork.contracts.lookup.Lookup`."""

    def __init__(self, loaded: Sequence[Loaded], disabled: Sequence[Source] = (), options: Sequence[str] = ()) -> None:
        self._loaded = loaded
        self._disabled = disabled
        self._options = options
        self.muted: dict[str, str] = {}
        """The plugins whose observers raised, and what they raised; they get no more events."""
        order = list(KINDS)
        self._components = sorted(
            (
                ComponentRow(c.kind, c.name, p.source.name, p.source.distribution, p.source.version, c)
                for p in loaded
                for c in p.components
            ),
            key=lambda row: (order.index(row.kind), row.name, row.plugin),
        )

    @classmethod
    def discover(cls, *, files: Sequence[Path] = (), disable: Sequence[str] = ()) -> Catalog:
        """Load every installed plugin and the plugins in `files`, except those that `disable` or the environment names.

        Nothing that a plugin does wrong raises here. ComponentNotFound when `disable` names a plugin that is not there.
        """
        blocked = {*disable, *(name.strip() for name in os.environ.get(DISABLE, "").split(","))}
        found = find_sources(files)
        unknown = [name for name in disable if name != "*" and name not in {source.name for source in found}]
        if unknown:
            names = ", ".join(source.name for source in found) or "none"
            raise ComponentNotFound(f"--disable: no plugin is called '{unknown[0]}'; installed: {names}")
        disabled = [s for s in found if s.name in blocked or ("*" in blocked and s.installed)]
        manager = pluggy.PluginManager("graftwork")
        manager.add_hookspecs(hookspecs)
        options = [word for file in files for word in ("--plugin", str(Path(file).resolve()))]
        options += [word for name in disable for word in ("--disable", name)]
        return cls([load(source, manager) for source in found if source not in disabled], disabled, options)

    def options(self) -> list[str]:
        """The options with which the command line finds the same plugins in another process."""
        return [*self._options]

    def plugins(self) -> list[PluginRow]:
        """Every plugin, by name."""
        rows = [_plugin_row(plugin) for plugin in self._loaded]
        for s in self._disabled:
            sentence = f"plugin '{s.name}' is disabled by --disable or {DISABLE}"
            rows.append(PluginRow(s.name, s.distribution, s.version, s.origin, "disabled", sentence))
        return sorted(rows, key=lambda row: row.name)

    def components(self, kind: str | None = None) -> list[ComponentRow]:
        """The components of one kind, or of all, by kind and name; ComponentNotFound for an unknown kind."""
        if kind is not None:
            _check(kind)
        return [row for row in self._components if kind in (None, row.kind)]

    def names(self, kind: str, ready_only: bool = False) -> list[str]:
        """What `find` takes for a kind: bare names, and `plugin:name` where two plugins have one."""
        rows = self.components(kind)
        bare = [row.name for row in rows]
        return [
            row.name if bare.count(row.name) == 1 else f"{row.plugin}:{row.name}"
            for row in rows
            if row.ready or not ready_only
        ]

    def row(self, kind: str, name: str) -> ComponentRow:
        """The component `name`, or `plugin:name`; ComponentNotFound with the nearest names and the broken plugins."""
        rows = self.components(kind)
        matches = [row for row in rows if name in (row.name, f"{row.plugin}:{row.name}")]
        if len(matches) == 1:
            return matches[0]
        if matches:
            choices = " or ".join(f"'{row.plugin}:{row.name}'" for row in matches)
            raise ComponentNotFound(f"{kind}: '{name}' is in {len(matches)} plugins; write {choices}")
        raise self._not_found(kind, name, rows)

    def find(self, kind: str, name: str) -> Found:
        """The component `name`, or `plugin:name`; ComponentNotFound with the nearest names and the broken plugins."""
        row = self.row(kind, name)
        return Found(row.component, row.plugin, row.distribution, row.version)

    def emit(self, event: object) -> None:
        """Send an event to every observer; one that raises is muted, and reported once."""
        for plugin in self._loaded:
            name = plugin.source.name
            for observer in plugin.observers:
                if name in self.muted:
                    continue
                try:  # pluggy has checked that the only argument there can be is the event
                    observer.function(*[event for _ in observer.argnames])
                except (Exception, SystemExit) as error:
                    self._mute(name, event, error)

    def _mute(self, name: str, event: object, error: BaseException) -> None:
        import logging

        self.muted[name] = in_one_line(error)
        what = f"plugin '{name}' failed when told of {type(event).__name__}, and is told nothing more"
        logging.getLogger("graftwork").warning("%s: %s", what, self.muted[name])

    def _not_found(self, kind: str, name: str, rows: Sequence[ComponentRow]) -> ComponentNotFound:
        known = self.names(kind)
        suggestion = nearest(name, [*known, *(f"{row.plugin}:{row.name}" for row in rows)])
        details = [
            f"plugin '{plugin.source.name}' {fault.clause}"
            for plugin in self._loaded
            for fault in plugin.faults
            if kind in fault.kinds
        ]
        if self._disabled:
            details.append(f"disabled plugins: {', '.join(source.name for source in self._disabled)}")
        installed = ", ".join(known) or "none"
        return ComponentNotFound(f"{kind}: nothing is called '{name}'{suggestion}; installed: {installed}", details)


def _plugin_row(plugin: Loaded) -> PluginRow:
    s = plugin.source
    if not plugin.faults:
        return PluginRow(s.name, s.distribution, s.version, plugin.origin, "ok")
    sentence = f"plugin '{s.name}' {', and '.join(fault.clause for fault in plugin.faults)}"
    tracebacks = "\n".join(fault.traceback for fault in plugin.faults if fault.traceback)
    return PluginRow(s.name, s.distribution, s.version, plugin.origin, "broken", sentence, tracebacks)


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ComponentNotFound(
            f"no kind of component is called '{kind}'{nearest(kind, KINDS)}; the kinds are {', '.join(KINDS)}"
        )
