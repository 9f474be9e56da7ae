"""Text of the catalogue: errors in one line, and the nearest name."""

from __future__ import annotations

from collections.abc import Iterable


def in_one_line(error: BaseException) -> str:
    """The type and the message of an error, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` where a known name is near; otherwise empty."""
    from difflib import get_close_matches

    near = get_close_matches(name, [*known], n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
