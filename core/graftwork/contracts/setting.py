"""A field of a `Settings` dataclass."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def setting(default: Any, help: str, *, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A field of a `Settings` dataclass: its default, its line of help, and its inclusive bounds.

    The annotation says the rest: `Literal["a", "b"]` for a choice, `Path` for a path (relative ones are taken from the
    folder of the run file), `tuple[str, ...]` for a list, `int | None` for an optional number.
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum}
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
