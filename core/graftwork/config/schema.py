"""The JSON Schema of run files, for editors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from graftwork.config import settings
from graftwork.config.runfile import EMPTY
from graftwork.config.tables import (
    AttentionTable,
    DataTable,
    EvaluateTable,
    MemoryTable,
    ModelTable,
    OperatorTable,
    PartTable,
    PeftTable,
    RunTable,
    SourceTable,
)
from graftwork.contracts.component import Component
from graftwork.contracts.kinds import KINDS
from graftwork.contracts.plan import TrainSettings


def schema(components: Iterable[type[Component[Any]]]) -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of the run files that can use these components.

    A name of the form `plugin:name` is allowed with any settings; only `resolve` can check those.
    """
    kinds: dict[str, list[type[Component[Any]]]] = {kind: [] for kind in KINDS}
    for component in components:
        kinds[component.kind].append(component)
    model, part = _selection(ModelTable, kinds["model"]), _selection(PartTable, kinds["vision_tower"], EMPTY)
    for option in model["anyOf"]:
        option["properties"]["parts"] = {"type": "object", "additionalProperties": part}
    attention, kernels = settings.json_schema(AttentionTable), {"type": "array", "items": _name(kinds["attention"])}
    attention["properties"]["prefer"] |= kernels
    attention["properties"]["sites"]["additionalProperties"] = kernels
    data = settings.json_schema(DataTable)
    for key, table in (("source", SourceTable), ("operator", OperatorTable)):
        data["properties"][key] = {"type": "array", "items": _selection(table, kinds[f"data_{key}"])}
    memory = _named_list(MemoryTable, "use", kinds["memory"])
    memory["properties"]["try"]["items"]["items"] = _name(kinds["memory"])
    run = settings.json_schema(RunTable)
    run["properties"] |= {
        "model": model,
        "peft": _selection(PeftTable, kinds["peft"]),
        "attention": attention,
        "memory": memory,
        "data": data,
        "train": settings.json_schema(TrainSettings),
        "evaluate": _named_list(EvaluateTable, "on", kinds["evaluator"]),
    }
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, "title": "A run of Graftwork", **run, "required": ["model"]}


def _name(components: Iterable[type[Component[Any]]], *others: str) -> dict[str, Any]:
    known = [*sorted({component.name for component in components}), *others]
    return {"anyOf": [{"enum": known}, {"type": "string", "pattern": ":"}]}


def _selection(table_class: type, components: Iterable[type[Component[Any]]], *others: str) -> dict[str, Any]:
    """A table with the keys of `table_class`, of which `use` decides what else it may hold."""
    table = settings.json_schema(table_class)
    options: list[dict[str, Any]] = [{"properties": {"use": {"pattern": ":"}}}]
    for component in components:
        allowed = table["properties"] | settings.json_schema(component.Settings)["properties"]
        allowed["use"] = {"const": component.name, "description": component.summary()}
        options.append({"properties": allowed, "additionalProperties": False})
    options += [{"properties": {"use": {"const": other}}, "additionalProperties": False} for other in others]
    use = table["properties"]["use"] | _name(components, *others)
    return {"type": "object", "properties": {"use": use}, "required": table.get("required", []), "anyOf": options}


def _named_list(table_class: type, key: str, components: Iterable[type[Component[Any]]]) -> dict[str, Any]:
    """A table with a list of names under `key`, and a table of settings for each."""
    table = settings.json_schema(table_class)
    table["properties"][key]["items"] = _name(components)
    table["properties"] |= {component.name: settings.json_schema(component.Settings) for component in components}
    return table | {"patternProperties": {":": {"type": "object"}}}
