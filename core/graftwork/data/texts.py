"""Plain values of data files, and how messages call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftwork.errors import DataError


def plain_text(what: str, text: str) -> str:
    """The text; DataError when it holds half of a surrogate pair, which no tokenizer or file takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{what} holds a lone surrogate, which is not text") from None
    return text


def type_name(value: Any) -> str:
    """What a value is, with its article: `a list`."""
    return NAMES.get(type(value), "a number" if isinstance(value, int | float) else "something else")


NAMES: Mapping[type, str] = {
    dict: "an object",
    list: "a list",
    tuple: "a list",
    str: "a string",
    bool: "a boolean",
    bytes: "bytes",
    type(None): "null",
}
