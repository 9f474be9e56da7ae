"""`graftwork data value`: the same run on its own data and on other data, with several seeds, and what the data changed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, cast

import graftwork
from graftwork import processes
from graftwork.build import compose
from graftwork.checkpoint import manifest, store
from graftwork.checkpoint.locking import LOCK, WRITER, one_writer
from graftwork.checkpoint.writing import replace_text
from graftwork.config.datafile import resolve_data
from graftwork.config.restore import restore_component
from graftwork.config.wording import count
from graftwork.contracts.kinds import Evaluator
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Plan
from graftwork.contracts.records import Record
from graftwork.contracts.score import Prediction
from graftwork.data import cache
from graftwork.data.digest import image_hash, question_digest
from graftwork.data.sampling import steps_for
from graftwork.data.training_data import load_training_data
from graftwork.errors import DataError, GraftworkError, PlanRefused, UnhealthyRun
from graftwork.evaluate.answers import ANSWERS, predictions, read_lines
from graftwork.evaluate.questions import read_questions
from graftwork.evaluate.seeds import DataComparison, compare_data
from graftwork.evaluate.statistics import MIN_SEEDS
from graftwork.jobs.messages import Listener, Message, ignore
from graftwork.jobs.outcome import title_of
from graftwork.jobs.run import Run, installed
from graftwork.jobs.train import carry_out, evaluation_folder
from graftwork.report.value import ValueReport, render_fragment, render_markdown, write_value_report
from graftwork.report.value_wording import DataRuns
from graftwork.report.wording import choice_text
from graftwork.train.resuming import comparable

OUT = Path("data-value")
"""Where everything goes where no other folder is given."""
OWN = "own"
"""What the run's own data is called."""
BEGUN, ENDED = "begun.json", "ended.json"
"""The file that says what data there is, and the one in the folder of each run that says how it ended."""
DataGiven = str | PathLike[str] | Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class DataValue:
    """What data is worth."""

    report: ValueReport
    folder: Path
    """Where the report is, and the folder of each data with those of its runs, `seed-N`."""

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {**self.report.to_json(), "out": str(self.folder)}

    def __str__(self) -> str:
        return render_markdown(self.report)

    def _repr_html_(self) -> str:
        return render_fragment(self.report)


def value_data(
    run: Run | Mapping[str, Any] | str | PathLike[str],
    data: Sequence[DataGiven],
    out: str | PathLike[str] = OUT,
    *,
    seeds: int = MIN_SEEDS,
    resume: bool = False,
    device: str | None = None,
    on_event: Listener = ignore,
    lookup: Lookup | None = None,
) -> DataValue:
    """Carry out a run on its own data and on each other data, with several seeds, and compare what came of it.

    `run` is what `train` takes, and names an evaluator; each of `data` is what `process_data` takes: its sources and operators
    replace those of the run, and all else stays. The seeds are the run's own and those that follow. Checkpoints, answers and the
    report go into `out`; with `resume` what is finished there is not done again. A run whose result should not be used is left out,
    and said. Raises RunFileError, PlanRefused and DataError before anything is trained, with every mistake; RunInterrupted as `train` does.
    """
    lookup, out, mistakes = lookup or installed(), Path(out), _Mistakes()
    plans, given = _resolve(run, data, seeds, lookup, mistakes)
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        mistakes.add(f"'{out}' is there already; go on with --resume, or name another folder")
    if processes.count() > 1:
        mistakes.add("runs are carried out one after the other, by one process; leave the launcher out")
    mistakes.refuse()
    known = _look_ahead(plans, lookup, mistakes, on_event)
    mistakes.refuse()
    with one_writer(out, say=lambda sentence: on_event(Message(sentence, "warning"))):
        _begin(plans, known, out, resume=resume, listen=on_event)
        first = plans[OWN].run_context.seed
        runs = [DataRuns(name, given[name], known[name].records, known[name].steps) for name in plans]
        chosen = range(first, first + seeds)
        for number, (seed, each) in enumerate(itertools.product(chosen, runs), 1):
            on_event(Message(f"run {number} of {seeds * len(runs)}: '{each.name}' with seed {seed}", "success"))
            plan = replace(plans[each.name], run_context=replace(plans[each.name].run_context, seed=seed))
            if why := _carry_out(plan, lookup, _folder(out, each.name, seed), device, on_event):
                each.unhealthy[seed] = why
            else:
                each.healthy.append(seed)
        report = ValueReport(
            title=f"What data is worth: {title_of(plans[OWN])}",
            runs=runs,
            seeds=[*chosen],
            comparisons=[*_compare(plans[OWN], lookup, out, runs)],
            provenance=_provenance(plans, known),
        )
        write_value_report(out, report)
    return DataValue(report, out)


