"""A checkpoint of every format lies here, and opens; they were trained alike, the older one by the code of its time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from graftwork.checkpoint import format1, manifest
from graftwork.checkpoint.store import open_checkpoint
from graftwork.cli import main
from graftwork_registry import Catalog

CHECKPOINTS = Path(__file__).parent / "checkpoints"
BASE = Path(__file__).parents[1] / "examples" / "demo-base" / "base"
"""The weights that they were trained on, which have moved since."""
FORMATS = [1, 2]
SCORES = {
    "base": {"accuracy": 19 / 60, "colour": 0.0, "shape": 0.0, "yes/no": 0.95},
    "adapter": {"accuracy": 7 / 60, "colour": 0.0, "shape": 0.25, "yes/no": 0.1},
}
"""What the code that wrote format 1 measured on 20 questions of each group."""


def folder_of(version: int) -> Path:
    return CHECKPOINTS / f"format{version}" / "checkpoint-120"


def compare(version: int, out: Path) -> tuple[dict[str, dict[str, float]], str]:
    """The scores of base and adapter, and what was said besides."""
    # An observer would write beside the checkpoint, which is tracked.
    options = ["--on", "easy-vqa", "--set", "per_group=20", "--json", "--out", out, "--base-weights", BASE]
    command = ["--disable", "tensorboard", "compare", folder_of(version), *options]
    done = CliRunner().invoke(main, [*map(str, command)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (comparison,) = json.loads(done.stdout)
    variants = ("base", "adapter")
    return {v: {row["name"]: row["scores"][v]["value"] for row in comparison["rows"]} for v in variants}, done.stderr


def test_there_is_a_checkpoint_of_every_format() -> None:
    assert [manifest.read(folder_of(version)).format for version in FORMATS] == FORMATS
    assert FORMATS[-1] == manifest.FORMAT


@pytest.mark.parametrize("version", FORMATS)
def test_it_opens_and_gives_its_recorded_logits(version: int) -> None:
    opened = open_checkpoint(folder_of(version), Catalog.discover(), base=BASE, device="cpu")
    assert opened.verification.comparable
    assert opened.verification.error <= opened.verification.tolerance
    assert opened.verification.distance > 1


@pytest.mark.parametrize("version", FORMATS)
def test_it_compares_with_equal_numbers(version: int, tmp_path: Path) -> None:
    scores, _ = compare(version, tmp_path)
    assert scores == {variant: pytest.approx(values) for variant, values in SCORES.items()}


def test_both_say_the_same_of_the_run() -> None:
    first, second = (manifest.read(folder_of(version)) for version in FORMATS)
    assert first.tensors == second.tensors
    assert first.plan.run_context.train == second.plan.run_context.train
    assert first.plan.model_spec.on == second.plan.model_spec.on
    assert first.golden.largest == pytest.approx(second.golden.largest, rel=1e-3)


def test_answers_of_format_1_are_not_asked_for_again(tmp_path: Path) -> None:
    shutil.copy(CHECKPOINTS / "format1" / "answers.jsonl", tmp_path)
    scores, said = compare(1, tmp_path)
    assert "holds 60 answers already" in said
    assert scores == {variant: pytest.approx(values) for variant, values in SCORES.items()}


def test_what_is_no_table_in_format_1_is_left_to_be_refused() -> None:
    assert format1.read_manifest({"plan": 3, "probe": None}) == {"plan": 3, "golden": None}
