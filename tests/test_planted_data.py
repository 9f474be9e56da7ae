"""Each planted fault is dropped for its own reason, and no healthy record is dropped."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted_data import FAULTS, HEALTHY, campaign

from graftwork_registry import Catalog


@pytest.mark.parametrize("records", [120, pytest.param(3_000, marks=pytest.mark.slow)])
def test_faults_are_dropped_for_their_own_reason_and_nothing_else_is(tmp_path: Path, records: int) -> None:
    found, totals = campaign(tmp_path, records, Catalog.discover())
    assert totals["read"] == totals["kept"] + totals["dropped"] >= records
    assert found[HEALTHY].planted > 0 and found[HEALTHY].dropped == 0
    assert all(found[kind].planted for kind in FAULTS)
    assert {kind: each for kind, each in found.items() if kind in FAULTS and each.rightly < each.planted} == {}
