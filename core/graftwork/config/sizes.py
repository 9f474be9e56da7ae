"""Sizes of memory as people write them."""

from __future__ import annotations

import re

from graftwork.errors import GraftworkError

UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def parse_size(text: str) -> int:
    """The bytes that `24 GiB`, `24GB` or `512 MiB` means; GraftworkError for anything else.

    Makers of CUDA devices write GB and mean GiB, and so do people who quote them.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise GraftworkError(f"'{text}' is not a memory size; write one such as '24 GiB'")
    power = UNITS[found[2].lower()]
    return int(float(found[1]) * 2**power)


def format_size(size: int) -> str:
    """A size as people read it: `11.9 GiB`, `512 MiB`, `3.2 KiB`."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 0.97 * 2**power:
            value = size / 2**power
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{size} bytes"
