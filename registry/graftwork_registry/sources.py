"""Where plugins come from: the entry points of this environment, and single files."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from importlib.metadata import Distribution

GROUP = "graftwork.plugins"
"""The entry-point group in which distributions declare their plugins."""


class Source(NamedTuple):
    """A plugin that was found and is not imported yet."""

    name: str
    distribution: str
    version: str
    requires: tuple[str, ...]
    """What the distribution requires, as PEP 508 requirements."""
    origin: str
    """What is imported: the `module` or `module:attribute` of an entry point, or a file."""
    load: Callable[[], object]
    installed: bool = True
    """Whether it was found in the environment; otherwise its file was given."""


def find_sources(files: Sequence[Path]) -> list[Source]:
    """Every plugin of this environment and of `files`, by name; equal names get their distribution in front."""
    from importlib.metadata import entry_points

    describe = cache(_describe)  # one distribution may have many plugins
    found = [Source(e.name, *describe(e.dist), e.value, e.load) for e in entry_points(group=GROUP)]
    found += [_from_file(file) for file in dict.fromkeys(file.resolve() for file in files)]
    times = Counter(source.name for source in found)
    unique = [s if times[s.name] == 1 else s._replace(name=f"{s.distribution}/{s.name}") for s in found]
    return sorted(unique, key=lambda source: source.name)


def _describe(distribution: Distribution | None) -> tuple[str, str, tuple[str, ...]]:
    """Its name, its version, and what it requires."""
    try:
        metadata = distribution.metadata  # type: ignore[union-attr]
        name, version = (metadata.get_all(key, ["unknown"])[0] for key in ("Name", "Version"))
        return name, version, tuple(metadata.get_all("Requires-Dist", []))
    except Exception:  # a damaged distribution has no metadata; its plugin may still work
        return "unknown", "unknown", ()


def _from_file(file: Path) -> Source:
    def load() -> object:
        from importlib.util import module_from_spec, spec_from_file_location

        spec = spec_from_file_location(f"graftwork_file_{file.stem}", file)
        if spec is None or spec.loader is None:
            raise ImportError(f"'{file}' is not a Python file")
        module = module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
        return module

    return Source(file.stem.replace("_", "-"), file.name, "", (), str(file), load, installed=False)
