"""The verdict, measured: sound runs are called healthy, and planted failures are not. See benchmarks/verdicts.md."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from verdict_runs import HEALTHY, TABLE, campaign, table

FOLDER = "GRAFTWORK_VERDICTS"
"""The variable that names a folder in which runs are kept, so that a campaign that was interrupted goes on."""


@pytest.mark.slow
def test_sound_runs_are_called_healthy_and_planted_failures_are_not(
    pytestconfig: pytest.Config, record_property: Any
) -> None:
    found = campaign(Path(os.environ.get(FOLDER) or pytestconfig.rootpath / ".pytest_cache" / "verdicts"))
    record_property(TABLE, table(found))
    sound = [said for one, ended, said in found if one.kind == HEALTHY and ended != HEALTHY]
    missed = [f"{one.kind} {one.seed}" for one, ended, _ in found if one.kind != HEALTHY and ended == HEALTHY]
    assert len(sound) <= 1, sound
    assert len(missed) <= 5, missed
