"""What every component must be: a class with complete metadata, and settings that can be read, shown and saved."""

from __future__ import annotations

import json
from collections.abc import Iterator

from graftwork.conformance.outcome import Check, Subject


def the_metadata_is_complete(subject: Subject) -> Iterator[str]:
    """Name, kind, summary, settings and requirements are what the registry accepts."""
    from graftwork_registry.judging import CONTRACTS, faults_of

    kind = getattr(subject.component, "kind", "")
    if kind not in CONTRACTS:
        yield f"a component must extend a contract of graftwork.contracts.kinds, and its kind is '{kind}'; extend one"
        return
    for fault in faults_of(kind, subject.component):
        yield f"the class must be a component of its kind, and {fault}; fix the class"


def every_setting_has_a_line_of_help(subject: Subject) -> Iterator[str]:
    """`graftwork show` has something to say about each."""
    from graftwork.config.settings import rows

    for row in rows(subject.component.Settings):
        if not row.help:
            yield f"every setting must say what it is, and '{row.name}' does not; write setting(default, \"help\")"


def settings_survive_a_checkpoint(subject: Subject) -> Iterator[str]:
    """What `dump` writes, `restore` reads back from JSON to equal settings."""
    from graftwork.config.settings import dump, restore

    component, instance = subject.component, subject.create()
    dumped = dump(instance.settings)
    try:
        read = json.loads(json.dumps(dumped))
    except TypeError as error:
        yield f"settings are saved as JSON, and these cannot be ({error}); use numbers, strings, paths, lists and tables"
        return
    if restore(component, read, component.settings_version) != instance.settings:
        yield "settings must be equal after saving and reading, and these are not; let equal values make equal settings"


CHECKS: tuple[Check, ...] = (
    the_metadata_is_complete,
    every_setting_has_a_line_of_help,
    settings_survive_a_checkpoint,
)
