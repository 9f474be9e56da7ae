"""Runs: read from a file or given as tables, and resolved to a plan on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.config import runfile
from graftwork.config.machine import detect_machine
from graftwork.config.resolve import resolve
from graftwork.config.runfile import override_value as override_value
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Plan

if TYPE_CHECKING:
    from graftwork_registry import Catalog


class Run:
    """What is trained, on what, and how: the tables of a run file as keyword arguments, checked as the file is.

        Run(model={"use": "mgm-gemma", "weights": "base"}, peft={"use": "lora", "on": ["language.mlp"]}, out="out")

    Relative paths start at `folder`. Raises RunFileError with every mistake.
    """

    def __init__(self, *, folder: str | PathLike[str] = ".", **tables: Any) -> None:
        self.file = runfile.parse_run(tables, Path(folder).absolute())

    @classmethod
    def of(cls, run: Run | Mapping[str, Any] | str | PathLike[str]) -> Run:
        """A run as it is, made from a dictionary of tables, or read from a run file."""
        if isinstance(run, Run):
            return run
        return cls(**run) if isinstance(run, Mapping) else load_run(run)

    @classmethod
    def read(cls, file: runfile.RunFile) -> Run:
        """The run of a file that was read."""
        run = cls.__new__(cls)
        run.file = file
        return run

    @property
    def out(self) -> Path:
        """The folder to write into where no other is given."""
        return self.file.out

    def plan(self, lookup: Lookup | None = None, *, fetch: bool = True, missing: list[str] | None = None) -> Plan:
        """Every choice resolved against the installed components and this machine (see `config.resolve.resolve`).

        Weights of the hub are downloaded, unless `fetch` is false. With `missing`, files that are not there are added to
        it instead of refused. Raises PlanRefused with every mistake.
        """
        lookup = lookup or installed()
        kernels = preferred_kernels(lookup)
        return resolve(self.file, lookup, detect_machine(), kernels=kernels, fetch=fetch, missing_files=missing)

    def __repr__(self) -> str:
        model, peft = self.file.model.use, self.file.peft
        return f"<Run of {model} with {peft.use if peft else 'no PEFT method'}, into {self.out}>"


def load_run(file: str | PathLike[str], overrides: Mapping[str, Any] | tuple[str, ...] = ()) -> Run:
    """Read a run file, changed by `overrides`: dotted keys with their values, or texts such as `seed=1`.

    Raises RunFileError for a file that cannot be read, and with every mistake in it.
    """
    return Run.read(runfile.load(Path(file), overrides))


@cache
def installed() -> Catalog:
    """The components that are installed, discovered once."""
    from graftwork_registry import Catalog

    return Catalog.discover()


def preferred_kernels(lookup: Lookup) -> list[str]:
    """The attention kernels that work here, the fastest first by their own word."""
    ready = lookup.names("attention", ready_only=True)
    found = {name: lookup.find("attention", name).component for name in ready}
    return sorted(ready, key=lambda name: -getattr(found[name], "preference", 0))
