"""The JSON Schema of run files, for editors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from graftwork.config import runfile, settings, tables
from graftwork.config.schema import schema as schema_of
from graftwork.contracts import Component, TrainSettings, setting


@dataclass(frozen=True)
class LoraSettings:
    rank: int = setting(16, "The rank", minimum=1)
    init: Literal["zero", "svd"] = setting("zero", "How it starts")


def component(kind: str, name: str, settings_class: type | None = None) -> type[Component[Any]]:
    members = {"__doc__": f"The {name} of {kind}.", "kind": kind, "name": name}
    return type(name, (Component,), members | ({"Settings": settings_class} if settings_class else {}))


def test_the_schema_knows_the_installed_components_and_their_settings() -> None:
    schema = schema_of(
        [
            component("peft", "lora", LoraSettings),
            component("peft", "full"),
            component("model", "tiny"),
            component("vision_tower", "eye"),
            component("attention", "plain"),
            component("memory", "checkpointing"),
            component("evaluator", "colours", LoraSettings),
            component("data_source", "json"),
            component("data_operator", "words"),
        ]
    )
    tables = schema["properties"]
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(tables) == {"seed", "out", *runfile.TABLES}
    assert tables["peft"]["properties"]["use"]["anyOf"] == [
        {"enum": ["full", "lora"]},
        {"type": "string", "pattern": ":"},
    ]
    options = {option["properties"]["use"].get("const"): option for option in tables["peft"]["anyOf"]}
    assert set(options) == {None, "lora", "full"}
    assert options["lora"]["additionalProperties"] is False
    assert set(options["lora"]["properties"]) == {"use", "on", "also_train", "init_from", "rank", "init"}
    assert options["lora"]["properties"]["use"]["description"] == "The lora of peft"
    assert options["lora"]["properties"]["init"]["enum"] == ["zero", "svd"]
    assert set(options["full"]["properties"]) == {"use", "on", "also_train", "init_from"}

    part = tables["model"]["anyOf"][1]["properties"]["parts"]["additionalProperties"]
    assert part["properties"]["use"]["anyOf"][0] == {"enum": ["eye", "none"]}
    assert tables["model"]["required"] == ["use"]
    assert tables["attention"]["properties"]["prefer"]["items"]["anyOf"][0] == {"enum": ["plain"]}
    assert tables["memory"]["properties"]["use"]["items"]["anyOf"][0] == {"enum": ["checkpointing"]}
    assert set(tables["evaluate"]["properties"]["colours"]["properties"]) == {"rank", "init"}
    assert tables["data"]["properties"]["source"]["items"]["properties"]["use"]["anyOf"][0] == {"enum": ["json"]}
    assert set(tables["train"]["properties"]) == set(settings.names(TrainSettings))
    assert json.loads(json.dumps(schema)) == schema


def test_the_keys_beside_settings_are_those_of_the_tables() -> None:
    assert {
        "model": (*settings.names(runfile.ModelTable), "parts"),
        "vision_tower": tuple(settings.names(runfile.PartTable)),
        "peft": tuple(settings.names(runfile.PeftTable)),
        "data_source": tuple(settings.names(tables.SourceTable)),
        "data_operator": tuple(settings.names(tables.OperatorTable)),
    } == runfile.RESERVED_KEYS
