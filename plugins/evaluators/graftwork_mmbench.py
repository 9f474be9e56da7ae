"""MMBench (Liu et al., MMBench: Is Your Multi-modal Model an All-around Player?, arXiv:2307.06281): every question is
asked once for each rotation of its options, and counts only if all the answers are right."""

from __future__ import annotations

import binascii
import csv
from base64 import b64decode
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from graftwork.contracts import BadRecord, Evaluator, Image, Record, Requires, Score, Turn, hookimpl, setting
from graftwork.data import missing_files, required
from graftwork.errors import DataError

if TYPE_CHECKING:
    from graftwork.contracts import Prediction

LETTERS = "ABCD"
ROUND = 1_000_000
"""The rows of a question's further rounds have its index plus multiples of this."""
DIRECTLY = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}
NOTHING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "n/a", "null"),
}
"""What upstream's reader, pandas, takes for an empty cell, beside `nan` and `none` in any case."""
NOT_SUBMITTED = {"hint", "category", "source", "image", "comment", "l2-category"}
LONGEST_CELL = 2**30
LONGEST_INDEX = 64
"""An image cell that is no longer holds the index of the row that has the image."""


@dataclass(frozen=True)
class MmBenchSettings:
    """Which questions to ask, and how often."""

    path: Path | None = setting(None, "The tab separated file, such as mmbench_dev_20230712.tsv or MMBench_DEV_EN.tsv")
    circular: Literal["file", "make", "off"] = setting(
        "file", "The rounds: those in the file, all rotations of its first rows, or the first rows alone"
    )
    language: Literal["en", "cn"] = setting("en", "The language of the line that asks for a letter")


class Pass(NamedTuple):
    """What the totals have to know of one round of a question."""

    question: int
    round: int
    rounds: int
    """How many rounds the question has."""
    branch: str
    """The coarse category, called l2-category."""
    literal: bool
    """Whether the answer is the right letter and nothing else."""


