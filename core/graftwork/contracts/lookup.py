"""How the engine asks for components: a protocol that a catalogue, or a dictionary in a test, fulfils."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from graftwork.contracts.component import Component
from graftwork.errors import ComponentNotFound


@dataclass(frozen=True)
class Found:
    """A component class and where it came from."""

    component: type[Component[Any]]
    plugin: str
    distribution: str
    version: str


class Lookup(Protocol):
    """What can be asked for a component by kind and name (`lora`, or `plugin:lora` where two plugins have one)."""

    def find(self, kind: str, name: str) -> Found:
        """The component, or ComponentNotFound with the nearest names and the plugins that failed."""
        ...

    def names(self, kind: str, ready_only: bool = False) -> list[str]:
        """What `find` takes for a kind; with `ready_only` only what this machine has all requirements of."""
        ...

    def options(self) -> list[str]:
        """The options with which the command line finds the same components in another process."""
        ...

    def emit(self, event: object) -> None:
        """Tell every observer; one that raises is muted and reported."""
        ...


class DictLookup:
    """A lookup over a plain collection of classes, for tests and notebooks."""

    def __init__(self, *components: type[Component[Any]]) -> None:
        self._components: Mapping[tuple[str, str], type[Component[Any]]] = {(c.kind, c.name): c for c in components}
        self.events: list[object] = []

    def find(self, kind: str, name: str) -> Found:
        """The component, or ComponentNotFound."""
        try:
            return Found(self._components[kind, name], plugin="dictionary", distribution="dictionary", version="0")
        except KeyError:
            names = ", ".join(self.names(kind)) or "none"
            raise ComponentNotFound(f"{kind}: nothing is called '{name}'; known: {names}") from None

    def names(self, kind: str, ready_only: bool = False) -> list[str]:
        """The names of a kind; all of them count as ready."""
        return sorted(n for k, n in self._components if k == kind)

    def options(self) -> list[str]:
        """None: the command line knows nothing of a dictionary."""
        return []

    def emit(self, event: object) -> None:
        """Keep the event."""
        self.events.append(event)
