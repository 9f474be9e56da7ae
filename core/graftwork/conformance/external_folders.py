"""What every component that imports foreign folders must do with one that it does not know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from graftwork.conformance.outcome import Check, Subject
from graftwork.contracts.external import ExternalFolder


def an_unknown_folder_is_left_alone(subject: Subject) -> Iterator[str]:
    """`import_from` must not claim a folder that it does not know."""
    folder = subject.scratch / "unknown"
    folder.mkdir()
    (folder / "README.md").write_text("Somebody's notes.\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "unknown-model"}), encoding="utf-8")
    component = subject.ready()
    arguments: tuple[Any, ...] = ({}, None) if component.kind == "model" else ()
    if component.import_from(ExternalFolder(folder), *arguments) is not None:
        yield "'import_from' must return None for a folder that it does not know, and it claimed one; look at what the folder holds"


CHECKS: tuple[Check, ...] = (an_unknown_folder_is_left_alone,)
