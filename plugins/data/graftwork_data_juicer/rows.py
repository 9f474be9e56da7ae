"""Records as rows for the worker, and what it made of them as records again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from graftwork.contracts import BadRecord, Image, Record, Turn
from graftwork.errors import DataError

Row = dict[str, Any]


def write_rows(records: Iterable[Record], folder: Path) -> None:
    """Write `rows.jsonl`, and the bytes of images that lie in no file as `images.bin`; OSError where the disk is full."""
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as rows, (folder / "images.bin").open("wb") as data:
        for number, record in enumerate(records):
            row = {
                "n": number,
                "turns": [turn.text for turn in record.turns],
                "images": [_place(image, data, folder) for image in record.images],
                "changed": [],
            }
            rows.write(json.dumps(row) + "\n")


def _place(image: Image, data: Any, folder: Path) -> list[Any]:
    """Where the worker finds an image: a file, or bytes in one."""
    if image.path is not None:
        return [str(image.path.absolute()), *(image.span or ())]
    first = data.tell()
    return [str(folder / "images.bin"), first, data.write(image.data or b"")]


def read_rows(path: Path, records: Sequence[Record]) -> Iterator[Record | BadRecord]:
    """What became of each record, in their order; DataError unless the rows are about all of them."""
    with path.open(encoding="utf-8") as file:
        groups = groupby(map(json.loads, file), lambda row: row["n"])
        for number, record in enumerate(records):
            found, rows = next(groups, (None, iter(())))
            if found != number:
                raise DataError(f"Data-Juicer's process gave back no row for record '{record.id}'; report it")
            yield from (_outcome(record, row) for row in rows)


def _outcome(record: Record, row: Row) -> Record | BadRecord:
    """A record as it came or with other texts, one that was made of it, or why it is dropped."""
    if "made" in row:
        question, caption = row["turns"]
        turns = (Turn("user", question), Turn("assistant", caption))
        meta = {"made_by": "data-juicer", "of": [record.id]}
        place = f"{record.where or record.id}, {row['op']}"
        record = Record(
            f"{record.id}/caption/{row['made']}", turns, record.images, where=place, meta=meta, source=record.source
        )
    elif row["changed"]:
        texts = zip(record.turns, row["turns"], strict=True)
        record = replace(record, turns=tuple(replace(turn, text=text) for turn, text in texts))
    return _dropped(record, row["dropped"]) if "dropped" in row else record


def _dropped(record: Record, dropped: Row) -> BadRecord:
    if "error" in dropped:
        return BadRecord.of(record, f"{dropped['op']}: {dropped['error']}")
    parts = (_listed(dropped["stats"]), _listed(dropped["limits"]))
    return BadRecord.of(record, f"{dropped['op']}: {', '.join(filter(None, parts))}", **dropped["stats"])


def _listed(values: Row) -> str:
    return ", ".join(f"{name} {json.dumps(_short(value))}" for name, value in values.items())


def _short(value: Any) -> Any:
    """Numbers as people read them; a record of an operator's keeps them in full."""
    if isinstance(value, list):
        return [_short(item) for item in value[:8]]
    return float(f"{value:.6g}") if isinstance(value, float) else value
