"""A hundred runs that are killed while they save lose nothing. See benchmarks/kills.md."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from killed_runs import KILLS, TABLE, campaign, table

FOLDER = "GRAFTWORK_KILLS"
"""The variable that names a folder in which results are kept, so that a campaign that was interrupted goes on."""


@pytest.mark.slow
def test_whenever_a_run_is_killed_its_checkpoints_are_whole_and_it_goes_on_to_the_same_end(
    pytestconfig: pytest.Config, record_property: Any
) -> None:
    found = campaign(Path(os.environ.get(FOLDER) or pytestconfig.rootpath / ".pytest_cache" / "kills"))
    record_property(TABLE, [*table(found)])
    kills = [kill for chain in found for kill in chain.kills]
    assert len(kills) >= KILLS
    assert [kill.damaged for kill in kills if kill.damaged] == []
    assert [number for number, chain in enumerate(found) if not chain.equal] == []
    assert sum(bool(kill.unfinished) for kill in kills) > KILLS / 4
