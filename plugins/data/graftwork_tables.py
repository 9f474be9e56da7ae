"""Two data sources of tables: parquet files, and data sets of the library `datasets`, from a folder or the hub.

A row holds messages and images, or a question, its answer or answers and an image. No image is decoded while it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.contracts import (
    BadRecord,
    DataSource,
    Record,
    Requires,
    hookimpl,
    missing_packages,
    setting,
)
from graftwork.data import (
    OWN,
    ImageFolder,
    encoded_bytes,
    extension_of,
    files_at,
    first_records,
    make_records,
    missing_files,
    read_example,
    to_messages,
)
from graftwork.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 64
"""How many rows are in memory at a time, when reading and when writing: with their images, tens of megabytes."""
LAYOUT: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations"),
    "image": ("image", "images"),
    "question": ("question",),
    "answer": ("answer", "answers"),
}
"""The columns that are recognised; settings of these names name others."""
BESIDE = ("id", "weight", "system", "tools", "video", "videos", "audio", "audios", OWN)
"""The other columns that are read."""


@dataclass(frozen=True)
class ColumnSettings:
    """Which columns hold what."""

    messages: str = setting("", "The column of messages; by default messages or conversations")
    image: str = setting("", "The column of the image or images; by default image or images")
    question: str = setting("", "The column of questions; by default question")
    answer: str = setting("", "The column of the answer or answers; by default answer or answers")
    limit: int | None = setting(None, "Read only so many records, from the first", minimum=1)
    group: str = setting("", "The group under which these records are counted")


@dataclass(frozen=True)
class ParquetSettings(ColumnSettings):
    """Where the tables are, and which columns hold what."""

    path: Path | None = setting(None, "The file, or a folder of files that end in .parquet")
    image_folder: Path | None = setting(None, "What image paths are relative to; by default the folder of each file")


@dataclass(frozen=True)
class HfDatasetSettings(ColumnSettings):
    """Which data set, and which columns hold what."""

    path: Path | None = setting(None, "A folder: saved by save_to_disk, or anything that load_dataset reads")
    dataset: str = setting("", "Instead of a folder, a hub id: owner/name")
    name: str | None = setting(None, "Which configuration of the data set")
    split: str = setting("train", "Which of its splits; a slice such as train[:1%] only of what load_dataset reads")
    revision: str | None = setting(None, "Which branch, tag or commit on the hub")
    image_folder: Path | None = setting(
        None, "What image paths are relative to; by default the folder, and for the hub none"
    )


class Parquet(DataSource[ParquetSettings]):
    """Parquet files of messages and images, or of questions, answers and images"""

    name = "parquet"
    requires = Requires(packages=("pyarrow>=15",))
    Settings = ParquetSettings

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By the end of its name, or of those of the files in it."""
        return path.suffix == ".parquet" or any(path.glob("*.parquet"))

    def validate(self, plan: object) -> Iterable[str]:
        return missing_files(self.settings, "path")

    def records(self) -> Iterator[Record | BadRecord]:
        """The records of each file in turn."""
        _require(self)
        return first_records((item for file in self.files() for item in self._of(file)), self.settings.limit)

    def files(self) -> Sequence[Path]:
        """The file, or those of the folder."""
        return files_at(self.settings, ".parquet")

    @classmethod
    def write(cls, records: Iterable[Record], folder: Path) -> Path:
        """One file, with the images in it as `datasets` has them."""
        _require(cls)
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder.mkdir(parents=True, exist_ok=True)
        file, waiting = folder / "records.parquet", map(_row, records)
        with pq.ParquetWriter(file, _schema()) as writer:
            while rows := list(islice(waiting, BATCH)):
                writer.write_table(pa.Table.from_pylist(rows, _schema()), row_group_size=BATCH)
        return file

    def _of(self, file: Path) -> Iterator[Record | BadRecord]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(file, buffer_size=2**20)
            names = table.schema_arrow.names
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"'{file}' is not a parquet file, or not a whole one ({_first_line(error)}); copy or download it again"
            ) from None
        columns = Columns(self.settings, names, str(file))
        folder = ImageFolder(self.settings.image_folder or file.parent)
        with table:
            yield from columns.records(_batches(table, columns.wanted, file), folder)


