"""What is installed, described for people and for editors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftwork.config.settings import SettingRow, rows

if TYPE_CHECKING:
    from graftwork.contracts.component import Approximation, Component
    from graftwork_registry import Catalog, ComponentRow


@dataclass(frozen=True)
class Described:
    """Everything about one component."""

    row: ComponentRow
    about: str
    """Its docstring after the first line."""
    needs: list[str]
    refuses: str
    approximates: str
    settings: list[SettingRow]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        facts = {"needs": self.needs, "refuses": self.refuses, "approximates": self.approximates}
        return {**self.row.to_json(), "about": self.about, "settings": [vars(s) for s in self.settings], **facts}


def describe_component(catalog: Catalog, kind: str, name: str) -> Described:
    """Everything about a component; ComponentNotFound with the nearest names where there is none."""
    row = catalog.row(kind, name)
    component = row.component
    return Described(
        row,
        _about(component),
        _needs(component),
        _refused_plans(component),
        _approximation(component),
        rows(component.Settings),
    )


def run_file_schema(catalog: Catalog) -> dict[str, Any]:
    """The JSON Schema of the run files that the components of a catalogue allow."""
    from graftwork.config.schema import schema

    return schema(row.component for row in catalog.components())


def _about(component: type[Component[Any]]) -> str:
    """The docstring after its first line."""
    import inspect

    _, _, rest = (inspect.getdoc(component) or "").partition("\n")
    return rest.strip()


def _needs(component: type[Component[Any]]) -> list[str]:
    cuda = component.requires.cuda
    return [*component.requires.packages, *([f"CUDA compute capability {cuda[0]}.{cuda[1]}"] if cuda else [])]


def _approximation(component: type[Component[Any]]) -> str:
    """What a memory strategy approximates, and how far a step may be from a plain one; empty for all others."""
    approximates: Approximation | None = getattr(component, "approximates", None)
    return (
        f"{approximates.reason}: a step is within {approximates.tolerance:.0%} of a plain one" if approximates else ""
    )


def _refused_plans(component: type[Component[Any]]) -> str:
    """Which plans the component refuses, as it says; empty where it refuses none."""
    from graftwork.contracts.component import Component

    if component.validate is Component.validate:
        return ""
    return " ".join((component.validate.__doc__ or "some plans").split())
