"""From what a data file holds to a record: turns in order, an image for each place, and what is known beside them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from graftwork.contracts.records import BadRecord, Image, Record, Turn
from graftwork.data.imagefolders import NO_SOUND, NO_VIDEOS
from graftwork.data.lines import OWN, OWN_FIELDS
from graftwork.data.texts import plain_text, type_name
from graftwork.errors import DataError

PLACE = "<image>"
MOVING_PLACE = re.compile(r"^[ \t]*<(video|audio)>[ \t]*$", re.MULTILINE)
"""Where LLaVA's format has a video or sound; within a line it may be HTML that is talked about."""
LAST_NUMBER = re.compile(r"\d+(?=\)?$)")
MARKS = ("train", "training", "loss")
"""What data calls the mark of a turn that says whether it carries loss; OpenAI's is `weight`, 0 or 1."""


def conversation(
    content: Mapping[str, Any],
    turns: Sequence[Turn],
    images: Sequence[Image],
    *,
    where: str,
    group: str = "",
    names: tuple[str, str] = ("user", "assistant"),
    lenient: bool = True,
    open_questions: bool = False,
) -> Record:
    """The record of turns and images, with the `id`, the `weight` and our own part of the object that they were read from.

    A record without an id is called by the number that its place ends in. `names` are what the format calls who asks and who
    answers. `lenient` keeps one of several places in a question where there is one image, at the beginning, and drops a leading
    answer, both as LLaVA does. With `open_questions` it may end with a question. DataError says why it is no record.
    """
    turns = _ordered(turns, names, lenient=lenient, open_questions=open_questions)
    if lenient and len(images) == 1:
        turns = tuple(map(_with_one_place, turns))
    places = 0
    for turn in turns:
        if turn.role == "user" and (moving := MOVING_PLACE.search(turn.text)):
            why = NO_VIDEOS if moving[1] == "video" else NO_SOUND
            raise DataError(f"the record has a '<{moving[1]}>', and {why}")
        if PLACE in turn.text:
            if turn.role != "user":
                what = "an answer" if turn.role == "assistant" else "the system turn"
                raise DataError(f"'{PLACE}' stands in {what}; only questions have images")
            places += turn.text.count(PLACE)
    if places != len(images):
        counted, found = "places of", places
        if lenient and len(images) < 2:
            counted, found = "turns with", sum(PLACE in turn.text for turn in turns)
        counts = f"{counted} '{PLACE}' in the conversation: {found}, images of the record: {len(images)}"
        raise DataError(f"{counts}; they must be equal")
    record = Record(_id(content, where), turns, tuple(images), group, where=where, weight=_weight(content))
    if own := content.get(OWN):
        record = _with_own_part(record, own)
        if group:
            record = replace(record, group=group)
    return record


def _ordered(turns: Sequence[Turn], names: tuple[str, str], *, lenient: bool, open_questions: bool) -> tuple[Turn, ...]:
    """The turns: at most one of the system, then questions and answers in turn, to an answer, or a question if these may be open; DataError
    otherwise."""
    first = 1 if turns and turns[0].role == "system" else 0
    system, turns = turns[:first], turns[first:]
    if lenient and turns and turns[0].role == "assistant":  # An answer without a question, which LLaVA drops as well.
        turns = turns[1:]
    for number, turn in enumerate(turns):
        if turn.role == "system":
            raise DataError("a 'system' turn stands behind other turns; only the first may be one")
        if turn.role != ("user", "assistant")[number % 2]:
            raise DataError(f"the turns of '{names[0]}' and '{names[1]}' do not alternate")
    if not turns or (turns[-1].role == "user" and not open_questions):
        raise DataError(f"the last turn is not an answer of '{names[1]}'")
    return (*system, *turns)


