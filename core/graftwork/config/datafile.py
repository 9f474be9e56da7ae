"""Data files: the `[data]` table of a run without its model, a run file, or data of a known format, resolved to components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from graftwork.config import runfile, settings
from graftwork.config.choosing import Chooser, Resolved
from graftwork.config.restore import restore_component
from graftwork.config.runfile import RunFile, Selection, TableReader
from graftwork.config.tables import CardTable, DataTable, EvaluateTable, RunTable, VerifyTable
from graftwork.config.wording import count
from graftwork.config.writers import WriterPlan, read_writer
from graftwork.contracts.data import DataMaker, DataOperator, DataSource, DataVerifier
from graftwork.contracts.kinds import Evaluator
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Choice, Plan, RunContext
from graftwork.errors import DataError, PlanRefused, RunFileError

TABLES = ("data", "evaluate")


@dataclass(frozen=True)
class DataPlan:
    """Sources and operators as a file asks for them."""

    run_context: RunContext
    """The seed, the choices and their settings, all else as by default; what `validate` of sources and operators may read."""
    sources: tuple[DataSource[Any], ...]
    operators: tuple[DataOperator[Any], ...]
    """Those of the file in their order, and after them the one that verifies."""
    out: Path
    """The folder to write to where no other is given."""
    folder: Path
    """Where relative paths start, absolute."""
    given: Path | None = None
    """The file, or the data itself, that it was read from."""
    table: Mapping[str, Any] = field(default_factory=dict)
    """As the file says it."""
    evaluate: tuple[Selection, ...] = ()
    """The evaluators that the file names, with settings that are not checked yet."""
    run: RunFile | None = None
    """The whole run, where the file names a model."""
    writer: WriterPlan | None = None
    """Who writes for makers."""
    verifying: WriterPlan | None = None
    """Who answers the verifier: the writer itself, where no other is named."""

    @property
    def seed(self) -> int:
        """What all that is random is drawn by."""
        return self.run_context.seed

    @property
    def strict(self) -> bool:
        """Whether the first record that cannot be read is an error."""
        return self.run_context.strict_data


def resolve_data(
    given: Path | str | Mapping[str, Any],
    lookup: Lookup,
    *,
    folder: Path | None = None,
    missing_files: list[str] | None = None,
    synthesis: bool = False,
) -> DataPlan:
    """The sources and operators of a data file, a run file, its tables, or of data that a source recognises.

    Relative paths start at the file's folder, those of tables at `folder`. No model is resolved: where the file names one, `run`
    holds it. With `synthesis` it may make records, or verify those that there are. Raises RunFileError for a file that cannot be read or
    has mistakes, PlanRefused whose details hold every reason against its components, DataError for data that no source, or several,
    recognise.
    """
    if isinstance(given, Mapping):
        return _resolve(given, (folder or Path()).absolute(), None, lookup, missing_files, synthesis)
    path = Path(given)
    if path.suffix.lower() == ".toml" and not path.is_dir():
        return _resolve(runfile.read_toml(path), path.parent.absolute(), path, lookup, missing_files, synthesis)
    use = _source_of(path, lookup)
    table = {"data": {"source": [{"use": use, "path": str(path.absolute())}]}}
    return _resolve(table, path.parent.absolute(), path, lookup, missing_files, synthesis)


def resolve_evaluators(against: Sequence[str], plan: DataPlan, lookup: Lookup) -> dict[str, Evaluator[Any]]:
    """Evaluators by name: those of `against`, or else those that the plan's file names.

    Each of `against` is the name of one, with the settings of the plan's file where that has some, or a run file whose `[evaluate]`
    names some. Raises RunFileError, and PlanRefused whose details hold every reason why one cannot be asked.
    """
    known = {selection.use: selection for selection in plan.evaluate}
    asked: list[tuple[Path, Selection]] = []
    for given in against:
        if given.endswith(".toml"):
            path = Path(given)
            reader = TableReader(path.parent.absolute())
            found = _evaluators(reader, runfile.read_toml(path))
            if not reader.problems and not found:
                reader.problems.append("evaluate: names no evaluator")
            if reader.problems:
                raise RunFileError(f"'{path}' has {count(reader.problems, 'mistake')}", reader.problems)
            asked += [(reader.folder, selection) for selection in found]
        else:
            asked.append((plan.folder, known.get(given, Selection(given, where=given))))
    evaluators: dict[str, Evaluator[Any]] = {}
    reasons: list[str] = []
    for folder, selection in asked or [(plan.folder, each) for each in plan.evaluate]:
        chooser = Chooser(folder, lookup)
        if chosen := chooser.choose("evaluator", selection):
            chooser.validate(chosen, cast(Plan, plan))
            evaluators[selection.use] = cast("Evaluator[Any]", chosen.component)
        reasons += chooser.reasons
    if reasons:
        raise PlanRefused(f"the data cannot be compared with test sets, for {count(reasons, 'reason')}", reasons)
    return evaluators


def _evaluators(reader: TableReader, tables: Mapping[str, Any]) -> tuple[Selection, ...]:
    """The evaluators of the `[evaluate]` among tables."""
    asked, evaluators = reader.split(EvaluateTable, reader.table(tables, "evaluate"), "evaluate")
    return reader.named_list("on", asked.on if asked else [*evaluators], evaluators, "evaluate")


def _source_of(path: Path, lookup: Lookup) -> str:
    """The source that reads a file or folder with no other setting than `path`."""
    if not path.exists():
        raise DataError(f"there is no file or folder '{path}'; correct the path")
    names = lookup.names("data_source", ready_only=True)
    found = [
        n for n in names if cast("type[DataSource[Any]]", lookup.find("data_source", n).component).recognises(path)
    ]
    if len(found) == 1:
        return found[0]
    how = "write a data file that names its source, as [[data.source]] of a run file does"
    if not found:
        raise DataError(f"no data source says that '{path}' is its own; {how}; installed: {', '.join(names)}")
    raise DataError(f"'{path}' may be read by {' or '.join(map(repr, found))}; {how}")


def _resolve(
    table: Mapping[str, Any],
    folder: Path,
    given: Path | None,
    lookup: Lookup,
    missing_files: list[str] | None,
    synthesis: bool,
) -> DataPlan:
    name = f"'{given}'" if given else "the data"
    reader = TableReader(folder)
    fields, tables = reader.split(RunTable, table, "")
    has_model = "model" in tables
    known = [*TABLES, *runfile.BESIDE, *(runfile.TABLES if has_model else ())]
    reader.unknown(tables, [*settings.names(RunTable), *known], "")
    data, items = reader.split(DataTable, reader.table(tables, "data"), "data")
    reader.unknown(items, [*settings.names(DataTable), "source", "operator"], "data")
    (sources, mix), operators = reader.sources(items), reader.operators(items)
    evaluate = _evaluators(reader, tables)
    if not reader.problems and not sources:
        reader.problems.append("data.source: is missing, wanted tables that begin with [[data.source]]")
    reader.read(CardTable, reader.table(tables, "card"), "card")
    asked = _Synthesis.read(reader, tables, fields.seed if fields else 0) if synthesis else _Synthesis()
    if reader.problems:
        raise RunFileError(f"{name} has {count(reader.problems, 'mistake')}", reader.problems)
    chooser = Chooser(folder, lookup, missing_files=missing_files)
    chosen = [each.choice for each in chooser.choose_all("data_source", sources)]
    applied = [*chooser.operators(operators, makers=synthesis), *asked.choose(chooser)]
    if synthesis:
        chooser.reasons += asked.lacking(applied)
    elif "verify" in tables:
        chooser.reasons.append(
            "verify: asks a writer, which graftwork data synthesize alone does; use that, or remove it"
        )
    choices = [each.choice for each in applied]
    run_context = RunContext(
        seed=fields.seed, sources=chosen, operators=choices, strict_data=data.strict, mix=runfile.mixed(mix)
    )
    plan = DataPlan(
        run_context,
        sources=cast("tuple[DataSource[Any], ...]", _restored(chosen, lookup)),
        operators=cast("tuple[DataOperator[Any], ...]", _restored(choices, lookup)),
        out=fields.out or folder / f"{given.stem if given else 'data'}-out",
        folder=folder,
        given=given,
        table=table,
        evaluate=evaluate,
        run=runfile.parse_run(_of_a_run(table), folder, given) if has_model else None,
        writer=asked.writer,
        verifying=asked.verifying or asked.writer,
    )
    for each in chooser.resolved:  # Sources and operators read the run context alone, which both kinds of plan have.
        chooser.validate(each, cast(Plan, plan))
    if chooser.reasons:
        reasons = list(dict.fromkeys(chooser.reasons))
        raise PlanRefused(f"{name} cannot work, for {count(reasons, 'reason')}", reasons)
    return plan


def _of_a_run(table: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in table.items() if name not in runfile.BESIDE}


@dataclass(frozen=True)
class _Synthesis:
    """The tables of a file that say who writes and how it is verified."""

    writer: WriterPlan | None = None
    verify: Selection | None = None
    verifying: WriterPlan | None = None

    @classmethod
    def read(cls, reader: TableReader, tables: Mapping[str, Any], seed: int) -> _Synthesis:
        """Those that are there; their mistakes are added to the reader's problems."""
        table = reader.table(tables, "verify")
        rest = {name: value for name, value in table.items() if name != "writer"}
        return cls(
            read_writer(reader, reader.table(tables, "writer"), "writer", seed) if "writer" in tables else None,
            reader.selection(VerifyTable, rest, "verify") if "verify" in tables else None,
            read_writer(reader, reader.table(table, "writer", "verify"), "verify.writer", seed)
            if "writer" in table
            else None,
        )

    def choose(self, chooser: Chooser) -> list[Resolved]:
        """The operator that verifies, if it can be resolved."""
        chosen = chooser.choose("data_operator", self.verify) if self.verify else None
        if chosen and not isinstance(chosen.component, DataVerifier):
            chooser.reasons.append(f"verify.use: '{chosen.choice.name}' is no operator that verifies; name one that is")
        return [chosen] if chosen else []

    def lacking(self, applied: Sequence[Resolved]) -> list[str]:
        """What is missing for these operators, and the verifier among them."""
        makers = [each for each in applied if isinstance(each.component, DataMaker)]
        reasons = []
        if makers and not self.writer:
            reasons.append(f"writer: is missing, and '{makers[0].choice.name}' asks one; add the table [writer]")
        if makers and not self.verify:
            reasons.append(
                f"verify: is missing, and nothing that '{makers[0].choice.name}' makes enters a data set unverified; add the table [verify]"
            )
        if self.verify and not (self.verifying or self.writer):
            reasons.append("verify.writer: is missing, and verifying asks one; add [verify.writer], or [writer]")
        verifier = applied[-1].component if applied else None
        if not makers and not self.verify:
            reasons.append("data.operator: nothing makes or verifies records; use graftwork data process")
        elif not makers and isinstance(verifier, DataVerifier) and _leaves_given(verifier):
            found = f"verify: '{verifier.name}' is to verify what makers make, and there is none"
            reasons.append(f"{found}; add one, or set verify.{verifier.given} = true to verify what is given")
        return reasons


def _leaves_given(verifier: DataVerifier[Any]) -> bool:
    """Whether it asks about nothing but what makers made."""
    return verifier.given is not None and not getattr(verifier.settings, verifier.given)


def _restored(choices: list[Choice], lookup: Lookup) -> tuple[Any, ...]:
    return tuple(restore_component(choice, lookup) for choice in choices)
