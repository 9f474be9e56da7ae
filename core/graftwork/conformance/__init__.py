"""The conformance kit: what every component of a kind must do, whoever wrote it. `graftwork check` runs it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graftwork.config.settings import parse
from graftwork.conformance import (
    attention,
    data,
    evaluator,
    external_folders,
    memory,
    metadata,
    model,
    peft,
    processor,
    vision_tower,
)
from graftwork.conformance.outcome import Check, Outcome, Subject, run_check
from graftwork.contracts.component import Component

__all__ = ["CHECKS", "Outcome", "examine"]

CHECKS: Mapping[str, tuple[Check, ...]] = {
    "model": (*model.CHECKS, *processor.CHECKS, *external_folders.CHECKS),
    "vision_tower": vision_tower.CHECKS,
    "peft": (*peft.CHECKS, *external_folders.CHECKS),
    "memory": memory.CHECKS,
    "attention": attention.CHECKS,
    "evaluator": evaluator.CHECKS,
    "data_source": data.SOURCE_CHECKS,
    "data_operator": data.OPERATOR_CHECKS,
}
"""Kind to its checks, beside those of the metadata, which are for all."""


def examine(
    component: type[Component[Any]],
    *,
    settings: Mapping[str, Any] | None = None,
    config: Path | None = None,
    unmet_requirement: str = "",
) -> Iterator[Outcome]:
    """Run every check that fits a component, one after another.

    `settings` are those that differ from their defaults, as a run file writes them, with paths from the working directory.
    `config` is a folder to configure a model or a tower from. `unmet_requirement` is the requirement that this machine does not meet.
    Raises RunFileError for settings that the component does not have.
    """
    if settings:
        parse(component.Settings, settings, where=component.name, folder=Path.cwd())
    with tempfile.TemporaryDirectory(prefix="graftwork-check-") as scratch:
        subject = Subject(component, Path(scratch).resolve(), settings or {}, config, unmet_requirement)
        for check in (*metadata.CHECKS, *CHECKS.get(getattr(component, "kind", ""), ())):
            yield run_check(check, subject)
