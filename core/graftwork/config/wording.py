"""How settings and values are written for people."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_IRREGULAR = {"boolean": "true or false", "null": "nothing"}


def words(schema: Mapping[str, Any], plural: bool = False) -> str:
    """A JSON Schema as people write it: `integer ≥ 1`, `list of strings`, `'cosine' | 'linear'`."""
    if "enum" in schema:
        return " | ".join(repr(value) if isinstance(value, str) else toml_text(value) for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(words(option, plural) for option in schema["anyOf"])
    kind = schema.get("type")
    if kind == "array" and "items" in schema:
        return f"list{'s' if plural else ''} of {words(schema['items'], plural=True)}"
    if kind == "array":
        items = [words(item) for item in schema["prefixItems"]]
        same = len(set(items)) == 1
        return (
            f"list of {len(items)} {words(schema['prefixItems'][0], plural=True)}"
            if same
            else f"list of {', '.join(items)}"
        )
    if kind == "object":
        values = schema["additionalProperties"]
        tables = f"table{'s' * plural}"
        return f"{tables} of {words(values, plural=True)}" if values else tables
    if kind is None:
        return "value"
    name = _IRREGULAR.get(kind) or schema.get("format", kind) + "s" * plural
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{name} from {_short(low)} to {_short(high)}"
    return name + (f" ≥ {_short(low)}" if low is not None else "") + (f" ≤ {_short(high)}" if high is not None else "")


def _short(number: float) -> str:
    return str(int(number) if number == int(number) else number)


def toml_text(value: Any) -> str:
    """A value as TOML writes it, shortened."""
    if isinstance(value, Mapping):
        return "a table" if value else "{}"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 63:
        return "an integer beyond 64 bits"
    if isinstance(value, str | int | float):
        text = repr(value)
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(map(toml_text, value[:9]))}{', …' * (len(value) > 9)}]"
    else:
        text = f"the {type(value).__name__} {value}"
    return text if len(text) <= 80 else f"{text[:79]}…"


def join(where: str, key: str) -> str:
    """The dotted path of a key in the table at `where`."""
    return f"{where}.{key}" if where else key


def suggestion(name: str, known: Collection[str]) -> str:
    """`; did you mean 'x'?` where something known is near, else what is known."""
    import difflib

    if near := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean '{near[0]}'?"
    return f"; known: {', '.join(known)}" if known else ""


def count(items: Collection[object], noun: str) -> str:
    """`1 mistake`, `2 mistakes`."""
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"
