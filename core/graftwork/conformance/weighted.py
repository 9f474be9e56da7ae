"""Where the kit's models and towers get their configuration."""

from __future__ import annotations

from pathlib import Path

from graftwork.conformance.outcome import Skipped, Subject
from graftwork.errors import WeightsError


def folder_of(subject: Subject) -> Path | None:
    """The folder that the component is configured from: the one that was given, none where its settings are enough, or the
    example that it writes. Skipped when there is none of these."""
    if subject.config:
        return subject.config
    instance = subject.ready()
    try:
        instance.configuration(None)
    except WeightsError:
        folder = subject.scratch / "example"
        if not folder.exists():
            folder.mkdir()
            instance.example(folder)
        if not any(folder.iterdir()):
            raise Skipped(
                "it has no configuration to build: give a folder with --config, or write one in 'example'"
            ) from None
        return folder
    return None
