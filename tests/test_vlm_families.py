"""Every family of vision-language models that is promised computes what it computes in transformers, and comes out as it went in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import vlm_campaign
from vlm_campaign import HEAD, committed, faults, kept, line_of
from vlm_families import FAMILIES

FOLDER = "GRAFTWORK_FAMILIES"
"""The variable that names a folder in which results are kept, so that a campaign that was interrupted goes on."""
ALWAYS = ("llava_next", "qwen3_vl_moe", "gemma3")
"""Tiles and a template without ends; grids, features for several layers, experts that are joined; masks of its own."""


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers 5 for it
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # transformers gives NumPy a tensor
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow) for n in FAMILIES])
def test_a_family_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    row = kept(name, Path(os.environ.get(FOLDER) or tmp_path / "kept"))
    assert faults(row) == []
    (said,) = [line for line in committed().splitlines() if line.startswith(f"| `{name}` |")]
    assert line_of(name, row).split("|")[-2] == said.split("|")[-2]  # whose attention is computed


def test_what_came_of_a_family_is_kept_for_the_code_that_it_came_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = iter(("then", "now"))
    monkeypatch.setattr(vlm_campaign, "tried", lambda name, work: {"came": next(came)})
    monkeypatch.setattr(vlm_campaign, "state", lambda: "one code")
    assert [kept("llava", tmp_path)["came"] for _ in range(2)] == ["then", "then"]
    monkeypatch.setattr(vlm_campaign, "state", lambda: "other code")
    assert kept("llava", tmp_path)["came"] == "now"


def test_the_table_in_the_docs_holds_the_families_that_are_tried_here() -> None:
    head, rows = committed().splitlines()[:2], committed().splitlines()[2:]
    names = [row.split("`")[1] for row in rows]
    assert (tuple(head), names) == (HEAD, [*FAMILIES])
    assert len(names) >= 16 and set(ALWAYS) <= set(names)
    assert [row for row in rows if row.count(" equal ") != 2 or row.count(" yes ") != 1] == []