def _folder(out: Path, name: str, seed: int) -> Path:
    return out / name / f"seed-{seed}"


# Before anything is trained -------------------------------------------------------------------------------------------


@dataclass
class _Mistakes:
    """What is wrong with what was asked; all of it is told at once."""

    errors: list[GraftworkError] = field(default_factory=list)

    def add(self, sentence: str) -> None:
        self.errors.append(DataError(sentence))

    def attempt(self, work: Callable[[], T], what: str = "") -> T | None:
        """What `work` returns; None where it fails, on `what`, where its error does not say so."""
        try:
            return work()
        except GraftworkError as error:
            self.errors.append(DataError(f"'{what}': {error.sentence}", error.details) if what else error)
            return None

    def refuse(self) -> None:
        """Raise what was found: a single error as it is."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            lines = [
                line for error in self.errors for line in (error.sentence, *(f"  {each}" for each in error.details))
            ]
            raise PlanRefused(f"data cannot be compared, for {count(self.errors, 'reason')}", lines)


def _resolve(
    run: Run | Mapping[str, Any] | str | PathLike[str],
    data: Sequence[DataGiven],
    seeds: int,
    lookup: Lookup,
    mistakes: _Mistakes,
) -> tuple[dict[str, Plan], dict[str, str]]:
    """The plan on each data, the run's own first, and where each was read from."""
    if seeds < MIN_SEEDS:
        mistakes.add(
            f"{seeds} seed{'s' * (seeds != 1)} cannot show the noise between seeds, which intervals over questions alone miss; give at least "
            f"{MIN_SEEDS} with --seeds"
        )
    if not data:
        mistakes.add("there is no other data to compare with; name some by --with")
    own = mistakes.attempt(lambda: Run.of(run).plan(lookup))
    if own and not own.run_context.evaluate:
        known = ", ".join(lookup.names("evaluator"))
        mistakes.add(
            f"the run names no evaluator, so nothing could be compared; name one in evaluate.on; installed: {known}"
        )
    plans = {OWN: own} if own else {}
    given = {OWN: "the run itself"}
    for name, each in _named(data).items():
        path = each if isinstance(each, Mapping) else Path(each)
        found = mistakes.attempt(partial(resolve_data, path, lookup))
        given[name] = "tables" if isinstance(each, Mapping) else str(each)
        if own and found:
            read = found.run_context
            changed = replace(own.run_context, sources=read.sources, operators=read.operators, mix=read.mix)
            plans[name] = replace(own, run_context=changed)
    return plans, given


def _named(data: Sequence[DataGiven]) -> dict[str, DataGiven]:
    """Names for data: those of the files or folders, with their folder's where that is needed to tell them apart."""
    named: dict[str, DataGiven] = {}
    for each in data:
        path = Path("tables" if isinstance(each, Mapping) else each).resolve()
        short = path.name if path.is_dir() else path.stem
        numbered = (f"{short}-{number}" for number in itertools.count(2))
        taken = {OWN, *map(str.casefold, named)}
        names = itertools.chain((short, f"{path.parent.name}-{short}"), numbered)
        named[next(name for name in names if name.casefold() not in taken)] = each
    return named


@dataclass(frozen=True)
class _Known:
    """What is known of the runs on one data set before they begin."""

    records: int
    steps: int
    digest: str
    """The hash of its records."""


def _look_ahead(plans: Mapping[str, Plan], lookup: Lookup, mistakes: _Mistakes, listen: Listener) -> dict[str, _Known]:
    """Read and measure all data, which is kept for the runs."""
    processor = compose.build_shape(plans[OWN], lookup).processor

    def measured(plan: Plan) -> _Known:
        data, settings = load_training_data(plan, lookup, processor), plan.run_context.train
        drawn = data.sampler(plan.run_context).records
        steps = steps_for(drawn, settings.batch_size, settings.epochs, settings.steps)
        return _Known(data.counts.used, steps, data.digest())

    known = dict[str, _Known]()
    for name, plan in plans.items():
        if found := mistakes.attempt(partial(measured, plan), name):
            if same := next((other for other, each in known.items() if each.digest == found.digest), None):
                mistakes.add(
                    f"'{name}' holds the same records as '{same}', so there is nothing to compare; leave it out"
                )
            known[name] = found
            listen(Message(f"{name}: {found.records:,} records, {found.steps:,} steps a run"))
    return known


