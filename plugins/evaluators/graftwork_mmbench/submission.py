"""The file that MMBench's server wants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftwork_mmbench.table import NOTHING, Table

NOT_SUBMITTED = {"hint", "category", "source", "image", "comment", "l2-category"}


def write_submission(table: Table, replies: Mapping[int, str], path: Path) -> None:
    """The columns and rows of LLaVA's and MGM's converter: the file's own, with the answers as the seventh."""
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    columns = [name.strip().lower() for name in table.header]
    places = [place for place, name in enumerate(columns) if name not in NOT_SUBMITTED]
    index = places.index(columns.index("index"))
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")

    def text(value: str) -> Any:
        cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value))
        cell.data_type = "s"  # An answer that begins with = is no formula.
        return cell

    names = [table.header[place] for place in places]
    sheet.append([*names[:6], "prediction", *names[6:]])
    for row, cells in zip(table.rows, table.cells, strict=True):
        found = [None if cells[place] in NOTHING else text(cells[place]) for place in places]
        found[index] = row.index
        sheet.append([*found[:6], text(replies.get(row.index, "")), *found[6:]])
    book.save(path)
