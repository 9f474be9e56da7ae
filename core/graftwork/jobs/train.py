"""A whole run: fit it into memory, train, verify in a fresh process, compare with the base, and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, cast

from graftwork import processes
from graftwork.build import outline as outlines
from graftwork.build.outline import Outline
from graftwork.checkpoint import ancestry, learning, manifest
from graftwork.checkpoint.locking import one_writer
from graftwork.checkpoint.store import checkpoints
from graftwork.config.machine import Machine, detect_machine, free_bytes
from graftwork.config.restore import restore_component
from graftwork.config.sizes import format_size
from graftwork.contracts.events import Evaluated
from graftwork.contracts.kinds import Evaluator
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Plan
from graftwork.errors import UnhealthyRun
from graftwork.evaluate.scores import ADAPTER, BASE
from graftwork.jobs.evaluate import compare_opened, hashes_of, run_evaluation
from graftwork.jobs.messages import Listener, Message, Rehearsing, ignore
from graftwork.jobs.outcome import data_notes, memory_facts, notes, provenance_of, title_of
from graftwork.jobs.planning import images_of
from graftwork.jobs.results import Compared, Scored, TrainResult
from graftwork.jobs.run import Run, installed
from graftwork.jobs.verify import FreshProcess, open_for
from graftwork.memory import budget
from graftwork.memory.budget import CandidateSearch
from graftwork.report import ReportContent, write_report
from graftwork.train import loop
from graftwork.train.loop import Outcome
from graftwork.train.out_of_memory import free_memory


def train(
    run: Run | Mapping[str, Any] | str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    resume: bool = False,
    accept_data: bool = False,
    take_over: bool = False,
    device: str | None = None,
    on_event: Listener = ignore,
    lookup: Lookup | None = None,
) -> TrainResult:
    """Carry out a run: fit it into memory, train, verify in a fresh process, compare with the base, and report.

    `run` is a `Run`, a dictionary of the same tables, or a run file. Checkpoints, answers and the report go into `out`, by
    default where the run says. With `resume` it goes on from the newest checkpoint there, on the data that it began with, or with
    `accept_data` on other data. No other command may write there meanwhile; `take_over` goes on in spite of the lock of
    another machine's process that was silent for ten minutes. `on_event` gets every event and
    message. Raises UnhealthyRun when the result should not be used, PlanRefused for a run that makes no sense here,
    RunInterrupted when SIGTERM or SIGINT ended the training after a step, and other GraftworkErrors. Collective: several
    processes train and answer together, and the first one verifies and reports.
    """
    run, lookup, listen = Run.of(run), lookup or installed(), on_event
    plan, out = run.plan(lookup), Path(out or run.out)
    with one_writer(out, take_over=take_over, say=lambda sentence: listen(Message(sentence, "warning"))):
        return carry_out(plan, lookup, out, resume, accept_data, take_over, device, listen)


def carry_out(
    plan: Plan,
    lookup: Lookup,
    out: Path,
    resume: bool,
    accept_data: bool,
    take_over: bool,
    device: str | None,
    listen: Listener,
) -> TrainResult:
    """All of `train` in a folder that nobody else writes into. Collective."""
    search, machine, saved = None, detect_machine(), checkpoints(out)
    if resume and saved:
        plan = as_begun(plan, manifest.read(saved[-1]).plan)
    else:
        if resume:
            listen(Message(f"there is nothing to resume: '{out}' holds no checkpoint; the run starts anew", "warning"))
        if begins := ancestry.beginning(plan, lookup, hashed=False):
            listen(Message(f"begins with {manifest.told(begins.ancestors)}; steps and optimizer begin anew"))
        plan, search = fitted(plan, lookup, machine, device or ("cuda" if machine.cuda else "cpu"), listen)
    outline = outlines.outline(plan, lookup, machine)
    kernels = ", ".join(f"{kernel.kernel} ({kernel.site})" for kernel in outline.kernels)
    share = f"training {outline.trained:,} of {outline.total:,} parameters ({outline.share:.2%})"
    listen(Message(f"{share}, attention: {kernels}"))
    with FreshProcess(lookup) as fresh:
        heard = fresh.starting(plan, listen)
        outcome = loop.train(plan, lookup, out, resume=resume, accept_data=accept_data, device=device, listen=heard)
        # Verifying and comparing build the model again: two of them were not rehearsed.
        outcome.assembly = None
        free_memory()
        return finish(plan, lookup, outline, outcome, out, fresh, search, listen, take_over)


def as_begun(plan: Plan, begun: Plan) -> Plan:
    """The plan with the memory strategies and the micro-batch that a run began with, as far as the plan still allows them."""
    current, recorded = plan.run_context, begun.run_context
    memory = recorded.memory if recorded.memory in current.candidates else current.memory
    # The smaller one: a run that ran out of memory went on with less than its run file says.
    sizes = [size for size in (current.train.micro_batch_size, recorded.train.micro_batch_size) if size]
    return budget.with_candidate(plan, memory, min(sizes, default=None))


def fitted(
    plan: Plan, lookup: Lookup, machine: Machine, device: str, listen: Listener = ignore
) -> tuple[Plan, CandidateSearch | None]:
    """The plan with the memory strategies and micro-batch size that fit, and what was rehearsed to find them.

    Where the amount of memory is not known, the plan stays as it is, and nothing is rehearsed.
    """
    on_cuda = device.startswith("cuda")
    free = min(processes.all_gather_object(free_bytes(device) if on_cuda else 0))
    if 0 < free < 0.9 * machine.device_bytes:
        whole, left = format_size(machine.device_bytes), format_size(free)
        told = f"of a device's {whole} only {left} are free; others have the rest"
        listen(Message(told, "warning"))
    allowed = budget.budget_bytes(plan, free)
    if allowed is None:
        return plan, None
    shown, not_known = images_of(plan, lookup, listen)
    if not_known:
        listen(Message(not_known, "warning"))
    search = budget.search_candidates(
        plan,
        lookup,
        machine,
        device="cuda" if on_cuda else "cpu",
        budget=allowed,
        shown=shown,
        processes=processes.count(),
        listen=lambda strategies: listen(Rehearsing(strategies)),
    )
    if search.best is None:
        listen(Message(f"{search.why}; training begins anyway", "warning"))
        return plan, None
    listen(Message(f"memory: {search.why}; rehearsed with {search.best.steps[-1].records}"))
    return budget.chosen_plan(plan, search), search


def finish(
    plan: Plan,
    lookup: Lookup,
    outline: Outline,
    outcome: Outcome,
    out: Path,
    fresh: FreshProcess,
    search: CandidateSearch | None = None,
    listen: Listener = ignore,
    take_over: bool = False,
) -> TrainResult:
    """Verify, compare and report a run that ended; UnhealthyRun when its result should not be used. Collective."""
    verdict = outcome.verdict
    listen(Message(verdict.sentence(), "success" if verdict.healthy else "error"))
    for line in data_notes(outcome.data):
        listen(Message(line, "warning"))
    verification: dict[str, Any] = {}
    answers: list[Scored | Compared] = []
    if verdict.healthy:
        own_facts = fresh.verify(outcome.checkpoint) if processes.is_first() else {}
        (facts, *_) = processes.all_gather_object(own_facts)
        verification = {name: fact for name, fact in facts.items() if fact not in ([], "")}
        if undecided := facts["undecided"]:
            listen(Message(f"{facts['verified']}: {outcome.checkpoint}; {undecided}", "warning"))
        else:
            listen(
                Message(
                    f"{facts['verified']}: {outcome.checkpoint}, its logits differ by {facts['error']:.3g} in a fresh process (at most "
                    f"{facts['tolerance']:.3g} is rounding)"
                )
            )
        answers = compare_all(plan, lookup, outcome.checkpoint, out, listen, take_over)
    result = TrainResult(
        out,
        outcome.checkpoint,
        verdict,
        comparisons=[answer for answer in answers if isinstance(answer, Compared)],
        scores=[answer for answer in answers if isinstance(answer, Scored)],
        log=outcome.log,
        verification=verification,
    )
    if processes.is_first():
        write_report(out, report_content(plan, outline, outcome, search, result))
    listen(Message(f"report: {result.report}"))
    if not verdict.healthy:
        raise UnhealthyRun(
            f"the run {verdict.failure}, and its result should not be used; the checkpoint is kept at '{outcome.checkpoint}'",
            verdict.reasons,
        )
    return result


def report_content(
    plan: Plan,
    outline: Outline,
    outcome: Outcome,
    search: CandidateSearch | None,
    result: TrainResult,
) -> ReportContent:
    """What the report of a run says."""
    comparisons = [each.comparison for each in result.comparisons]
    read = manifest.read(outcome.checkpoint)
    return ReportContent(
        title=title_of(plan),
        summary=comparisons[0].headline if comparisons else "",
        verdict=outcome.verdict,
        comparisons=comparisons,
        log=outcome.log,
        plan=read.plan,
        counts=read.counts,
        roles=[asdict(row) for row in outline.roles],
        learned=learning.read(outcome.checkpoint),
        kernels=read.attention,
        data=outcome.data["stages"],
        verification=result.verification,
        provenance=provenance_of(read),
        notes=notes(outcome.data, read.newly_initialised, read.golden.quantized),
        memory=memory_facts(search, outcome.peak),
        footprint=search.best.steps[-1].footprint if search and search.best else None,
    )


def compare_all(
    plan: Plan, lookup: Lookup, checkpoint: Path, out: Path, listen: Listener = ignore, take_over: bool = False
) -> list[Scored | Compared]:
    """Ask base and adapter, in one pass, the questions of every evaluator of the plan."""
    answers: list[Scored | Compared] = []
    if not plan.run_context.evaluate:
        return answers
    opened = open_for(checkpoint, lookup, listen=listen)
    variants = (BASE, ADAPTER) if opened.assembly.can_disable else (ADAPTER,)
    for choice in plan.run_context.evaluate:
        evaluator = cast(Evaluator[Any], restore_component(choice, lookup))
        folder = evaluation_folder(out, choice.name)
        known = hashes_of(opened)
        result = run_evaluation(opened.assembly, evaluator, folder, variants, known, listen=listen, take_over=take_over)
        if processes.is_first():
            lookup.emit(Evaluated(out, choice.name, result.scores))
        if len(variants) == 1:
            listen(Message("There is no base to compare with: everything that was trained is new."))
            answers.append(Scored(result, folder))
        else:
            answers.append(Compared(compare_opened(opened, result), folder))
        listen(answers[-1])
    return answers


def evaluation_folder(out: Path, evaluator: str) -> Path:
    """Where the answers to an evaluator's questions are in the folder of a run."""
    return out / "evaluation" / evaluator
