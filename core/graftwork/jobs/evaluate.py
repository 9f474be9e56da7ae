"""Evaluating a checkpoint with several evaluators, and comparing it with its base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from graftwork import processes
from graftwork.checkpoint.locking import one_writer
from graftwork.checkpoint.store import Opened
from graftwork.config.settings import parse
from graftwork.contracts.assembly import Assembly
from graftwork.contracts.component import missing_packages
from graftwork.contracts.events import Evaluated
from graftwork.contracts.kinds import Evaluator
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Plan
from graftwork.errors import GraftworkError
from graftwork.evaluate import evaluation
from graftwork.evaluate.comparison import Comparison, compare
from graftwork.evaluate.evaluation import Result
from graftwork.jobs.messages import Answering, Listener, Message, ignore
from graftwork.jobs.outcome import MAX_NAMED, notes, provenance_of, title_of
from graftwork.report import ReportContent

BATCH_SIZE = 16


@dataclass(frozen=True)
class EvaluationRequest:
    """What a checkpoint is asked, how, and where the answers go."""

    evaluators: Sequence[str] = ()
    """Names of evaluators; by default those of the run."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ from the recorded ones, of the only evaluator."""
    limit: int | None = None
    """The first so many whole questions only."""
    batch_size: int = BATCH_SIZE
    out: Path | None = None
    """By default `evaluation` beside the checkpoint."""
    take_over: bool = False
    """Whether to go on in spite of a stale lock of another machine (see `checkpoint.locking.one_writer`)."""


def evaluators_of(checkpoint: Path, plan: Plan, lookup: Lookup, request: EvaluationRequest) -> list[Evaluator[Any]]:
    """The evaluators that a request names, else those of the run, each able to ask; GraftworkError otherwise.

    A misspelt name should fail before the weights are opened, which takes long."""
    recorded = plan.run_context.evaluate
    if not request.evaluators and not recorded:
        known = ", ".join(lookup.names("evaluator"))
        raise GraftworkError(f"the run of '{checkpoint}' named no evaluator; name one with --on; installed: {known}")
    names = request.evaluators or tuple(dict.fromkeys(choice.label for choice in recorded))
    settings = {choice.name: choice.settings for choice in recorded}
    evaluators = [choose_evaluator(name, lookup, settings, request.settings) for name in names]
    for evaluator in evaluators:
        if reasons := list(evaluator.validate(plan)):
            raise GraftworkError(f"'{evaluator.name}' cannot be asked; set what it needs with --set KEY=VALUE", reasons)
    return evaluators


def run_evaluators(
    opened: Opened,
    lookup: Lookup,
    evaluators: Sequence[Evaluator[Any]],
    variants: Sequence[str],
    request: EvaluationRequest,
    listen: Listener = ignore,
) -> Iterator[tuple[Result, Path]]:
    """Run evaluators on an opened checkpoint, and tell where the answers are. Collective."""
    for evaluator in evaluators:
        folder = request.out or opened.folder.parent / "evaluation"
        if request.out is None or len(evaluators) > 1:
            folder /= evaluator.name
        result = run_evaluation(
            opened.assembly,
            evaluator,
            folder,
            variants,
            hashes_of(opened),
            batch_size=request.batch_size,
            limit=request.limit,
            take_over=request.take_over,
            listen=listen,
        )
        if processes.is_first():
            lookup.emit(Evaluated(opened.folder.parent, evaluator.name, result.scores))
        yield result, folder


def compare_opened(opened: Opened, result: Result) -> Comparison:
    """Compare base and adapter of a checkpoint, which knows the groups that it was trained on."""
    return compare(result, trained_groups=set(opened.manifest.data.get("groups", {})) or None)


def choose_evaluator(
    name: str, lookup: Lookup, recorded: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> Evaluator[Any]:
    """The evaluator of that name with the settings that the run recorded for it, if any, and those that are set here."""
    component = lookup.find("evaluator", name).component
    if missing := missing_packages(component.requires):
        raise GraftworkError(f"the evaluator '{name}' {missing}")
    table = {**recorded.get(component.name, {}), **settings}
    return cast("Evaluator[Any]", component(parse(component.Settings, table, where=name, folder=Path.cwd())))


def hashes_of(opened: Opened) -> dict[str, str]:
    """The hashes that say whose answers these are: of the checkpoint, and of all base weights."""
    model_spec = opened.manifest.plan.model_spec
    choices = {"base": model_spec.model, **{f"base_{part}": choice for part, choice in model_spec.parts.items()}}
    return {
        "checkpoint": opened.sha256,
        **{name: choice.weights.sha256 for name, choice in choices.items() if choice.weights},
    }


def run_evaluation(
    assembly: Assembly,
    evaluator: Evaluator[Any],
    folder: Path,
    variants: Sequence[str],
    hashes: Mapping[str, str],
    *,
    batch_size: int = BATCH_SIZE,
    limit: int | None = None,
    take_over: bool = False,
    listen: Listener = ignore,
) -> Result:
    """Ask an evaluator's questions, and report the progress and what could not be asked."""

    def say(sentence: str) -> None:
        listen(Message(sentence))

    with one_writer(folder, take_over=take_over, say=say):
        result = evaluation.evaluate(
            assembly,
            evaluator,
            variants=variants,
            out=folder,
            hashes=hashes,
            batch_size=batch_size,
            limit=limit,
            strict=assembly.plan.run_context.strict_data,
            progress=lambda done, total: listen(Answering(evaluator.name, done, total)),
            say=say,
        )
    if result.bad:
        listen(Message(f"{result.could_not_be_asked()}:", "warning"))
        for bad in result.bad[:MAX_NAMED]:
            listen(Message(f"  {bad.where}: {bad.why}", "warning"))
    return result


def report_of(opened: Opened, comparison: Comparison) -> ReportContent:
    """What a report of a comparison alone says."""
    read = opened.manifest
    return ReportContent(
        title=title_of(read.plan),
        verdict=read.health,
        comparisons=[comparison],
        plan=read.plan,
        counts=read.counts,
        kernels=comparison.provenance["runs"][-1]["attention"],
        data=read.data.get("stages", ()),
        verification={"checkpoint": str(opened.folder), "sha256": opened.sha256, **asdict(opened.verification)},
        provenance=provenance_of(read),
        notes=notes(read.data, read.newly_initialised, read.golden.quantized),
    )
