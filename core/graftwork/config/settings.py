"""Settings: frozen dataclasses that authors write, parsed strictly, with every mistake at once."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from graftwork.config.wording import count, join, suggestion, toml_text, words
from graftwork.contracts.component import Component
from graftwork.errors import CheckpointError, RunFileError
from graftwork.weights import absolute

T = TypeVar("T")


@dataclass(frozen=True)
class SettingRow:
    """One setting as a person reads it."""

    name: str
    type: str
    default: str
    help: str


def parse(cls: type[T], table: Mapping[str, Any], *, where: str, folder: Path | None) -> T:
    """The settings in a table of TOML values; RunFileError whose details hold every mistake with its path.

    `where` is the dotted path of the table. Relative paths are taken from `folder`, and stay as they are without one.
    """
    problems: list[str] = []
    instance = read(cls, table, where=where, folder=folder, problems=problems)
    if instance is None:
        raise RunFileError(f"the settings of '{where}' have {count(problems, 'mistake')}", problems)
    return instance


def read(
    cls: type[T],
    table: Mapping[str, Any],
    *,
    where: str,
    folder: Path | None,
    problems: list[str],
    beside: Collection[str] = (),
) -> T | None:
    """Like `parse`, but adds the mistakes to `problems` and returns None if there are any.

    `beside` are keys that the table has beside these settings; they only serve suggestions.
    """
    found: list[str] = []
    values: dict[str, Any] = {}
    fields = _fields(cls)
    for key in table:
        if key not in fields:
            found.append(f"{join(where, key)}: there is no such setting{suggestion(key, [*fields, *beside])}")
    for name, (field, hint) in fields.items():
        at = join(where, name)
        if name in table:
            values[field.name] = _value(hint, table[name], field, at, folder, found)
        elif _required(field):
            found.append(f"{at}: is missing, wanted {words(_schema(hint, field))}")
        else:
            values[field.name] = _absolute(_default(field), folder)
    if not found:
        try:
            return cls(**values)
        except ValueError as error:
            found.append(f"{where or 'settings'}: {error}")
    problems += found
    return None


def _value(
    hint: Any, value: Any, field: dataclasses.Field[Any], at: str, folder: Path | None, problems: list[str]
) -> Any:
    """One value, converted to its field's type; the result means nothing if it adds to `problems`."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return read(hint, value, where=at, folder=folder, problems=problems)
    if (
        (tables := _tables_of(hint))
        and isinstance(value, Mapping)
        and all(isinstance(v, Mapping) for v in value.values())
    ):
        return {
            str(key): read(tables, table, where=join(at, key), folder=folder, problems=problems)
            for key, table in value.items()
        }
    mistake = f"{at}: found {toml_text(value)}, wanted {words(_schema(hint, field))}"
    # Strict JSON is what fits TOML: arrays become tuples and integers floats, but no string becomes a number.
    config = None if dataclasses.is_dataclass(hint) else ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    try:
        parsed = TypeAdapter(hint, config=config).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError, ValueError, RecursionError):
        problems.append(mistake)
        return None
    if not all(_is_within(number, field.metadata) for number in _numbers(parsed)):
        problems.append(mistake)
    return _absolute(parsed, folder)


def _tables_of(hint: Any) -> type | None:
    """The dataclass of each table in a table of tables by name."""
    of = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
    return of if isinstance(of, type) and dataclasses.is_dataclass(of) else None


def _is_within(number: float, bounds: Mapping[str, Any]) -> bool:
    low, high = bounds.get("minimum"), bounds.get("maximum")
    is_long = isinstance(number, int) and number.bit_length() > 63  # TOML has no such integers, and neither has torch
    return not is_long and (low is None or low <= number) and (high is None or number <= high)


def _numbers(value: Any) -> Iterator[float]:
    """Every number in a value, at any depth of its lists and tables."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def _absolute(value: Any, folder: Path | None) -> Any:
    """The value with its paths, at any depth of its lists, taken from `folder`."""
    if isinstance(value, tuple | list):
        return type(value)(_absolute(item, folder) for item in value)
    return absolute(value, folder) if isinstance(value, Path) and folder is not None else value


def dump(instance: Any) -> dict[str, Any]:
    """Settings as plain JSON; `parse` and `restore` read them back to equal ones."""
    return {_key(field): _plain(getattr(instance, field.name)) for field in dataclasses.fields(instance) if field.init}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dump(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def restore(component: type[Component[Any]], settings: Mapping[str, Any], version: int) -> Any:
    """The settings that `dump` wrote when the component's settings had that `version`; CheckpointError otherwise.

    A setting that is missing, because it came later, has its default.
    """
    if version > component.settings_version:
        raise CheckpointError(
            f"the settings of '{component.name}' were written in version {version}, and the installed one reads up to "
            f"version {component.settings_version}; install a newer version of its plugin"
        )
    if version < component.settings_version:
        settings = component.migrate(settings, version)
    problems: list[str] = []
    instance = read(component.Settings, settings, where=component.name, folder=None, problems=problems)
    if instance is None:
        raise CheckpointError(
            f"the recorded settings do not fit the installed '{component.name}'; install the version that wrote them",
            problems,
        )
    return instance


def names(cls: type) -> list[str]:
    """The names of a class's settings."""
    return [_key(field) for field in dataclasses.fields(cls) if field.init]


def _key(field: dataclasses.Field[Any]) -> str:
    """The key of a field in a table: a Python keyword such as `try` has a trailing `_` in the class."""
    return field.name.removesuffix("_")


def rows(cls: type) -> list[SettingRow]:
    """Every setting of a class, in order, as a person reads it."""
    return [
        SettingRow(
            name,
            words(_schema(hint, field)),
            "required" if _required(field) else toml_text(_plain(_default(field))),
            field.metadata.get("help", ""),
        )
        for name, (field, hint) in _fields(cls).items()
    ]


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default of a field that has one."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def json_schema(cls: type) -> dict[str, Any]:
    """A JSON Schema of a table of these settings, with descriptions, defaults and bounds."""
    fields = _fields(cls)
    properties: dict[str, Any] = {}
    for name, (field, hint) in fields.items():
        properties[name] = _schema(hint, field)
        if help := field.metadata.get("help"):
            properties[name]["description"] = help
        if not _required(field) and (default := _plain(_default(field))) is not None:
            properties[name]["default"] = default
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    if required := [name for name, (field, _) in fields.items() if _required(field)]:
        schema["required"] = required
    return schema


def _fields(cls: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """The fields that a table may hold, with their types."""
    hints = typing.get_type_hints(cls)
    return {_key(field): (field, hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def _schema(hint: Any, field: dataclasses.Field[Any]) -> dict[str, Any]:
    """The JSON Schema of a type; empty, which allows everything, for one that has no simple form."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (int, float):
        bounds = {key: field.metadata.get(key) for key in ("minimum", "maximum")}
        schema: dict[str, Any] = {"type": "integer" if hint is int else "number"}
        return schema | {key: bound for key, bound in bounds.items() if bound is not None}
    if hint in _SIMPLE:
        return dict(_SIMPLE[hint])
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(argument, field) for argument in arguments]}
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return {"type": "array", "items": _schema(arguments[0], field)}
    if origin is tuple:
        items = [_schema(argument, field) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], field)}
    return json_schema(hint) if dataclasses.is_dataclass(hint) and isinstance(hint, type) else {}


_SIMPLE: Mapping[Any, Mapping[str, str]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    Path: {"type": "string", "format": "path"},
    type(None): {"type": "null"},
}
