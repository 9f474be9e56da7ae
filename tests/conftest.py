"""What several tests share: one thread, a tiny base, and checkpoints trained onto it once."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import golden_table
import pytest
import torch
from hub_stand_in import Hub, served
from tiny_runs import CHANGES, COMPONENTS, METHODS, PlanOf, Run, plan_of, random_base

from graftwork.contracts import DictLookup
from graftwork.train.loop import Outcome, train

# Sums in one order, and several tests at once, and the processes that they start, do not fight for cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the session's own, for the processes that tests start as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFTWORK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def lookup() -> DictLookup:
    """The first-party components, and the tests' data source."""
    return DictLookup(*COMPONENTS)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a family of vision-language models is written, by its name; the folder is not to be changed."""
    from vlm_families import write

    return functools.cache(lambda name: write(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of a random MGM-Gemma; `low/` and `high/` in it hold the towers' configurations."""
    return random_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(base: Path, tmp_path: Path) -> PlanOf:
    """Makes the plan of a small LoRA run on the base, with dotted keys of its run file changed."""
    return lambda changes=None, lookup=None: plan_of(base, tmp_path, changes, lookup)


@pytest.fixture(scope="session")
def run_of(base: Path, lookup: DictLookup, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Makes a run of four steps with one of `METHODS`, once in a session."""
    made: dict[str, Run] = {}

    def make(method: str) -> Run:
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            plan = plan_of(base, folder, {"peft": METHODS[method]})
            made[method] = Run(folder / "out", plan, train(plan, lookup, folder / "out", device="cpu"))
        return made[method]

    return make


@pytest.fixture(scope="session")
def trained(run_of: Callable[[str], Run]) -> Run:
    """A LoRA run of four steps."""
    return run_of("lora")


@pytest.fixture(scope="session")
def whole(base: Path, lookup: DictLookup, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with dropout that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    plan = plan_of(base, folder, CHANGES)
    return Run(folder / "out", plan, train(plan, lookup, folder / "out", device="cpu"))


@pytest.fixture
def go(run: PlanOf, lookup: DictLookup, tmp_path: Path) -> Callable[..., Outcome]:
    """Trains a small run with dotted keys changed, into `out`."""

    def train_changed(changes: dict[str, Any] | None = None, **options: Any) -> Outcome:
        return train(run(changes), lookup, tmp_path / "out", device="cpu", **options)

    return train_changed


@pytest.fixture
def hub_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in of the Hugging Face hub, and an empty cache in `hf`."""
    with served(tmp_path, monkeypatch) as found:
        yield found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how far the numbers are from the published ones, and the tables of campaigns."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    if lines := golden_table.rows(reports):
        terminalreporter.section("against the published numbers of MGM")
        for line in lines:
            terminalreporter.write_line(line)
    for report in reports:
        for name, lines in report.user_properties:
            if name != golden_table.MEASURED:
                terminalreporter.section(name)
                terminalreporter.write_line("\n".join(lines))
