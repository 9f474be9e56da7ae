"""The run files in examples/recipes: full-size models are planned from configurations alone, and take what their tables say."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import graftwork
from graftwork.config import runfile
from graftwork.config.sizes import format_size, parse_size
from graftwork.jobs.planning import Planned
from graftwork.jobs.run import Run, installed

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
RUNS = sorted(RECIPES.glob("*/*.toml"))
PUBLISHED = {
    "gemma-3-4b": 4_300_079_472,
    "llava-1.5-7b": 7_063_427_072,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "smolvlm2-2.2b": 2_246_784_880,
}


def named(run: Path) -> str:
    return f"{run.parent.name}/{run.stem}"


@cache
def script() -> Any:
    spec = importlib.util.spec_from_file_location("rehearse", RECIPES / "rehearse.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


def cells_of(run: Path) -> list[str]:
    """The line of a run file in the table of its folder."""
    lines = (run.parent / "README.md").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"| [{run.name}]")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def planned(run: Path, *overrides: str, rehearse: bool = False) -> Planned:
    return graftwork.plan(Run.read(runfile.load(run, overrides)), rehearse=rehearse)


def test_every_model_of_the_recipes_has_a_published_count() -> None:
    assert {run.parent.name for run in RUNS} == PUBLISHED.keys()


@pytest.mark.parametrize("run", RUNS, ids=named)
def test_a_recipe_fits_its_card_by_the_tables(run: Path) -> None:
    budget = parse_size(tomllib.loads(run.read_text(encoding="utf-8"))["memory"]["budget"])
    _, card, _, _, _, peak = cells_of(run)
    assert parse_size(peak) <= budget == parse_size(card.replace("GB", "GiB")) - (1 << 30)
    overview = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert script().overview(run.parent) in overview


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=() if model == "qwen2.5-vl-3b" else pytest.mark.slow) for model in PUBLISHED]
)
def test_a_model_has_its_published_count_from_configurations_alone(model: str) -> None:
    outline = planned(next(run for run in RUNS if run.parent.name == model)).outline
    assert sum(row.parameters for row in outline.roles) == PUBLISHED[model]


@pytest.mark.parametrize("run", RUNS, ids=named)
def test_only_weights_and_data_are_not_there_yet(run: Path) -> None:
    missing_files: list[str] = []
    Run.read(runfile.load(run)).plan(installed(), fetch=False, missing=missing_files)
    assert [line.partition(": ")[0] for line in missing_files] == ["model.weights", "data.source.0"]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=named)
def test_the_tables_say_what_the_rehearsal_gives(run: Path) -> None:
    *_, micro_batch, peak = cells_of(run)
    search = planned(run, f"train.micro_batch_size={micro_batch}", rehearse=True).search
    assert search is not None and search.best is not None
    assert format_size(search.best.peak or 0) == peak
