"""The data operator: its settings, what it refuses before a run, and how records pass through it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

from graftwork.contracts import BadRecord, DataOperator, MissingFile, Record, Writer, setting
from graftwork.errors import DataError
from graftwork_data_juicer.isolation import carry_out, workplace
from graftwork_data_juicer.recipe import Step, read_steps
from graftwork_data_juicer.rows import kept_records, read_rows, write_rows

PACKAGE = "py-data-juicer"


@dataclass(frozen=True)
class DataJuicerSettings:
    """Which operators run, and where."""

    process: tuple[dict[str, Any], ...] = setting(
        (), "The operators in their order: tables with 'op' and its parameters"
    )
    recipe: Path | None = setting(None, "A recipe of Data-Juicer's, of which the list 'process' is read")
    engine: Literal["local", "ray"] = setting("local", "Processes of this machine, or Ray")
    address: str | None = setting(None, "A Ray cluster, as host:port; by default one is started here for this alone")
    python: Path | None = setting(None, "The interpreter that has Data-Juicer; by default the one that runs this")
    workers: int | None = setting(None, "Processes, or actors of Ray; by default one for each core", minimum=1)
    folder: Path = setting(Path(), "Where folders named by operators are taken from; by default where the run file is")


class DataJuicer(DataOperator[DataJuicerSettings]):
    """Operators of Data-Juicer, on this machine or on Ray, in a process that installs and fetches nothing"""

    name = "data-juicer"
    Settings = DataJuicerSettings

    def validate(self, plan: Any) -> Iterable[str]:
        """All that is wrong with the operators, once also asked of Data-Juicer itself."""
        settings = self.settings
        if settings.address and settings.engine != "ray":
            yield "'address' is set, and 'engine' is not \"ray\"; set that, or leave the address out"
        steps, problems = self._steps()
        yield from problems
        if any(step.allowed.images for step in steps) and not self._images_are_checked(plan):
            yield "it reads images, and 'drop-broken-images' does not stand before it; put it there"
        if settings.python and not settings.python.exists():
            yield MissingFile(f"'python' is '{settings.python}', which does not exist")
        elif not problems:
            yield from _asked(_packed(steps), settings.python)

    def apply(
        self, records: Iterable[Record], *, seed: int, writer: Writer | None = None
    ) -> Iterator[Record | BadRecord]:
        steps, problems = self._steps()
        if problems:
            raise _refused(problems)
        settings = self.settings
        with workplace() as folder:
            kept = records if isinstance(records, Sequence) else None
            written = write_rows(_suited(records, steps), folder, keep=kept is None)
            if not written.records:
                return
            task = {
                "mode": "run",
                "steps": [step.task() for step in steps],
                "engine": settings.engine,
                "address": settings.address,
                "workers": settings.workers or _cores(),
                "seed": seed,
                "first_images": written.images,
            }
            outcome = carry_out(task, settings.python, folder)
            if outcome.get("problems"):
                raise _refused(outcome["problems"])
            yield from read_rows(Path(outcome["rows"]), kept_records(folder) if kept is None else kept)

    def files(self) -> Sequence[Path] | None:
        """The recipe, the models and lists of words, and what says which Data-Juicer is installed; not known where another
        interpreter or a cluster has it."""
        steps, problems = self._steps()
        version = None if self._runs_elsewhere() else _version_file()
        if problems or version is None:
            return None
        folders = [Path(step.params[step.allowed.folder]) for step in steps if step.allowed.folder]
        found = {each for folder in folders for each in folder.rglob("*") if each.is_file()}
        return [version, *([self.settings.recipe] if self.settings.recipe else []), *sorted(found)]

    def _runs_elsewhere(self) -> bool:
        return bool(self.settings.address) or self.settings.python not in (None, Path(sys.executable))

    def _steps(self) -> tuple[list[Step], list[str]]:
        return read_steps(self.settings.process, self.settings.recipe, self.settings.folder)

    def _images_are_checked(self, plan: Any) -> bool:
        """Whether images that cannot be opened are dropped before this operator comes."""
        wanted = [dict(entry) for entry in self.settings.process]
        recipe = str(self.settings.recipe) if self.settings.recipe else None
        checked = False
        for choice in plan.run_context.operators:
            checked = checked or choice.name == "drop-broken-images"
            own = choice.name == self.name and choice.settings.get("recipe") == recipe
            if own and choice.settings.get("process") == wanted:
                return checked
        return True  # It stands in no run.


def _suited(records: Iterable[Record], steps: Sequence[Step]) -> Iterator[Record]:
    """The records; DataError at one that a step is not made for."""
    names = ", ".join(f"'{step.op}'" for step in steps if step.allowed.duplicates)
    for record in records:
        if names and record.images:
            raise DataError(
                f"{names} compares texts alone, and would drop most questions about different images; use "
                "'duplicate-questions', 'near-duplicate-images' or 'deduplicate-images' instead"
            )
        yield record


def _cores() -> int:
    """The cores that this process may use; all of them where the system does not say, as on macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version_file() -> Path | None:
    """The METADATA file of Data-Juicer in this interpreter's environment; None where it is not there."""
    try:
        files = distribution(PACKAGE).files or ()
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "METADATA"), None)


def _packed(steps: Sequence[Step]) -> str:
    return json.dumps([step.task() for step in steps], sort_keys=True)


@lru_cache(maxsize=16)
def _asked(packed: str, python: Path | None) -> tuple[str, ...]:
    """What Data-Juicer itself finds wrong with the steps; asked once, as a plan is looked at several times."""
    task: Mapping[str, Any] = {"mode": "check", "steps": json.loads(packed)}
    try:
        with workplace() as folder:
            return tuple(carry_out(task, python, folder)["problems"])
    except DataError as error:
        return (error.sentence,)


def _refused(problems: Sequence[str]) -> DataError:
    if len(problems) == 1:
        return DataError(f"Data-Juicer cannot run: {problems[0]}")
    return DataError(f"Data-Juicer cannot run, for {len(problems)} reasons", problems)
