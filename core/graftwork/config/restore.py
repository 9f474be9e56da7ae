"""From recorded choices back to components."""

from __future__ import annotations

from typing import Any

from graftwork.config import settings
from graftwork.contracts.component import Component
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Choice
from graftwork.errors import CheckpointError, ComponentNotFound


def restore_component(choice: Choice, lookup: Lookup) -> Component[Any]:
    """The component that a plan recorded, with the recorded settings; CheckpointError when it is not installed, or when
    the installed one cannot read them."""
    try:
        # The plugin's name tells equal names apart; a component that moved to another plugin is found by its bare name.
        found = lookup.find(choice.kind, f"{choice.plugin}:{choice.name}")
    except ComponentNotFound:
        try:
            found = lookup.find(choice.kind, choice.name)
        except ComponentNotFound as error:
            raise CheckpointError(
                f"this needs '{choice.name}' ({choice.kind}) of plugin '{choice.plugin}', which is not installed or does "
                f'not work: pip install "{choice.distribution}=={choice.version}"',
                [error.sentence, *error.details],
            ) from None
    return found.component(settings.restore(found.component, choice.settings, choice.settings_version))
