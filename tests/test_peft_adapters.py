"""Adapters that peft made are, imported, the models that peft makes of them, or they are refused. See benchmarks/adapters.md."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from peft_adapters import TABLE, campaign, table

FOLDER = "GRAFTWORK_ADAPTERS"
"""The variable that names a folder in which outcomes are kept, so that a campaign that was interrupted goes on."""


@pytest.mark.slow
def test_no_adapter_of_peft_becomes_another_model(pytestconfig: pytest.Config, record_property: Any) -> None:
    found = campaign(Path(os.environ.get(FOLDER) or pytestconfig.rootpath / ".pytest_cache" / "adapters"))
    record_property(TABLE, table(found))
    assert len(found) >= 40
    assert not [one for one in found if one.ended not in ("equal", "refused")]