def _begin(
    plans: Mapping[str, Plan], known: Mapping[str, _Known], out: Path, *, resume: bool, listen: Listener
) -> None:
    """Write down what is done in a folder; DataError where that is something else. More data and more seeds may be added to it."""
    file, evaluators = out / BEGUN, [(each.name, each.settings) for each in plans[OWN].run_context.evaluate]
    model_spec = store.with_fingerprints(plans[OWN], out).model_spec
    keys = {}
    for name, plan in plans.items():
        # The digest decides on data, wherever it lies, as it does where a run is resumed.
        same = comparable(replace(plan, model_spec=model_spec), ("sources", "operators"))
        keys[name] = cache.key_of(same, evaluators, known[name].digest)
    begun = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if resume and not begun:
        if others := sorted({each.name for each in out.iterdir()} - {LOCK, WRITER}):
            raise DataError(f"'{out}' holds '{others[0]}', and no comparison of data; name another folder")
        listen(Message(f"there is nothing to resume in '{out}'; it starts anew", "warning"))
    if differing := [name for name, key in keys.items() if begun.get(name, key) != key]:
        names = " and ".join(map(repr, differing))
        raise DataError(
            f"what lies in '{out}' was begun with another run, or with other data as {names}; change that back, or name another folder"
        )
    _write(file, {**begun, **keys})


def _write(file: Path, content: Mapping[str, Any]) -> None:
    replace_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


# The runs, and what came of them --------------------------------------------------------------------------------------


def _carry_out(plan: Plan, lookup: Lookup, folder: Path, device: str | None, listen: Listener) -> str:
    """Carry out a run, or what is left of it; returns why its result should not be used, empty where it may be."""
    if not (folder / ENDED).exists():
        with one_writer(folder, say=lambda sentence: listen(Message(sentence, "warning"))):
            begun, why = bool(store.checkpoints(folder)), ""
            try:
                carry_out(plan, lookup, folder, begun, False, False, device, listen)
            except UnhealthyRun:
                why = manifest.read(store.newest(folder)).health.sentence()
            _write(folder / ENDED, {"unhealthy": why})
    return cast(str, json.loads((folder / ENDED).read_text(encoding="utf-8"))["unhealthy"])


def _compare(plan: Plan, lookup: Lookup, out: Path, runs: Sequence[DataRuns]) -> Iterator[DataComparison]:
    """What the healthy runs have answered, compared, for each evaluator; nothing without such runs."""
    if not any(each.healthy for each in runs):
        return
    digest = partial(question_digest, hash_of=image_hash())
    for choice in plan.run_context.evaluate:
        evaluator = cast("Evaluator[Any]", restore_component(choice, lookup))
        records, bad = read_questions(evaluator)
        asked = {record.id: record for record in records}

        def answers(
            name: str, seed: int, evaluator: Evaluator[Any] = evaluator, asked: Mapping[str, Record] = asked
        ) -> dict[str, Prediction]:
            lines = read_lines(evaluation_folder(_folder(out, name, seed), evaluator.name) / ANSWERS)
            return predictions(evaluator, asked, lines, digest)

        found = {each.name: {seed: answers(each.name, seed) for seed in each.healthy} for each in runs if each.healthy}
        compared = compare_data(evaluator, records, found, OWN)
        yield replace(compared, left_out=compared.left_out + len(bad))


def _provenance(plans: Mapping[str, Plan], known: Mapping[str, _Known]) -> dict[str, Any]:
    """What was trained on, as every plan records it, with the hash of its records."""
    read = {
        name: "; ".join(map(choice_text, (*plan.run_context.sources, *plan.run_context.operators)))
        for name, plan in plans.items()
    }
    hashes = {f"records of {name}": each.digest for name, each in known.items()}
    return {**read, **hashes, "graftwork": graftwork.__version__}
