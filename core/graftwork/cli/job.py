"""The end of a training run: proof in a fresh process, comparison with the base, the report, and the verdict."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graftwork.cli import Session
from graftwork.cli.checkpoint import verify_in_fresh_process
from graftwork.errors import UnhealthyRun

if TYPE_CHECKING:
    from rich.console import Console

    from graftwork.comparison import Comparison
    from graftwork.kinds import Evaluator
    from graftwork.plan import Plan
    from graftwork.planning import Outline
    from graftwork.training import Outcome


def finish(session: Session, console: Console, plan: Plan, outline: Outline, outcome: Outcome, out: Path) -> None:
    """Prove, compare and report a run that ended; UnhealthyRun when its result should not be used.

    Several processes take part in the comparison; the first one proves and reports.
    """
    from graftwork import manifest, processes
    from graftwork.report import ReportContent, write_report

    console.print(f"{outcome.verdict.sentence()}", style="green" if outcome.verdict.healthy else "bold red")
    print_losses(console, outcome.data)
    proof: dict[str, Any] = {}
    comparisons: list[Comparison] = []
    if outcome.verdict.healthy:
        (facts, *_) = processes.gather(
            verify_in_fresh_process(session, outcome.checkpoint) if processes.is_first() else {}
        )
        proof = {"reopened in a fresh process": True, **facts}
        console.print(
            f"proven: {outcome.checkpoint} was reopened in a fresh process, its logits differ by {facts['error']:.3g} "
            f"(at most {facts['tolerance']:.3g} is rounding)"
        )
        comparisons = compare_all(session, console, plan, outcome.checkpoint, out)
    read = manifest.read(outcome.checkpoint)
    content = ReportContent(
        title=f"{plan.identity.peft.name if plan.identity.peft else 'training'} on {plan.identity.model.name}",
        summary=comparisons[0].headline if comparisons else "",
        verdict=outcome.verdict,
        comparisons=comparisons,
        log=outcome.log,
        plan=read.plan,
        counts=read.counts,
        roles=[asdict(row) for row in outline.roles],
        kernels=read.attention,
        data=outcome.data["stages"],
        proof=proof,
        provenance=read.provenance,
        notes=notes(outcome.data, read.fresh, read.probe.rounded),
    )
    if processes.is_first():
        write_report(out, content)
    console.print(f"report: {out / 'report.html'}")
    if not outcome.verdict.healthy:
        raise UnhealthyRun(
            f"the run ended, and its result should not be used; the checkpoint is kept at '{outcome.checkpoint}'",
            outcome.verdict.reasons,
        )


def print_losses(console: Console, data: dict[str, Any]) -> None:
    """What of the data was not used, in one line, and the first few places."""
    for note in notes(data, ()):
        console.print(note, style="yellow")
    for line in data["bad"][:5]:
        console.print(f"  {line}", style="yellow")


def notes(data: dict[str, Any], fresh: tuple[str, ...], rounded: tuple[str, ...] = ()) -> list[str]:
    """Sentences that a reader of the report must not miss."""
    said = []
    if data["bad"]:
        said.append(f"{len(data['bad']):,} records could not be used, {data['records']:,} were.")
    if data["too_long"]:
        said.append(f"{data['too_long']:,} records are longer than train.max_length, and were {data['too_long_were']}.")
    if fresh:
        said.append(
            f"The base weights lack {', '.join(fresh)}: what is called the base here has them as trained in this run."
        )
    if rounded:
        said.append(f"Trained on a base that {' and '.join(rounded)} rounded, and evaluated on the whole one.")
    return said


def compare_all(session: Session, console: Console, plan: Plan, checkpoint: Path, out: Path) -> list[Comparison]:
    """Ask base and adapter, in one pass, the questions of every evaluator of the plan."""
    from graftwork import processes
    from graftwork.checkpoint import open_checkpoint
    from graftwork.cli.evaluate import identity_of, print_comparison, print_scores, run_evaluation
    from graftwork.comparison import compare
    from graftwork.events import Evaluated
    from graftwork.resolve import restore_component
    from graftwork.scores import ADAPTER, BASE

    comparisons: list[Comparison] = []
    if not plan.circumstance.evaluate:
        return comparisons
    opened = open_checkpoint(checkpoint, session.catalog)
    if opened.remark:
        console.print(opened.remark, style="yellow")
    arms = (BASE, ADAPTER) if opened.assembly.switchable else (ADAPTER,)
    for choice in plan.circumstance.evaluate:
        evaluator = cast("Evaluator[Any]", restore_component(choice, session.catalog))
        folder = out / "evaluation" / choice.name
        result = run_evaluation(console, opened.assembly, evaluator, folder, arms, identity_of(opened))
        if processes.is_first():
            session.catalog.emit(Evaluated(out, choice.name, result.scores))
        if len(arms) == 1:
            console.print("There is no base to compare with: everything that was trained is new.")
            print_scores(console, result)
            continue
        comparisons.append(compare(result, trained_groups=set(opened.manifest.data.get("groups", {})) or None))
        print_comparison(comparisons[-1])
    return comparisons
