"""The way back from recorded choices to components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from graftwork.config.restore import restore_component
from graftwork.contracts import Choice, DictLookup, Found, MemoryStrategy, setting
from graftwork.errors import CheckpointError, ComponentNotFound


@dataclass(frozen=True)
class Layers:
    layers: int = setting(2, "How many layers", minimum=1)


class Saver(MemoryStrategy[Layers]):
    """A strategy that does nothing."""

    name = "saver"
    Settings = Layers


class Twins:
    """A lookup with a component in two plugins, whose bare name is refused."""

    def find(self, kind: str, name: str) -> Found:
        if name in ("one:saver", "two:saver"):
            return Found(Saver, name.partition(":")[0], "twins", "1")
        raise ComponentNotFound(f"{kind}: '{name}' is in 2 plugins; write 'one:{name}' or 'two:{name}'", ["a detail"])

    def emit(self, event: object) -> None: ...


def choice_of(plugin: str, **more: Any) -> Choice:
    return Choice("memory", "saver", plugin, "acme-saver", "1.2", settings={"layers": 4}, **more)


def test_a_recorded_choice_is_restored_with_its_settings() -> None:
    component = restore_component(choice_of("dictionary"), DictLookup(Saver))
    assert isinstance(component, Saver)
    assert component.settings == Layers(4)
    assert isinstance(restore_component(choice_of("two"), Twins()), Saver)


def test_what_is_not_installed_is_named_with_the_line_that_installs_it() -> None:
    with pytest.raises(CheckpointError) as caught:
        restore_component(choice_of("three"), Twins())
    assert str(caught.value) == (
        "this needs 'saver' (memory) of plugin 'three', which is not installed or does not work: "
        'pip install "acme-saver==1.2"\n'
        "  memory: 'saver' is in 2 plugins; write 'one:saver' or 'two:saver'\n"
        "  a detail"
    )


def test_a_choice_of_a_newer_settings_version_is_refused() -> None:
    with pytest.raises(CheckpointError, match="were written in version 2"):
        restore_component(choice_of("dictionary", settings_version=2), DictLookup(Saver))
