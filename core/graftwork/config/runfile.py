"""Run files: TOML and overrides, read into plain data with every mistake at once."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.config import settings
from graftwork.config.sizes import parse_size
from graftwork.config.tables import (
    AttentionTable,
    DataTable,
    EvaluateTable,
    MemoryTable,
    ModelTable,
    OperatorTable,
    PartTable,
    PeftTable,
    RunTable,
    SourceTable,
)
from graftwork.config.wording import count, join, suggestion, toml_text
from graftwork.contracts.plan import Mix, TrainSettings
from graftwork.errors import RunFileError

MAX_BYTES = 1 << 20  # a run file is written by a person; a larger file is something else


@dataclass(frozen=True)
class Selection:
    """A component that a run asks for by name, with settings that are not checked yet."""

    use: str
    settings: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    config: str | None = None
    where: str = ""
    """The dotted path of its table."""
    coordinates: str = ""
    """Of a data source: what the numbers of its boxes and points count."""


@dataclass(frozen=True)
class RunFile:
    """The content of a run file."""

    source: Path | None
    folder: Path
    """Where relative paths start: the folder of the run file, absolute."""
    out: Path
    seed: int
    model: Selection
    parts: dict[str, Selection] = field(default_factory=dict)
    """Part to its tower; `use` is empty where the model's default is meant, and `none` where there shall be none."""
    peft: Selection | None = None
    on: tuple[str, ...] = ()
    also_train: tuple[str, ...] = ()
    init_from: str | None = None
    """As the run file writes it."""
    attention: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Site to kernels in order of preference; `*` for sites that are not named. Empty when the run sets none."""
    memory: tuple[Selection, ...] = ()
    """Every strategy that the run names, in `use` or in `try`."""
    candidates: tuple[tuple[str, ...], ...] = ()
    """The names of `try`; empty when the run sets none."""
    budget: int | None = None
    """In bytes."""
    sources: tuple[Selection, ...] = ()
    operators: tuple[Selection, ...] = ()
    mix: tuple[Mix, ...] = ()
    """How the sources are mixed, one for each."""
    data: DataTable = field(default_factory=DataTable)
    train: TrainSettings = field(default_factory=TrainSettings)
    train_given: frozenset[str] = frozenset()
    """The keys of `[train]` that the run sets itself."""
    evaluate: tuple[Selection, ...] = ()


EMPTY = "none"
"""The `use` of a part that shall stay empty."""
TABLES = ("model", "peft", "attention", "memory", "data", "train", "evaluate")
BESIDE = ("writer", "verify", "card")
"""Tables that stand in data files, beside those that run files have too."""
RESERVED_KEYS: Mapping[str, tuple[str, ...]] = {
    "model": ("use", "weights", "config", "parts"),
    "vision_tower": ("use", "weights", "config"),
    "peft": ("use", "on", "also_train", "init_from"),
    "data_source": ("use", "weight", "repeat", "license", "coordinates"),
    "data_operator": ("use",),
}
"""Kind to the keys beside a component's settings, which no setting of that kind may be called."""


def load(path: Path | str, overrides: Mapping[str, Any] | Iterable[str] = ()) -> RunFile:
    """Read a run file, changed by `overrides`: texts such as `train.learning_rate=1e-3`, or a mapping of such keys.

    The value of a text is TOML, or else text. Raises RunFileError: one sentence for a file that cannot be read or
    is no TOML, otherwise every mistake with its path.
    """
    source = Path(path)
    table = read_toml(source)
    changes = overrides.items() if isinstance(overrides, Mapping) else map(_split, overrides)
    problems = [problem for key, value in changes if (problem := _override(table, key, value))]
    if problems:
        raise RunFileError(f"'{source}' cannot be changed as asked", problems)
    return parse_run(table, source.parent.absolute(), source)


def read_toml(source: Path) -> dict[str, Any]:
    """The tables of a file; RunFileError where it cannot be read or is no TOML."""
    try:
        if source.exists() and not source.is_file():
            raise RunFileError(f"'{source}' is not a file; name a run file, which is TOML")
        with source.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RunFileError(f"there is no run file '{source}'; correct the path") from None
    except (OSError, ValueError) as error:
        message = error.strerror if isinstance(error, OSError) else error
        raise RunFileError(f"'{source}' cannot be read ({message}); correct the path or its permissions") from None
    if len(content) > MAX_BYTES:
        raise RunFileError(f"'{source}' is larger than {MAX_BYTES >> 20} MiB, so it is no run file; correct the path")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RunFileError(f"'{source}' is not text in UTF-8 (byte {error.start}); a run file is TOML") from None
    except ValueError as error:
        raise RunFileError(f"'{source}' is not TOML: {error}") from None
    except RecursionError:
        raise RunFileError(f"'{source}' is nested too deeply to be a run file") from None


