"""Tables of what `measure.py` found, in Markdown: python benchmarks/gpu/table.py gpu-out/measure.json"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SIZES = ("predicted", "requested", "allocated", "reserved")
"""What is in bytes."""


def shown(name: str, value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {shown(key, each)}" for key, each in value.items() if each not in (None, "", [], {}))
    if name in SIZES and value:
        return f"{value / 2**30:.2f} GiB"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = " ".join(str(value).split())
    if len(text) <= 160:
        return text
    return f"...{text[-157:]}" if name == "said" else f"{text[:157]}..."  # a command comes to the point at its end


def lines(told: Mapping[str, Any]) -> Iterator[str]:
    """A table for each check."""
    yield f"Measured on {told['begun'][:10]}{', with tiny models' if told['tiny'] else ''}."
    for check, result in told["checks"].items():
        yield f"\n### {check}\n\nIt took {result['seconds']} s and was {result['ended']}.\n"
        yield "| case | found |\n| --- | --- |"
        for case, value in result["found"].items():
            found = (
                {name: each for name, each in value.items() if name != "trace"} if isinstance(value, dict) else value
            )
            yield f"| {case} | {shown('', found).replace('|', '/')} |"


if __name__ == "__main__":
    print("\n".join(lines(json.loads(Path(sys.argv[1]).read_text()))))
