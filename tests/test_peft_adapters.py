"""Adapters that peft made are, imported, the models that peft makes of them, or they are refused. See benchmarks/adapters.md."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from peft_adapters import BASES, EFFECT, TABLE, build_base, campaign, measure, table

FOLDER = "GRAFTWORK_ADAPTERS"
"""The variable that names a folder in which outcomes are kept, so that a campaign that was interrupted goes on."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each base."""
    return {name: build_base(base, tmp_path_factory.mktemp(name) / "model") for name, base in BASES.items()}


@pytest.mark.parametrize(
    ("adapter", "base"),
    [
        ("rank and alpha by layer, rsLoRA", "untied"),
        ("the head apart", "tied"),
        ("the connector whole", "untied"),
        ("bias of the adapted", "tied"),
        ("KaSA", "untied"),
        ("the head", "untied"),
    ],
)
def test_an_adapter_of_peft_is_the_same_model_or_refused(
    folders: dict[str, Path], tmp_path: Path, adapter: str, base: str
) -> None:
    one = measure(adapter, base, folders[base], tmp_path)
    assert one.distance > EFFECT
    assert one.ended in ("equal", "refused"), one


@pytest.mark.slow
def test_no_adapter_of_peft_becomes_another_model(pytestconfig: pytest.Config, record_property: Any) -> None:
    found = campaign(Path(os.environ.get(FOLDER) or pytestconfig.rootpath / ".pytest_cache" / "adapters"))
    record_property(TABLE, table(found))
    assert len(found) >= 40
    assert not [one for one in found if one.ended not in ("equal", "refused")]