class MmBench(Evaluator[MmBenchSettings]):
    """MMBench's multiple-choice questions, right only if right in every rotation of their options"""

    name = "mmbench"
    requires = Requires(packages=("openpyxl>=3.1",))
    Settings = MmBenchSettings
    max_new_tokens: ClassVar[int] = 1024

    def validate(self, plan: object) -> Iterable[str]:
        return missing_files(self.settings, "path")

    def records(self) -> Iterator[Record | BadRecord]:
        """Question by question, each with its rounds; first what is malformed. DataError for a file of another kind."""
        path = required(self.settings, "path")
        table = _read(path, with_images=True)
        rows = [row for row in table.rows if row.index < ROUND or self.settings.circular == "file"]
        if self.settings.circular == "file" and not any(row.index >= ROUND for row in rows):
            raise DataError(f"'{path}' has no rotated rows; set 'circular' to 'make' or to 'off'")
        if not any(row.letter for row in rows):
            raise DataError(f"'{path}' has no answers, so it is a test split that only MMBench's server can score")
        yield from table.bad
        questions: dict[int, list[_Row]] = defaultdict(list)
        for row in rows:
            questions[row.question].append(row)
        for rounds in questions.values():
            if self.settings.circular == "make":
                rounds = [rotated for row in rounds for rotated in _rotations(row)]
            for row in sorted(rounds, key=lambda row: row.index):
                yield _record(row, len(rounds), table.images, DIRECTLY[self.settings.language])

    def score(self, record: Record, answer: str) -> Score:
        """1 when the choice that can be told from the answer is the right one."""
        right, options = record.reference[0], record.meta["options"]
        detail = record.meta["pass"]._replace(literal=answer == right)
        return Score(float(choose(answer, options) == right), record.group, detail)

    def total(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """The share of questions with every round right, then what that is by the simpler rules and by category.

        `vanilla` looks at the unrotated question alone; `strict` wants the bare letter in every round. A round that was
        not answered is not right. A question that comes several times, as in a resample, counts as often.
        """
        first, questions = [0.0, 0.0], dict[int, list[Any]]()
        for (group, detail, value), times in Counter((s.group, s.detail, s.value) for s in scores).items():
            tally = questions.setdefault(detail.question, [times, group, detail.branch, detail.rounds, 0, 0])
            tally[4] += value
            tally[5] += detail.literal
            if detail.round == 0:
                first[0] += value * times
                first[1] += times
        hits: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for times, group, branch, rounds, right, literal in questions.values():
            for name in {self.metric, branch and f"l2: {branch}", group} - {""}:
                hits[name][0] += times * (right == rounds)
                hits[name][1] += times
            hits["strict"][0] += times * (literal == rounds)
            hits["strict"][1] += times
        if first[1]:
            hits["vanilla"] = first
        order = (self.metric, "vanilla", "strict")
        names = [name for name in order if name in hits] + sorted(hits.keys() - set(order), key=_branches_first)
        return {name: hits[name][0] / hits[name][1] for name in names}

    def write(self, answered: Sequence[Prediction], folder: Path) -> None:
        """`submission-VARIANT.xlsx` for each variant: the rows of the file with what was answered, as MMBench's server wants."""
        table = _read(required(self.settings, "path"), with_images=False)
        for variant in answered[0].answers:
            replies = {int(one.record.id): one.answers[variant] for one in answered}
            if self.settings.circular == "make":  # These rounds are not the file's.
                replies = {index: text for index, text in replies.items() if index < ROUND}
            _write_submission(table, replies, folder / f"submission-{variant}.xlsx")


@hookimpl
def evaluators() -> list[type[Evaluator[Any]]]:
    return [MmBench]


# Answers --------------------------------------------------------------------------------------------------------------


def choose(answer: str, options: Sequence[str]) -> str | None:
    """The letter that an answer means, in the two steps of MMBench's paper without its third, a language model as judge.

    The only option letter among the words; failing that the only option whose text is in the answer. In more than three
    words an A is taken for the article.
    """
    words = answer.translate(_TO_SPACE).split()
    letters = LETTERS[: len(options)]
    if len(found := [letter for letter in letters if letter in words]) == 1 and not ("A" in words and len(words) > 3):
        return found[0]
    named = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


_TO_SPACE = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def _branches_first(name: str) -> tuple[bool, str]:
    return not name.startswith("l2: "), name


# Questions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A row of the file, its cells stripped of nothing."""

    where: str
    index: int
    prompt: str
    """The question, after its hint."""
    options: tuple[str, ...]
    letter: str
    category: str
    branch: str
    image: int | str
    """The index of the row that has the image, or what is wrong with this one's."""

    @property
    def question(self) -> int:
        return self.index % ROUND


def _rotations(row: _Row) -> Iterator[_Row]:
    """The row, then the row with its options moved up by one, two, … places."""
    for shift in range(len(row.options)):
        letter = row.letter
        if letter and letter in LETTERS:
            letter = LETTERS[(LETTERS.index(letter) - shift) % len(row.options)]
        options = row.options[shift:] + row.options[:shift]
        yield replace(row, index=row.index + shift * ROUND, options=options, letter=letter)


def _record(row: _Row, rounds: int, images: Mapping[int, bytes], directly: str) -> Record | BadRecord:
    data = images.get(row.image) if isinstance(row.image, int) else None
    if data is None:
        why = row.image if isinstance(row.image, str) else f"there is no image in row {row.image}, which this row names"
        return BadRecord(row.where, why)
    if not row.options:
        return BadRecord(row.where, "the row has no option A")
    if row.letter not in LETTERS[: len(row.options)] or not row.letter:
        return BadRecord(row.where, f"the answer '{row.letter}' is none of the {len(row.options)} options")
    lines = [row.prompt, *(f"{letter}. {option}" for letter, option in zip(LETTERS, row.options, strict=False))]
    return Record(
        id=str(row.index),
        turns=(Turn("user", "\n".join(["<image>", *lines, directly])),),
        images=(Image(data=data),),
        group=row.category,
        reference=(row.letter,),
        where=row.where,
        meta={
            "options": row.options,
            "pass": Pass(row.question, row.index // ROUND, rounds, row.branch, literal=False),
        },
    )


# The file -------------------------------------------------------------------------------------------------------------


@dataclass
class _Table:
    """A file as it was read."""

    header: list[str] = field(default_factory=list)
    rows: list[_Row] = field(default_factory=list)
    cells: list[list[str]] = field(default_factory=list)
    """Those of each row, for the submission; the image's is empty."""
    bad: list[BadRecord] = field(default_factory=list)
    images: dict[int, bytes] = field(default_factory=dict)


def _read(path: Path, *, with_images: bool) -> _Table:
    """The file row by row, so that only the decoded images are ever in memory, equal ones of a question once."""
    table = _Table()
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


def _is_nothing(text: str) -> bool:
    return text in NOTHING or text.lower() in ("nan", "none")


@contextmanager
def _long_cells() -> Iterator[None]:
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _row(where: str, cells: Mapping[str, str], images: dict[int, bytes], with_images: bool) -> _Row:
    def cell(name: str) -> str:
        text = cells.get(name, "")
        return "" if _is_nothing(text) else text

    index = int(cells["index"])
    options = tuple(cell(letter.lower()) for letter in LETTERS)
    return _Row(
        where,
        index,
        "\n".join(text for text in (cell("hint"), cells["question"]) if text),
        options[: options.index("")] if "" in options else options,
        cell("answer").strip().upper(),
        cell("category"),
        cell("l2-category"),
        _image(index, cells["image"].strip(), images) if with_images else index,
    )


def _image(index: int, text: str, images: dict[int, bytes]) -> int | str:
    """The index of the row with the image, which is kept; or what is wrong with it."""
    if len(text) <= LONGEST_INDEX and text.isdecimal():
        return int(text)
    try:
        data = b64decode(text)
    except (binascii.Error, ValueError):
        return "the image is not base64"
    if not data:
        return "the row has no image"
    first = images.get(index % ROUND)
    images[index] = first if first is not None and first == data else data
    return index


def _write_submission(table: _Table, replies: Mapping[int, str], path: Path) -> None:
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
        found = [None if _is_nothing(cells[place]) else text(cells[place]) for place in places]
        found[index] = row.index
        sheet.append([*found[:6], text(replies.get(row.index, "")), *found[6:]])
    book.save(path)
