"""What the catalogue lists of a plugin and of a component: plain rows, for people and for JSON."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from graftwork.contracts.component import Component
from graftwork_registry.readiness import unmet_requirement


class PluginRow(NamedTuple):
    """A plugin and its state."""

    name: str
    distribution: str
    version: str
    origin: str
    """The file it was imported from, or what its entry point names where it was not imported."""
    state: Literal["ok", "broken", "disabled"]
    sentence: str = ""
    """Why it is broken or disabled, and what to do; empty for one that works."""
    traceback: str = ""

    def to_json(self) -> dict[str, Any]:
        """The row as plain data."""
        return self._asdict()


@dataclass(frozen=True)
class ComponentRow:
    """A component, the plugin that brings it, and whether it works on this machine."""

    kind: str
    name: str
    plugin: str
    distribution: str
    version: str
    component: type[Component[Any]]

    @cached_property
    def reason(self) -> str:
        """What keeps the component from working here; empty when nothing does."""
        return unmet_requirement(self.component.requires)

    @property
    def ready(self) -> bool:
        """Whether everything that the component requires is here."""
        return not self.reason

    @property
    def summary(self) -> str:
        """The component in one line."""
        return self.component.summary()

    @cached_property
    def source(self) -> tuple[str, int]:
        """The file and the line at which the class begins; `("", 0)` where there is none."""
        import re  # inspect.getsourcelines would parse the whole file, for each class

        file = getattr(sys.modules.get(self.component.__module__), "__file__", None)
        text = Path(file).read_text(encoding="utf-8", errors="replace") if file else ""
        begin = re.search(rf"^[ \t]*class {self.component.__name__}\b", text, re.MULTILINE)
        return (str(file), text.count("\n", 0, begin.start()) + 1) if begin else ("", 0)

    @property
    def file(self) -> str:
        """The file that holds the class."""
        return self.source[0]

    @property
    def line(self) -> int:
        """The line of the file at which the class begins."""
        return self.source[1]

    def to_json(self) -> dict[str, Any]:
        """The row as plain data."""
        keys = ("kind", "name", "plugin", "distribution", "version", "ready", "reason", "summary", "file", "line")
        return {key: getattr(self, key) for key in keys}
