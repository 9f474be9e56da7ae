"""Choosing: from a component's name and its table of settings to the component, with every reason against it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftwork import hub, weights
from graftwork.config import settings
from graftwork.config.machine import Machine, unmet_requirement
from graftwork.config.runfile import RESERVED_KEYS, Selection
from graftwork.config.wording import join
from graftwork.contracts.component import Component, MissingFile
from graftwork.contracts.data import DataMaker, DataOperator, DataVerifier
from graftwork.contracts.kinds import Weighted
from graftwork.contracts.lookup import Found, Lookup
from graftwork.contracts.plan import Choice, Plan, WeightsRef
from graftwork.errors import ComponentNotFound, GraftworkError, WeightsError


@dataclass(frozen=True)
class Resolved:
    """A component that was found and whose settings are right."""

    where: str
    choice: Choice
    component: Component[Any]


class Chooser:
    """Chooses the components of one file. What cannot work becomes None and adds to `reasons`."""

    def __init__(
        self,
        folder: Path,
        lookup: Lookup,
        machine: Machine | None = None,
        *,
        fetch: bool = True,
        missing_files: list[str] | None = None,
    ) -> None:
        self.folder = folder
        """Where relative paths start, absolute."""
        self.lookup = lookup
        self.machine = machine
        self.fetch = fetch
        self.missing_files = missing_files
        self.reasons: list[str] = []
        self.complete = True
        """Whether everything that is named was resolved, so that the plan is worth checking further."""
        self.resolved: list[Resolved] = []

    def validate(self, chosen: Resolved, plan: Plan) -> None:
        """Note why a component cannot work in a plan, once."""
        for clause in chosen.component.validate(plan):
            missing = self.missing_files is not None and isinstance(clause, MissingFile)
            into = self.missing_files if missing and self.missing_files is not None else self.reasons
            if (line := f"{chosen.where}: {clause}") not in into:
                into.append(line)

    def refuse(self, *reasons: str) -> None:
        """Reasons that leave something unresolved."""
        self.reasons += reasons
        self.complete = False

    def choose(self, kind: str, selection: Selection) -> Resolved | None:
        """The selected component with its settings, its weights and its configuration."""
        where = selection.where
        found = self.find(kind, selection.use, where)
        if found is None:
            return None
        component, beside = found.component, RESERVED_KEYS.get(kind, ())
        if unmet := unmet_requirement(component.requires, self.machine):
            self.reasons.append(f"{where}: '{selection.use}' {unmet}")
        values = settings.read(
            component.Settings,
            selection.settings,
            where=where,
            folder=self.folder,
            problems=self.reasons,
            beside=beside,
        )
        base, configured = self.locate(selection, "weights"), self.locate(selection, "config")
        if values is None:
            self.complete = False
            return None
        instance = component(values)
        choice = replace(choice_of(found, instance), coordinates=selection.coordinates)
        if isinstance(instance, DataOperator) and instance.evaluators:
            choice = self.with_evaluators(choice, instance.evaluators, where)
        if isinstance(instance, Weighted):
            if (selection.weights and not base) or (selection.config and not configured):
                return None  # for the reason that `locate` gave
            folder = configured or base
            try:
                config = dict(instance.configuration(folder))
            except WeightsError as error:
                self.refuse(*lines_of(where, error))
                return None
            ref = WeightsRef(selection.weights or "", str(base), commit=hub.commit_of(base)) if base else None
            choice = replace(choice, weights=ref, config=config, folder=str(folder) if folder else None)
        self.resolved.append(Resolved(where, choice, instance))
        return self.resolved[-1]

    def with_evaluators(self, choice: Choice, setting: str, where: str) -> Choice:
        """The choice of an operator with the settings of its evaluators as this file means them, paths absolute."""
        chosen = {}
        for name, table in choice.settings[setting].items():
            if found := self.choose("evaluator", Selection(name, table, where=join(join(where, setting), name))):
                chosen[name] = found.choice.settings
        return replace(choice, settings={**choice.settings, setting: chosen})

    def choose_all(self, kind: str, selections: Iterable[Selection]) -> list[Resolved]:
        """Those of the selections that can be resolved."""
        return [chosen for selection in selections if (chosen := self.choose(kind, selection))]

    def operators(self, selections: Iterable[Selection], *, makers: bool = False) -> list[Resolved]:
        """Those of the selected data operators that can be resolved; with `makers` they may ask a writer."""
        chosen = self.choose_all("data_operator", selections)
        for each in chosen:
            if isinstance(each.component, DataMaker) and not makers:
                self.reasons.append(
                    f"{each.where}: '{each.choice.name}' asks a writer; make a data set with graftwork data synthesize, and use that"
                )
            if isinstance(each.component, DataVerifier):
                self.reasons.append(f"{each.where}: '{each.choice.name}' verifies; name it in [verify]")
        return chosen

    def find(self, kind: str, name: str, where: str) -> Found | None:
        """The component of that name."""
        try:
            return self.lookup.find(kind, name)
        except ComponentNotFound as error:
            self.refuse(*lines_of(where, error, kind))
            return None

    def locate(self, selection: Selection, key: str) -> Path | None:
        """The folder that a selection's `weights` or `config` names."""
        given = getattr(selection, key)
        if given is None:
            return None
        where = join(selection.where, key)
        try:
            return hub.locate(given, self.folder, where=where, fetch=self.fetch, tensors=key == "weights")
        except WeightsError as error:
            path = weights.absolute(Path(given), self.folder)
            if key == "weights" and selection.config and self.missing_files is not None and not path.exists():
                self.missing_files += lines_of(where, error)
                return path
            self.refuse(*lines_of(where, error))
            return None


def lines_of(where: str, error: GraftworkError, kind: str = "") -> list[str]:
    """The lines of an error's message, each with the path of what it is about."""
    sentence = error.sentence.removeprefix(f"{kind}: ").removeprefix(f"{where}: ")
    return [f"{where}: {line}" for line in (sentence, *error.details)]


def choice_of(found: Found, component: Component[Any]) -> Choice:
    """A component with its settings, as a plan records it."""
    return Choice(
        kind=component.kind,
        name=component.name,
        plugin=found.plugin,
        distribution=found.distribution,
        version=found.version,
        settings=settings.dump(component.settings),
        settings_version=component.settings_version,
    )