MISSING = object()
"""Stands for the value of an override that has none."""


def _split(override: str) -> tuple[str, Any]:
    """The key and the value of `KEY=VALUE`."""
    key, equals, text = override.partition("=")
    return key, override_value(text) if equals else MISSING


def _override(table: dict[str, Any], key: str, value: Any) -> str | None:
    """Put one value into a table under its dotted key; the mistake, if it is one."""
    override = key if value is MISSING else f"{key}={value}"
    try:
        path = _keys(tomllib.loads(f"{key} = 0"))
    except (ValueError, RecursionError):
        path = []
    if value is MISSING or not path:
        return f"{override}: an override is KEY=VALUE, such as train.learning_rate=1e-3"
    here: Any = table
    for index, name in enumerate(path):
        at: Any = name
        if isinstance(here, list) and name.isdecimal() and int(name) < len(here):
            at = int(name)
        elif not isinstance(here, dict):
            return f"{override}: there is no table '{'.'.join(path[:index])}' that could hold '{name}'"
        if index == len(path) - 1:
            here[at] = value
        else:
            here = here[at] if isinstance(here, list) else here.setdefault(at, {})
    return None


def _keys(table: Any) -> list[str]:
    """The path to the only leaf of nested tables; empty when there are more."""
    path: list[str] = []
    while isinstance(table, dict) and len(table) == 1:
        ((key, table),) = table.items()
        path.append(key)
    return [] if isinstance(table, dict) else path


def override_value(text: str) -> Any:
    """The value of an override: TOML, or else text."""
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return table["value"] if len(table) == 1 else text


def parse_run(table: Mapping[str, Any], folder: Path, source: Path | None = None) -> RunFile:
    """The run that a table of TOML values describes; relative paths start at `folder`, which is absolute.

    Settings of components are kept as they are: only `resolve` knows the classes that check them. Raises
    RunFileError whose details hold every mistake with its path.
    """
    reader = TableReader(folder)
    run, tables = reader.split(RunTable, table, "")
    reader.unknown(tables, [*settings.names(RunTable), *TABLES], "")
    model_table = reader.table(tables, "model")
    part_tables = reader.table(model_table, "parts", "model")
    parts = {name: reader.part(part_tables, name) for name in part_tables}
    model = reader.selection(ModelTable, {k: v for k, v in model_table.items() if k != "parts"}, "model")
    peft_table, peft_settings = reader.split(PeftTable, reader.table(tables, "peft"), "peft")
    if (
        "peft" in tables
        and peft_table
        and peft_table.use is None
        and (peft_settings or peft_table.on or not peft_table.also_train)
    ):
        reader.problems.append("peft.use: is missing, wanted the name of a PEFT method")
    attention = reader.attention(tables)
    data, items = reader.split(DataTable, reader.table(tables, "data"), "data")
    reader.unknown(items, [*settings.names(DataTable), "source", "operator"], "data")
    (sources, mix), operators = reader.sources(items), reader.operators(items)
    memory_table, strategies = reader.split(MemoryTable, reader.table(tables, "memory"), "memory")
    candidates = memory_table.try_ if memory_table else ()
    if candidates:
        memory = reader.named_list(
            "try", list(dict.fromkeys(name for candidate in candidates for name in candidate)), strategies, "memory"
        )
    else:
        memory = reader.named_list("use", memory_table.use if memory_table else [*strategies], strategies, "memory")
    evaluate_table, evaluators = reader.split(EvaluateTable, reader.table(tables, "evaluate"), "evaluate")
    evaluate = reader.named_list("on", evaluate_table.on if evaluate_table else [*evaluators], evaluators, "evaluate")
    train = reader.read(TrainSettings, reader.table(tables, "train"), "train")
    if reader.problems:
        name = f"'{source}'" if source else "the run"
        raise RunFileError(f"{name} has {count(reader.problems, 'mistake')}", reader.problems)
    return RunFile(
        source=source,
        folder=folder,
        out=run.out or folder / f"{source.stem if source else 'run'}-out",
        seed=run.seed,
        model=model,
        parts=parts,
        peft=Selection(peft_table.use, peft_settings, where="peft") if peft_table.use is not None else None,
        on=peft_table.on,
        also_train=peft_table.also_train,
        init_from=peft_table.init_from,
        attention=attention,
        memory=memory,
        candidates=candidates,
        budget=parse_size(memory_table.budget) if memory_table.budget is not None else None,
        sources=sources,
        operators=operators,
        mix=mix,
        data=data,
        train=train,
        train_given=frozenset(reader.table(tables, "train")),
        evaluate=evaluate,
    )


def mixed(mix: Sequence[Mix]) -> list[Mix]:
    """How sources are mixed as a plan records it: empty where an epoch takes every record once."""
    return [*mix] if set(mix) - {Mix()} else []


