"""MMBench's file, read row by row, and the records that its rows are."""

from __future__ import annotations

import binascii
import csv
from base64 import b64decode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from graftwork.contracts import BadRecord, Image, Record, Turn
from graftwork.errors import DataError
from graftwork_mmbench.answers import LETTERS, by_letter

ROUND = 1_000_000
"""The rows of a question's further rounds have its index plus multiples of this."""
NOTHING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}
"""What pandas, by which upstream reads the file, takes for an empty cell."""
LONGEST_CELL = 2**30
LONGEST_INDEX = 64
"""An image cell that is no longer holds the index of the row that has the image."""


class Pass(NamedTuple):
    """What the totals have to know of one round of a question."""

    question: int
    round: int
    rounds: int
    """How many rounds the question has."""
    branch: str
    """The coarse category, called l2-category."""
    literal: bool = False
    """Whether the answer is the right letter and nothing else."""
    cautious: bool = False
    """Whether the answer is right as `choose_cautiously` reads it."""


@dataclass(frozen=True)
class Row:
    """A row of the file, its cells stripped of nothing."""

    where: str
    index: int
    prompt: str
    """The question, after its hint."""
    options: tuple[str, ...]
    """In the order of the letters, empty where the row has none of a letter."""
    letter: str
    category: str
    branch: str
    image: int | str
    """The index of the row that has the image, or what is wrong with this one's."""

    @property
    def question(self) -> int:
        return self.index % ROUND


@dataclass
class Table:
    """A file as it was read."""

    header: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    cells: list[list[str]] = field(default_factory=list)
    """Those of each row, for the submission; the image's is empty."""
    bad: list[BadRecord] = field(default_factory=list)
    images: dict[int, bytes] = field(default_factory=dict)


def read(path: Path, *, with_images: bool) -> Table:
    """The file row by row, so that only the decoded images are ever in memory, equal ones of a question once."""
    table = Table()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file, _long_cells():
            reader = csv.reader(file, delimiter="\t")
            table.header = next(reader, [])
            columns = {name.strip().lower(): place for place, name in enumerate(table.header)}
            if missing := {"index", "question", "a", "answer", "image"} - columns.keys():
                raise DataError(f"'{path}' has no column {', '.join(sorted(missing))}; is it a file of MMBench?")
            for cells in reader:
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(table.header):
                    table.bad.append(BadRecord(where, f"the row has {len(cells)} cells, not {len(table.header)}"))
                elif not cells[columns["index"]].strip().isdecimal():
                    table.bad.append(BadRecord(where, f"the index '{cells[columns['index']]}' is not a number"))
                else:
                    row = _row(
                        where, {name: cells[place] for name, place in columns.items()}, table.images, with_images
                    )
                    cells[columns["image"]] = ""
                    table.rows.append(row)
                    table.cells.append(cells)
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error.strerror}); correct 'path'") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"'{path}' is not tab separated UTF-8 text ({error}); is it the right file?") from None
    return table


@contextmanager
def _long_cells() -> Iterator[None]:
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _row(where: str, cells: Mapping[str, str], images: dict[int, bytes], with_images: bool) -> Row:
    def cell(name: str) -> str:
        text = cells.get(name, "")
        return "" if text in NOTHING else text

    index = int(cells["index"])
    options = [cell(letter.lower()) for letter in LETTERS]
    while options and not options[-1]:
        options.pop()
    return Row(
        where,
        index,
        "\n".join(text for text in (cell("hint"), cells["question"]) if text),
        tuple(options),
        cell("answer").strip().upper(),
        cell("category"),
        cell("l2-category"),
        _image(index, cells["image"].strip(), images) if with_images else index,
    )


def _image(index: int, text: str, images: dict[int, bytes]) -> int | str:
    """The index of the row with the image, which is kept; or what is wrong with it."""
    if len(text) <= LONGEST_INDEX and text.isdecimal():
        return int(text)
    kind, comma, encoded = text.partition(",")
    if kind.lower().startswith("data:"):  # A data URI, such as data:image/png;base64,…
        if not comma or not kind.lower().endswith(";base64"):
            return "the image's data URI is not base64"
        text = encoded
    try:
        data = b64decode(text)
    except (binascii.Error, ValueError):
        return "the image is not base64"
    if not data:
        return "the row has no image"
    first = images.get(index % ROUND)
    images[index] = first if first is not None and first == data else data
    return index


def rotations(row: Row) -> Iterator[Row]:
    """The row, then the row with its options moved up by one, two, … places; letters without an option stay so."""
    letters, texts = zip(*by_letter(row.options).items(), strict=True) if any(row.options) else ((), ())
    for shift in range(len(letters)):
        moved = dict(zip(letters, texts[shift:] + texts[:shift], strict=True))
        options = tuple(moved.get(letter, "") for letter in LETTERS[: len(row.options)])
        right = letters[letters.index(row.letter) - shift] if row.letter in letters else row.letter
        yield replace(row, index=row.index + shift * ROUND, options=options, letter=right)


def make_record(row: Row, rounds: int, images: Mapping[int, bytes], directly: str) -> Record | BadRecord:
    """The question of a row, one of `rounds`; `directly` is the line that asks for a letter."""
    data = images.get(row.image) if isinstance(row.image, int) else None
    if data is None:
        why = row.image if isinstance(row.image, str) else f"there is no image in row {row.image}, which this row names"
        return BadRecord(row.where, why)
    texts = by_letter(row.options)
    if "A" not in texts:
        return BadRecord(row.where, "the row has no option A")
    if row.letter not in texts:
        return BadRecord(
            row.where, f"the answer '{row.letter}' is none of the {len(texts)} options, {', '.join(texts)}"
        )
    lines = [row.prompt, *(f"{letter}. {text}" for letter, text in texts.items())]
    return Record(
        id=str(row.index),
        turns=(Turn("user", "\n".join(["<image>", *lines, directly])),),
        images=(Image(data=data),),
        group=row.category,
        reference=(row.letter,),
        where=row.where,
        unit=str(row.question),
        meta={
            "options": row.options,
            "pass": Pass(row.question, row.index // ROUND, rounds, row.branch),
        },
    )
