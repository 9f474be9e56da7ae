"""Records as rows for the worker, and what it made of them as records again."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from graftwork.contracts import BadRecord, Image, Record, Turn
from graftwork.errors import DataError

Row = dict[str, Any]
KEPT = "records.pickle"


FIRST_IMAGES = 32
"""How many images the nodes of a Ray cluster are asked to open before the work begins."""


class Written(NamedTuple):
    """What was written as rows."""

    records: int
    """How many records."""
    images: list[str]
    """The files of the first images."""


def write_rows(records: Iterable[Record], folder: Path, *, keep: bool = False) -> Written:
    """Write `rows.jsonl`, and the bytes of images that lie in no file as `images.bin`; OSError where the disk is full.

    With `keep` the records themselves as well, for `kept_records`: those that come one after another come once.
    """
    count, first = 0, list[str]()
    with (
        (folder / "rows.jsonl").open("w", encoding="utf-8") as rows,
        (folder / "images.bin").open("wb") as data,
        (folder / KEPT).open("wb") if keep else nullcontext() as kept,
    ):
        for count, record in enumerate(records, start=1):
            images = [_place(image, data, folder) for image in record.images]
            turns = [turn.text for turn in record.turns]
            rows.write(json.dumps({"n": count - 1, "turns": turns, "images": images, "changed": []}) + "\n")
            if kept:
                pickle.dump(record, kept)
            first += [image[0] for image in images[: FIRST_IMAGES - len(first)]]
    return Written(count, first)


def kept_records(folder: Path) -> Iterator[Record]:
    """The records that `write_rows` kept, in their order."""
    with (folder / KEPT).open("rb") as file:
        while file.peek(1):
            yield pickle.load(file)


def _place(image: Image, data: Any, folder: Path) -> list[Any]:
    """Where the worker finds an image: a file, or bytes in one."""
    if image.path is not None:
        return [str(image.path.absolute()), *(image.span or ())]
    first = data.tell()
    return [str(folder / "images.bin"), first, data.write(image.data or b"")]


def read_rows(path: Path, records: Iterable[Record]) -> Iterator[Record | BadRecord]:
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
        place = f"{record.place}, {row['op']}"
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
    return BadRecord.of(record, f"{dropped['op']}: {', '.join(filter(None, parts))}", **_plain(dropped["stats"]))


def _plain(value: Any) -> Any:
    """What an operator measured, as JSON has it: what is no finite number as the text of it."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _listed(values: Row) -> str:
    return ", ".join(f"{name} {json.dumps(_short(value))}" for name, value in values.items())


def _short(value: Any) -> Any:
    """Numbers as people read them; a record of an operator's keeps them in full."""
    if isinstance(value, list):
        return [_short(item) for item in value[:8]]
    return float(f"{value:.6g}") if isinstance(value, float) else value