def mark_of(turn: Mapping[str, Any], role: str, number: int) -> bool | None:
    """Whether a turn's answer is marked to carry loss; None where it is not marked. DataError for a mark that is none."""
    marks: dict[str, bool] = {}
    for name in (*MARKS, "weight"):
        value = turn.get(name)
        if value is None:
            continue
        if name == "weight" and type(value) in (int, float) and value in (0, 1):
            value = bool(value)
        if not isinstance(value, bool) or (name == "weight" and isinstance(turn[name], bool)):
            wanted = "0 or 1" if name == "weight" else "true or false"
            raise DataError(f"'{name}' of turn {number} is {_shown(value)}, not {wanted}")
        marks[name] = value
    if not marks:
        return None
    if len(set(marks.values())) > 1:
        raise DataError(f"{' and '.join(map(repr, marks))} of turn {number} contradict each other")
    mark = next(iter(marks.values()))
    if role != "assistant":
        if mark:
            raise DataError(f"turn {number} is marked to be trained on, and only answers can be; unmark it")
        return None
    return mark


def first_records(items: Iterable[Record | BadRecord], limit: int | None) -> Iterator[Record | BadRecord]:
    """The items up to that many records; all of them without a limit."""
    left = limit
    for item in items:
        yield item
        if left is not None and isinstance(item, Record):
            left -= 1
            if not left:
                return


def _with_one_place(turn: Turn) -> Turn:
    """One image, for which upstream keeps one place, at the beginning."""
    if turn.role != "user" or turn.text.count(PLACE) < 2:
        return turn
    return replace(turn, text=f"{PLACE}\n{turn.text.replace(PLACE, '').strip()}")


def _id(content: Mapping[str, Any], where: str) -> str:
    name = content.get("id")
    if name is None or name == "":
        found = LAST_NUMBER.search(where)
        return found[0] if found else where
    if type(name) not in (str, int):
        raise DataError(f"'id' is {_shown(name)}, not a string or an integer")
    return plain_text("id", str(name))


def _weight(content: Mapping[str, Any]) -> float:
    weight = content.get("weight")
    if weight is None:
        return 1.0
    if type(weight) not in (int, float) or not 0 <= weight < math.inf:
        raise DataError(f"'weight' is {_shown(weight)}, not a number of at least 0")
    return float(weight)


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | float | int) else type_name(value)


# Our own part ---------------------------------------------------------------------------------------------------------


def _with_own_part(record: Record, own: Any) -> Record:
    """The record with all that `own_part` wrote beside a format's own fields; DataError when it is of another form."""
    if isinstance(own, str):  # Tables have it as text.
        try:
            own = json.loads(own)
        except (ValueError, RecursionError):
            raise DataError(f"'{OWN}' is a text that is not JSON") from None
    if not isinstance(own, Mapping):
        raise DataError(f"'{OWN}' is {type_name(own)}, not an object")
    plain_text(f"'{OWN}'", json.dumps(own, ensure_ascii=False, default=str))
    rest = dict(own)
    changes: dict[str, Any] = {}
    for name, default in OWN_FIELDS.items():
        if name in rest:
            changes[name] = _like(default, rest.pop(name), name)
    changes["where"] = _like("", rest.pop("from", record.where), "from")
    if (trained := rest.pop("trained", None)) is not None:
        if not isinstance(trained, list) or not all(mark is None or isinstance(mark, bool) for mark in trained):
            raise DataError(f"'trained' in '{OWN}' is not a list of true, false and null")
        if len(trained) != len(record.turns):
            raise DataError(
                f"'trained' in '{OWN}' has {len(trained)} marks, and the record has {len(record.turns)} turns"
            )
        changes["turns"] = tuple(replace(turn, trained=mark) for turn, mark in zip(record.turns, trained, strict=True))
    return replace(record, meta=rest, **changes)


def _like(default: Any, value: Any, name: str) -> Any:
    """A value of the type that a field of a record has; DataError for another."""
    if name == "weight":
        return _weight({"weight": value})
    if isinstance(default, tuple):
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return tuple(value)
    elif type(value) is type(default):
        return value
    raise DataError(f"'{name}' in '{OWN}' is {_shown(value)}, not of its type")
