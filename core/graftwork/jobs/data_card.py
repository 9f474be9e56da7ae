"""`graftwork data card`: the card of a data set, from what is known of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from graftwork.checkpoint.writing import replace_text
from graftwork.config import settings
from graftwork.config.tables import CardTable
from graftwork.data import curated
from graftwork.data.store import RECORDS, REPLIES, values_in
from graftwork.errors import DataError
from graftwork.jobs.data_sets import DataSet
from graftwork.report.data_card import CardSource, CardWriting, DataCard, render_card
from graftwork.weights import sha256

FILE = "README.md"
"""Where the Hugging Face hub looks for a card."""


def write_data_card(folder: str | PathLike[str], out: str | PathLike[str] | None = None) -> Path:
    """Write the card of a data set into it, or to the file `out`, and return the file.

    DataError where the folder is no data set, or another text is there already.
    """
    text, file = render_card(data_card(folder)), Path(out or Path(folder) / FILE)
    if file.exists() and (not file.is_file() or file.read_text(encoding="utf-8") != text):
        raise DataError(f"'{file}' is there already, and says something else; name another file, or remove it")
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, text)
    return file


def data_card(folder: str | PathLike[str]) -> DataCard:
    """What the card of a data set says. DataError where the folder is none."""
    data_set = DataSet.open(folder)
    content, place = data_set.manifest, data_set.folder
    told = settings.parse(CardTable, content["data"].get("card", {}), where="card", folder=None)
    groups, made_by, images = Counter[str](), Counter[str](), set[str]()
    for record in values_in(place / RECORDS):
        own, names = record.get("graftwork", {}), record.get("image", [])
        groups[own.get("group", "")] += 1
        images.update([names] if isinstance(names, str) else names)
        if maker := own.get("made_by"):
            made_by[maker] += 1
    return DataCard(
        title=told.title or place.absolute().name,
        description=told.description,
        license=told.license,
        records=data_set.records,
        images=len(images),
        copied=all(map(curated.COPIED.fullmatch, images)),
        groups=dict(groups.most_common()),
        made_by=dict(made_by.most_common()),
        sources=list(_sources(data_set)),
        stages=data_set.stages,
        written=list(_written(data_set)),
        checked_against=sorted({name for names in content["checked_against"].values() for name in names}),
        not_for=told.not_for,
        versions={"Graftwork": content["graftwork"], **content["libraries"]},
        sha256=sha256(place / curated.MANIFEST),
    )


def _sources(data_set: DataSet) -> Iterator[CardSource]:
    """The sources of a data set, and of those that these are, as far as they are still there."""
    above = {str(each.folder): each for each in data_set.sources}
    tables = data_set.manifest["data"]["data"]["source"]
    for table, stage in zip(tables, data_set.stages, strict=False):
        known = {name: value for name, value in stage["settings"].items() if name in table}
        of = [each for value in known.values() if (source := above.get(str(value))) for each in _sources(source)]
        yield CardSource(stage["name"], known, table.get("license"), stage["read"], stage["dropped"], of)


def _written(data_set: DataSet) -> Iterator[CardWriting]:
    """Who wrote for a data set, and for those that it was read from."""
    for each in data_set.ancestry:
        writer, verification = each.manifest.get("writer"), each.manifest.get("verification")
        if writer or verification:
            yield CardWriting(each.folder.absolute().name, writer, verification, _prompts(each.folder / REPLIES))


def _prompts(file: Path) -> dict[str, list[str]]:
    """By operator, the first prompt that it has sent."""
    found: dict[str, list[str]] = {}
    for reply in values_in(file) if file.exists() else ():
        found.setdefault(reply["stage"], [f"{role}: {text}" for role, text in reply["prompt"]])
    return found
