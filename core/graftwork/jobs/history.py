"""What became of single records: where they came from, who wrote them, what changed, verified or dropped them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from graftwork.checkpoint import manifest
from graftwork.checkpoint.store import newest
from graftwork.data import curated
from graftwork.data.store import DROPPED, RECORDS, REPLIES
from graftwork.errors import CheckpointError, DataError
from graftwork.jobs.data_sets import DataSet
from graftwork.weights import sha256


def record_history(folder: str | PathLike[str], id: str) -> dict[str, Any]:
    """What became of a record of a data set, or of one that a checkpoint was trained on: where it came from, what changed it, whether it
    was kept, and why not.

    `replies` holds what writers were asked for it and replied, `writers` who they are, `verification` how its group fared. The histories of
    the records that it was made from are under `of`. What the data sets know that this one was read from is in it. DataError where no
    record has that id, or the data is no more what it was.
    """
    data_sets = open_all(Path(folder))
    for name in (RECORDS, DROPPED):  # One may have dropped what another one gave.
        for data_set in data_sets:
            if _line_of(data_set, name, id):
                return {"data_set": str(data_set.folder), **_history([*data_set.ancestry], id, ())}
    seen = " or ".join(f"'{each.folder}'" for each in data_sets)
    raise DataError(f"{seen} knows no record '{id}'; see {RECORDS} and {DROPPED} there")


def open_all(folder: Path) -> list[DataSet]:
    """The data set in a folder, or those that the checkpoint or run there was trained on. DataError where there is none."""
    if curated.is_data_set(folder):
        return [DataSet.open(folder)]
    return [DataSet.open(each) for each in data_sets_of(folder)]


def data_sets_of(folder: Path) -> list[Path]:
    """The data sets that a checkpoint, or the newest one of a run, was trained on.

    DataError where there are none, one is gone, or is another than it was.
    """
    try:
        checkpoint = newest(folder)
    except CheckpointError:
        raise DataError(
            f"'{folder}' is neither a data set nor a checkpoint; name the folder that graftwork data process wrote, or a run"
        ) from None
    read = manifest.read(checkpoint)
    hashes = {file["sha256"] for file in read.data.get("digest", {}).get("files", {}).values()}
    values = [value for source in read.plan.run_context.sources for value in source.settings.values()]
    paths = [Path(value) for value in values if isinstance(value, str) and value]
    found = [path for path in paths if curated.is_data_set(path)]
    if not found:
        named = ", ".join(f"'{path}'" for path in paths if path.is_absolute()) or "none"
        raise DataError(f"'{checkpoint}' was trained on no data set that is still there (its sources: {named})")
    for path in found:
        if hashes and sha256(path / curated.MANIFEST) not in hashes:
            raise DataError(f"'{path}' was made anew since '{checkpoint}' was trained on it; put the old one back")
    return found


def _line_of(data_set: DataSet, name: str, id: str) -> dict[str, Any] | None:
    """What one of a data set's files says of a record; None where it says nothing."""
    return next(_lines_with(data_set.folder / name, id), None)


def _history(data_sets: Sequence[DataSet], id: str, above: tuple[str, ...]) -> dict[str, Any]:
    """The history by a data set, and by those that it was read from, where the first one that knows the record counts."""
    found, kept, dropped = dict[str, Any](id=id), None, None
    for known in data_sets:
        kept, dropped = _line_of(known, RECORDS, id), _line_of(known, DROPPED, id)
        if kept or dropped:
            break
    else:
        return found | {"kept": False, "from": "", "changes": []}
    if kept is not None:
        own = kept.get("graftwork", {})
        found |= {"kept": True, "from": own.get("from", ""), "record": kept, "images": _images(known, kept)}
        found |= {name: own[name] for name in ("made_by",) if own.get(name)}
        parents = [each for each in own.get("of", ()) if each not in (id, *above)]
        found["of"] = [_history(data_sets, each, (*above, id)) for each in parents]
    if dropped is not None:
        found |= {"kept": False, "from": dropped["where"], "dropped": dropped}
    found["changes"] = [change for each in data_sets for change in _lines_with(each.folder / curated.CHANGED, id)]
    group = (kept or {}).get("graftwork", {}).get("group", "")
    return found | next(filter(None, (_written(each, id, group) for each in data_sets)), {})


def _written(data_set: DataSet, id: str, group: str) -> dict[str, Any]:
    """What was asked for a record and replied, by whom, and how its group was verified; empty where no writer was asked."""
    file, content = data_set.folder / REPLIES, data_set.manifest
    replies = [*_lines_with(file, id)] if file.exists() else []
    if not replies:
        return {}
    verification = content.get("verification") or {}
    writers = {"writer": content.get("writer"), "verifier": verification.get("writer")}
    used = {reply["writer"] for reply in replies}
    found = {"replies": replies, "writers": {name: who for name, who in writers.items() if name in used}}
    for verdict in verification.get("groups", ()):
        if verdict["group"] == group and any(reply["stage"] == verification["use"] for reply in replies):
            found["verification"] = {"use": verification["use"], **verdict}
    return found


def _images(data_set: DataSet, record: Mapping[str, Any]) -> list[str]:
    """Where the images of a record are."""
    return [
        os.path.normpath(path)
        for path in curated.image_paths(data_set.manifest, data_set.folder, record.get("image", []))
    ]


def _lines_with(file: Path, id: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines whose id it is."""
    begins = json.dumps({"id": id}, ensure_ascii=False, separators=(",", ":"))[:-1].encode("utf-8", "surrogatepass")
    with file.open("rb") as lines:
        for line in lines:
            if line.startswith(begins):
                yield json.loads(line)