class HfDataset(DataSource[HfDatasetSettings]):
    """Data sets of the library `datasets`, from a folder or the Hugging Face hub"""

    name = "hf-dataset"
    requires = Requires(packages=("datasets>=4",))
    Settings = HfDatasetSettings

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """By the file that `save_to_disk` writes into a folder."""
        return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()

    def validate(self, plan: object) -> Iterable[str]:
        if self.settings.dataset and self.settings.path:
            yield "both 'path' and 'dataset' are set; leave out one of them"
        elif not self.settings.dataset:
            yield from missing_files(self.settings, "path")

    def records(self) -> Iterator[Record | BadRecord]:
        """The rows of the split in order; DataError when the data set cannot be loaded."""
        _require(self)
        for clause in self.validate(None):
            raise DataError(f"{clause}; set 'path' to a folder, or 'dataset' to a hub id")
        title = f"{self.settings.path or self.settings.dataset}[{self.settings.split}]"
        loaded = self._loaded()
        columns = Columns(self.settings, loaded.column_names, title)
        folder = ImageFolder(self.settings.image_folder or self.settings.path)
        # As Arrow, images stay the bytes and paths that are stored.
        tables = loaded.select_columns(columns.wanted).with_format("arrow").iter(BATCH)
        places = (
            (start * BATCH, batch)
            for start, table in enumerate(tables)
            for batch in table.combine_chunks().to_batches()
        )
        return first_records(columns.records(_placed(places, title), folder), self.settings.limit)

    def files(self) -> Sequence[Path] | None:
        """All files of the folder; unknown for the hub, where a branch may move on."""
        path = self.settings.path
        return sorted(each for each in path.rglob("*") if each.is_file()) if path else None

    @classmethod
    def write(cls, records: Iterable[Record], folder: Path) -> Path:
        """The folder of `Dataset.save_to_disk`, with the images in it."""
        _require(cls)
        from datasets import Dataset, Features
        from datasets.arrow_writer import ArrowWriter
        from datasets.table import MemoryMappedTable

        folder.mkdir(parents=True, exist_ok=True)
        aside, written = folder / "rows.arrow", folder / "records"
        with ArrowWriter(
            path=str(aside), features=Features.from_arrow_schema(_schema()), writer_batch_size=BATCH
        ) as writer:
            for row in map(_row, records):
                writer.write(row)
            writer.finalize()
        # A fingerprint that is given does not depend on where and when it was written.
        rows = Dataset(MemoryMappedTable.from_file(str(aside)), fingerprint=OWN)
        with _without_progress():
            rows.save_to_disk(str(written), num_shards=None if len(rows) else 1)
        aside.unlink()
        return written

    def _loaded(self) -> Any:
        import datasets

        settings = self.settings
        given = str(settings.path or settings.dataset)
        saved = settings.path and any((settings.path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        try:
            if not saved:
                return datasets.load_dataset(given, settings.name, split=settings.split, revision=settings.revision)
            loaded = datasets.load_from_disk(given)
        except Exception as error:  # Its builders and the hub's client raise errors of any type.
            raise DataError(f"the data set '{given}' cannot be loaded ({_first_line(error)})") from error
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if settings.split not in loaded:
            raise DataError(f"'{given}' has no split '{settings.split}'; it has {', '.join(loaded)}")
        return loaded[settings.split]


@hookimpl
def data_sources() -> list[type[DataSource[Any]]]:
    return [Parquet, HfDataset]


class Columns:
    """Which columns of a table hold what; DataError where none hold a conversation."""

    def __init__(self, settings: ColumnSettings, names: Sequence[str], title: str) -> None:
        self.settings = settings
        self.found: dict[str, str] = {}
        """What a column is read as, by its name."""
        for role, usual in LAYOUT.items():
            if named := getattr(settings, role):
                if named not in names:
                    raise DataError(
                        f"'{title}' has no column '{named}', which '{role}' names; it has {', '.join(names)}"
                    )
                self.found[named] = role
            else:
                self.found |= {name: name for name in usual if name in names and name not in self.found}
        roles = set(self.found.values())
        if not roles & {*LAYOUT["messages"]} and not ("question" in roles and roles & {*LAYOUT["answer"]}):
            raise DataError(
                f"'{title}' has neither a column of messages nor one of questions and one of answers, but {', '.join(names)}; "
                "name them in 'messages', or in 'question' and 'answer'"
            )
        self.found |= {name: name for name in BESIDE if name in names and name not in self.found}
        self.wanted = list(self.found)

    def records(
        self, rows: Iterable[tuple[str, Mapping[str, Any] | BadRecord]], folder: ImageFolder
    ) -> Iterator[Record | BadRecord]:
        """The records of rows with their places."""

        def make(where: str, row: Mapping[str, Any]) -> Record:
            content = {self.found[name]: value for name, value in row.items() if value is not None}
            if isinstance(content.get("answer"), list):
                content["answers"] = content.pop("answer")
            return read_example(content, folder, where=where, group=self.settings.group)

        return make_records(rows, make)


def _require(component: type[DataSource[Any]] | DataSource[Any]) -> None:
    if missing := missing_packages(component.requires):
        raise DataError(f"'{component.name}' {missing}")


def _batches(table: Any, wanted: list[str], file: Path) -> Iterator[tuple[str, Mapping[str, Any] | BadRecord]]:
    """The rows of a parquet file, and a BadRecord for what is damaged of a group of them."""
    import pyarrow as pa

    start = 0
    for number in range(table.num_row_groups):
        size = table.metadata.row_group(number).num_rows
        done = start
        try:
            for batch in table.iter_batches(BATCH, row_groups=[number], columns=wanted):
                yield from _placed([(done, batch)], str(file))
                done += batch.num_rows
        except (pa.ArrowException, OSError, ValueError) as error:
            where = f"{file}:{done + 1}"
            yield (
                where,
                BadRecord(where, f"the rows {done + 1} to {start + size} cannot be read ({_first_line(error)})"),
            )
        start += size


def _placed(
    batches: Iterable[tuple[int, pa.RecordBatch]], title: str
) -> Iterator[tuple[str, Mapping[str, Any] | BadRecord]]:
    """The rows of batches that begin behind so many others, as objects, each with its place, as `file:row`."""
    for start, batch in batches:
        for number in range(batch.num_rows):
            where = f"{title}:{start + number + 1}"
            try:
                yield where, batch.slice(number, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:  # Such as a text that is not UTF-8.
                yield where, BadRecord(where, f"the row cannot be read ({_first_line(error)})")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# Writing --------------------------------------------------------------------------------------------------------------


def _schema() -> pa.Schema:
    """The columns that are written; `datasets` is told which of them are images."""
    import pyarrow as pa

    text = pa.string()
    message = pa.struct([("role", text), ("content", text)])
    image = pa.struct([("bytes", pa.binary()), ("path", text)])
    value = {"dtype": "string", "_type": "Value"}
    features = {
        "id": value,
        "messages": {"feature": {"role": value, "content": value}, "_type": "List"},
        "images": {"feature": {"_type": "Image"}, "_type": "List"},
        OWN: value,
    }
    columns = [("id", text), ("messages", pa.list_(message)), ("images", pa.list_(image)), (OWN, text)]
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})


@contextmanager
def _without_progress() -> Iterator[None]:
    """Whoever writes says how far it is."""
    import datasets

    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _row(record: Record) -> dict[str, Any]:
    images = []
    for place, image in enumerate(record.images):
        data = encoded_bytes(image)
        images.append({"bytes": data, "path": f"{place}.{extension_of(data)}"})
    content = to_messages(record, images)
    messages = [{"role": turn.role, "content": turn.text} for turn in record.turns]
    own = json.dumps(content[OWN], ensure_ascii=False) if OWN in content else None
    return {"id": record.id, "messages": messages, "images": images, OWN: own}