class TableReader:
    """Splits tables into fields. A table with a mistake gives None, or empty, and adds to `problems`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []

    def read(self, cls: type, table: Mapping[str, Any], where: str) -> Any:
        """A table that holds nothing but the fields of `cls`."""
        return settings.read(cls, table, where=where, folder=self.folder, problems=self.problems)

    def split(self, cls: type, table: Mapping[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
        """The fields of `cls` in a table, and the rest of the table."""
        names = settings.names(cls)
        fields = self.read(cls, {key: value for key, value in table.items() if key in names}, where)
        return fields, {key: value for key, value in table.items() if key not in names}

    def selection(self, cls: type, table: Mapping[str, Any], where: str) -> Any:
        """The component that a table selects."""
        fields, rest = self.split(cls, table, where)
        weights, config = getattr(fields, "weights", None), getattr(fields, "config", None)
        coordinates = getattr(fields, "coordinates", None) or ""
        return Selection(fields.use, rest, weights, config, where, coordinates) if fields else None

    def unknown(self, rest: Mapping[str, Any], known: Sequence[str], where: str) -> None:
        """Refuse the keys of `rest` that are not known."""
        for key in rest:
            if not where and key in BESIDE and key not in known:
                self.problems.append(
                    f"{key}: belongs into a data file, of which graftwork data makes a data set to train on; move it there"
                )
            elif key not in known:
                self.problems.append(f"{join(where, key)}: there is no such table or key{suggestion(key, known)}")

    def table(self, parent: Mapping[str, Any], key: str, where: str = "") -> dict[str, Any]:
        """The table under a key; empty when there is none."""
        value = parent.get(key, {})
        if isinstance(value, dict):
            return value
        self.problems.append(f"{join(where, key)}: found {toml_text(value)}, wanted table")
        return {}

    def part(self, parent: Mapping[str, Any], name: str) -> Any:
        """The tower of `[model.parts.NAME]`."""
        where = join("model.parts", name)
        table = self.table(parent, name, "model.parts")
        if table.get("use") == EMPTY and len(table) > 1:
            self.problems.append(f"{where}: a part that is '{EMPTY}' has no other keys; remove them, or name a tower")
        return self.selection(PartTable, table, where)

    def sources(self, data: Mapping[str, Any]) -> tuple[tuple[Any, ...], tuple[Mix, ...]]:
        """The sources of `[[data.source]]`, in order, and how they are mixed."""
        tables = self.tables(data, "source")
        items = [self.selection(SourceTable, table, f"data.source.{index}") for index, table in enumerate(tables)]
        names = [each.name for each in dataclasses.fields(Mix)]
        mix = tuple(Mix(**{name: table[name] for name in names if name in table}) for table in tables)
        weights = [each.weight for each in mix if isinstance(each.weight, int | float)]
        if len(weights) < len(mix) and sum(weights) >= 1:
            self.problems.append(
                f"data.source: the weights add up to {sum(weights):g}, which leaves nothing for the sources without one; "
                "make them smaller, or give every source a weight"
            )
        return tuple(items), mix

    def operators(self, data: Mapping[str, Any]) -> tuple[Any, ...]:
        """The operators of `[[data.operator]]`, in order."""
        tables = enumerate(self.tables(data, "operator"))
        return tuple(self.selection(OperatorTable, table, f"data.operator.{index}") for index, table in tables)

    def tables(self, data: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
        """The tables of `[[data.KEY]]`."""
        tables = data.get(key, [])
        if isinstance(tables, list) and all(isinstance(table, dict) for table in tables):
            return tables
        self.problems.append(f"data.{key}: found {toml_text(tables)}, wanted tables that begin with [[data.{key}]]")
        return []

    def named_list(
        self, key: str, chosen: Sequence[str], tables: Mapping[str, Any], where: str
    ) -> tuple[Selection, ...]:
        """The components that the list `key` names, each with the settings of the table of its name."""
        for name in tables:
            if name not in chosen:
                self.problems.append(f"{where}.{name}: '{where}.{key}' does not name it{suggestion(name, chosen)}")
        for name in sorted({name for name in chosen if chosen.count(name) > 1}):
            self.problems.append(f"{where}.{key}: names '{name}' more than once; name it once")
        return tuple(Selection(name, self.table(tables, name, where), where=join(where, name)) for name in chosen)

    def attention(self, parent: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        """Site to kernels, `*` for those of `prefer`."""
        fields = self.read(AttentionTable, self.table(parent, "attention"), "attention")
        if fields is None:
            return {}
        for site, kernels in fields.sites.items():
            if site == "*" or not kernels:
                mistake = "sites that are not named have 'attention.prefer'" if site == "*" else "names no kernel"
                self.problems.append(f"attention.sites.{site}: {mistake}")
        return {**fields.sites, "*": fields.prefer} if fields.prefer else fields.sites
