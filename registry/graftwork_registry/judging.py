"""Whether what a hook returned is a component of its kind."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

from graftwork import contracts
from graftwork.contracts.component import Component, Requires
from graftwork_registry.wording import in_one_line

CONTRACTS: Mapping[str, type[Component[Any]]] = {
    contract.kind: contract
    for contract in (
        contracts.ModelArchitecture,
        contracts.VisionTower,
        contracts.PeftMethod,
        contracts.MemoryStrategy,
        contracts.AttentionKernel,
        contracts.Evaluator,
        contracts.DataSource,
        contracts.DataOperator,
    )
}
"""The class that components of each kind extend."""


def faults_of(kind: str, returned: object) -> Iterator[str]:
    """Why `returned` is no component of `kind`, a clause each; nothing when it is one."""
    contract = CONTRACTS[kind]
    if not isinstance(returned, type):
        yield f"it returned {returned!r}, which is not a class"
        return
    label = f"'{returned.__name__}'"
    if not issubclass(returned, contract):
        yield f"it returned {label}, which does not extend {contract.__name__}"
        return
    if inspect.isabstract(returned):
        yield f"{label} lacks {', '.join(sorted(returned.__abstractmethods__))}"
    name = getattr(returned, "name", None)
    if not isinstance(name, str):
        yield f'{label} has no name: write name = "…" in the class'
    elif not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        yield f"{label} is called '{name}', and a name is lower case with hyphens"
    if returned.kind != kind:
        yield f"{label} says that its kind is '{returned.kind}', not '{kind}'"
    if not returned.summary():
        yield f"{label} has no docstring, and its first line is the summary in every list"
    for fault in (*_faults_of_settings(returned.Settings), *_faults_of_requires(returned.requires)):
        yield f"{label} {fault}"


def _faults_of_settings(settings: object) -> Iterator[str]:
    if not (isinstance(settings, type) and dataclasses.is_dataclass(settings)):
        yield "has Settings that are no dataclass"
        return
    if not settings.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        yield "has Settings that can change: write @dataclass(frozen=True)"
    try:
        get_type_hints(settings)
    except Exception as error:  # a name that is imported for type checkers only, most of all
        yield f"has Settings whose types cannot be read: {in_one_line(error)}"
    for field in dataclasses.fields(settings):
        if field.default is field.default_factory is dataclasses.MISSING:
            yield f"has no default for its setting '{field.name}'"


def _faults_of_requires(requires: object) -> Iterator[str]:
    from packaging.requirements import InvalidRequirement, Requirement

    if not (isinstance(requires, Requires) and isinstance(requires.packages, tuple)):
        yield "has a requires that is no Requires with a tuple of packages"
        return
    for package in requires.packages:
        try:
            Requirement(package)
        except (InvalidRequirement, TypeError):
            yield f"requires {package!r}, which is no requirement such as 'torch>=2.6'"
