"""`graftwork data check`: the facts about a data set, what is wrong with it, and the page that shows both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import graftwork
from graftwork.config.datafile import DataPlan, resolve_data, resolve_evaluators
from graftwork.config.resolve import resolve
from graftwork.contracts.lookup import Lookup
from graftwork.data import pipeline
from graftwork.data.facts import DataFacts, gather
from graftwork.data.findings import findings_of
from graftwork.data.pipeline import PipelineResult
from graftwork.data.store import RecordStore
from graftwork.errors import GraftworkError
from graftwork.jobs.messages import Checking, Listener, ignore
from graftwork.jobs.run import installed
from graftwork.report.data import DataReport, render_fragment, render_markdown, write_data_report
from graftwork.report.wording import choice_text

if TYPE_CHECKING:
    from graftwork.contracts.model import Processor

OUT = Path("data-check")
"""Where the page goes where no other folder is given."""


@dataclass(frozen=True)
class CheckedData:
    """A data set that was checked."""

    report: DataReport
    folder: Path
    """Where `report.html`, `report.md` and `report.json` are."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found that must not be."""
        return self.report.ok

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {**self.report.to_json(), "out": str(self.folder)}

    def __str__(self) -> str:
        return render_markdown(self.report)

    def _repr_html_(self) -> str:
        return render_fragment(self.report)


def check_data(
    data: str | PathLike[str] | Mapping[str, Any],
    *,
    against: Sequence[str] = (),
    out: str | PathLike[str] = OUT,
    on_event: Listener = ignore,
    lookup: Lookup | None = None,
) -> CheckedData:
    """Look at every record and image of a data set, and write a page on it into `out`.

    `data` is a run file, a data file, the tables of one, or a file or folder that a data source recognises. It is compared with the
    evaluators that `against` names, each by its name or by a run file that sets it, or else with those of the data's own file. A run
    file's model measures lengths in tokens, without its weights. Raises RunFileError, PlanRefused and DataError for what cannot be
    read at all.
    """
    lookup = lookup or installed()
    plan = resolve_data(data if isinstance(data, Mapping) else Path(data), lookup)
    evaluators = resolve_evaluators(against, plan, lookup)
    result = pipeline.read_records(plan.sources, plan.operators, seed=plan.seed, strict=False)
    report = report_on(result, plan, lookup, evaluators, on_event)
    write_data_report(Path(out), report)
    return CheckedData(report, Path(out))


def report_on(
    result: PipelineResult,
    plan: DataPlan,
    lookup: Lookup,
    evaluators: Mapping[str, Any],
    on_event: Listener = ignore,
    *,
    with_input: bool = False,
) -> DataReport:
    """The report on the records that are left of a data file, compared with these evaluators; `with_input` also looks at what its
    sources gave."""
    processor, max_length, notes = _processor(plan, lookup)

    def facts_of(records: RecordStore) -> DataFacts:
        total = len(records)
        return gather(
            records,
            {name: evaluator.records() for name, evaluator in evaluators.items()},
            processor=processor,
            max_length=max_length,
            seed=plan.seed,
            progress=lambda done: on_event(Checking(done, total)) if done % 100 == 0 or done == total else None,
        )

    facts = facts_of(result.records)
    unread = sum(stage.dropped for stage in result.counts[: len(plan.sources)])
    return DataReport(
        title=f"Data of {plan.given.name if plan.given else 'a table'}",
        facts=facts,
        findings=findings_of(facts, unread, _examples(result.bad, unread)),
        stages=[stage._asdict() for stage in result.counts],
        before=facts_of(result.given) if with_input and plan.operators else None,
        notes=notes,
        provenance=_provenance(plan, evaluators),
    )


def _examples(bad: Iterable[Any], unread: int) -> list[str]:
    """Where the first of the unread records are, and why; they come before what operators dropped."""
    return [f"{each.where}: {each.why}" for each, _ in zip(bad, range(min(unread, 20)), strict=False)]


def _processor(plan: DataPlan, lookup: Lookup) -> tuple[Processor | None, int, list[str]]:
    """The processor of a run's model, how long its records may be, and why there is none where a model is named."""
    if plan.run is None:
        return None, 0, []
    from graftwork.build import compose

    why: GraftworkError
    try:
        run = resolve(plan.run, lookup, fetch=False, missing_files=[])
        processor = compose.build_shape(run, lookup).processor
    except GraftworkError as error:
        why = error
    else:
        if not isinstance(processor, compose.NoProcessor):
            return processor, run.run_context.train.max_length, []
        why = processor.reason
    reasons = "; ".join([why.sentence, *why.details])
    return None, 0, [f"Lengths are in words, as there is no processor of the run's model: {reasons}"]


def _provenance(plan: DataPlan, evaluators: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {"data": str(plan.given) if plan.given else "tables", "seed": str(plan.seed)}
    for name, choices in (("sources", plan.run_context.sources), ("operators", plan.run_context.operators)):
        if choices:
            facts[name] = "; ".join(map(choice_text, choices))
    if evaluators:
        facts["compared with"] = ", ".join(evaluators)
    return {**facts, "graftwork": graftwork.__version__}
