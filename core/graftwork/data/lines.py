"""Records as JSON objects: LLaVA's format, and beside it, under one key, all that LLaVA has no word for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from graftwork.contracts.records import Image, Record, Turn

OWN = "graftwork"
"""The key for what LLaVA's format cannot say. Other readers pass over it."""
LLAVA = {"system": "system", "user": "human", "assistant": "gpt"}
LLAVA_ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "gpt": "assistant",
}


def to_object(record: Record, name_of: Callable[[Image], str]) -> dict[str, Any]:
    """The JSON object of a record, its images named by `name_of`; a function of the record alone."""
    content: dict[str, Any] = {"id": record.id}
    if record.images:
        names = [name_of(image) for image in record.images]
        content["image"] = names[0] if len(names) == 1 else names
    content["conversations"] = [{"from": LLAVA[turn.role], "value": turn.text} for turn in record.turns]
    if own := own_part(record):
        content[OWN] = own
    return content


def own_part(record: Record) -> dict[str, Any]:
    """What LLaVA's format has no word for, without what is at its default."""
    own: dict[str, Any] = {}
    if record.where:
        own["from"] = record.where
    own |= record.meta
    if any(turn.trained is not None for turn in record.turns):
        own["trained"] = [turn.trained for turn in record.turns]
    for name in OWN_FIELDS:
        if (value := getattr(record, name)) != OWN_FIELDS[name]:
            own[name] = value
    return own


def from_object(content: Mapping[str, Any], image_of: Callable[[str], Image]) -> Record:
    """The record of an object that `to_object` made."""
    own = dict(content.get(OWN, ()))
    names = content.get("image", ())
    trained = own.pop("trained", None)
    turns = content["conversations"]
    where = own.pop("from", "")
    fields = {name: own.pop(name) for name in OWN_FIELDS if name in own}
    if "reference" in fields:
        fields["reference"] = tuple(fields["reference"])
    return Record(
        content["id"],
        tuple(
            Turn(LLAVA_ROLES[turn["from"]], turn["value"], trained[place] if trained else None)
            for place, turn in enumerate(turns)
        ),
        tuple(map(image_of, [names] if isinstance(names, str) else names)),
        where=where,
        meta=own,
        **fields,
    )


OWN_FIELDS: Mapping[str, Any] = {
    "group": "",
    "reference": (),
    "weight": 1.0,
    "source": 0,
    "unit": "",
    "coordinates": "",
}
"""Fields of a record that are written beside LLaVA's, with what they are where nothing is said."""
