"""Data-Juicer's deduplicators of texts, which look at all rows at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .guard import import_data_juicer
from .judging import META, describe, filter_text


def drop_duplicates(step: Mapping[str, Any], rows: Path, out: Path) -> None:
    """Write the rows, those of `rows` that a deduplicator drops marked as dropped."""
    operator = import_data_juicer().modules[step["op"]](**step["params"])
    from data_juicer.core.data import NestedDataset

    hashes, failed = [], {}
    with rows.open(encoding="utf-8") as file:
        for place, line in enumerate(file):
            row = json.loads(line)
            if "dropped" in row:
                continue
            try:
                found = dict(operator.compute_hash({"text": filter_text(row["turns"]), META: {}}))
            except Exception as error:
                failed[place] = describe(error)
                continue
            hashes.append({"place": place, **{key: value for key, value in found.items() if key not in ("text", META)}})
    kept = set(operator.process(NestedDataset.from_list(hashes))[0]["place"]) if hashes else set()
    asked = {each["place"] for each in hashes}
    with rows.open(encoding="utf-8") as file, out.open("w", encoding="utf-8") as written:
        for place, line in enumerate(file):
            if place in failed or (place in asked and place not in kept):
                row = json.loads(line)
                row["dropped"] = {"op": step["op"], "error": failed.get(place, "its text is that of an earlier record")}
                line = json.dumps(row, sort_keys=True) + "\n"
            written.write(line)
