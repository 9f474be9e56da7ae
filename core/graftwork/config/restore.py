"""From recorded choices back to components."""

from __future__ import annotations

from typing import Any, cast

from graftwork.config import settings
from graftwork.contracts.component import Component
from graftwork.contracts.data import DataOperator, DataSource
from graftwork.contracts.kinds import Evaluator
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
    component = found.component(settings.restore(found.component, choice.settings, choice.settings_version))
    if isinstance(component, DataSource):
        component.coordinates = choice.coordinates
    if isinstance(component, DataOperator) and component.evaluators:
        _lend_questions(component, component.evaluators, lookup)
    return component


def _lend_questions(operator: DataOperator[Any], setting: str, lookup: Lookup) -> None:
    """Give an operator the questions of the evaluators that its setting names."""
    lent = {}
    for name, table in getattr(operator.settings, setting).items():
        kind = lookup.find("evaluator", name).component
        evaluator = cast("Evaluator[Any]", kind(settings.restore(kind, table, kind.settings_version)))
        lent[name] = evaluator.records
    operator.questions = lent
