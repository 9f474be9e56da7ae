"""The commands that ask a checkpoint: evaluate, compare, ask."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from graftwork.cli import Session
from graftwork.cli.checkpoint import FOLDER, JSON, base_options, open_for
from graftwork.cli.console import PIPE_WIDTH, make_table, open_console, print_json
from graftwork.cli.launch import on_processes
from graftwork.errors import GraftworkError

if TYPE_CHECKING:
    from rich.console import Console

    from graftwork.checkpoint import Opened
    from graftwork.comparison import Comparison
    from graftwork.compose import Assembly
    from graftwork.evaluation import Result
    from graftwork.kinds import Evaluator
    from graftwork.report import ReportContent

BATCH_SIZE = 16
DEVICE = click.option("--device", metavar="NAME", help="Such as cpu or cuda:1; by default cuda where there is one.")


def evaluation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what is asked, how, and where the answers go."""
    options: list[Callable[..., Any]] = [
        click.option("--on", "names", multiple=True, metavar="NAME", help="An evaluator; by default those of the run."),
        click.option("overrides", "--set", multiple=True, metavar="KEY=VALUE", help="A setting of the evaluator."),
        click.option("--limit", type=click.IntRange(1), metavar="N", help="Ask the first N questions only."),
        click.option("--batch-size", type=click.IntRange(1), default=BATCH_SIZE, show_default=True, metavar="N"),
        click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Where the answers go."),
        DEVICE,
        base_options,
        JSON,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@FOLDER
@evaluation_options
@on_processes
@click.pass_obj
def evaluate(session: Session, /, checkpoint: Path, as_json: bool, **options: Any) -> None:
    """Score CHECKPOINT with evaluators. What was answered before is not asked again."""
    from graftwork.scores import ADAPTER

    console = _console(as_json)
    results = []
    for _, result, folder in _evaluate_all(session, console, checkpoint, (ADAPTER,), **options):
        results.append({**result.to_json(), "out": str(folder)})
        if not as_json:
            print_scores(console, result)
            console.print(f"answers: {folder / 'answers.jsonl'}")
    if as_json:
        print_json(results)


@click.command()
@FOLDER
@evaluation_options
@on_processes
@click.pass_obj
def compare(session: Session, /, checkpoint: Path, as_json: bool, **options: Any) -> None:
    """Score CHECKPOINT and its base in one pass, and show what the adapter changed and what it forgot."""
    from graftwork import processes
    from graftwork.comparison import compare as compare_arms
    from graftwork.report import write_report
    from graftwork.scores import ADAPTER, BASE

    console = _console(as_json)
    comparisons = []
    for opened, result, folder in _evaluate_all(session, console, checkpoint, (BASE, ADAPTER), **options):
        comparison = compare_arms(result, trained_groups=set(opened.manifest.data.get("groups", {})) or None)
        if processes.is_first():
            write_report(folder, report_of(opened, comparison))
        comparisons.append({**comparison.to_json(), "out": str(folder)})
        if not as_json:
            print_comparison(comparison)
            console.print(f"report: {folder / 'report.html'}")
    if as_json:
        print_json(comparisons)


@click.command()
@FOLDER
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("question")
@click.option("both", "--base", is_flag=True, help="Answer with the adapter switched off as well.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, metavar="N")
@DEVICE
@base_options
@click.pass_obj
def ask(
    session: Session,
    checkpoint: Path,
    image: Path,
    question: str,
    both: bool,
    max_new_tokens: int,
    device: str | None,
    base: Path | None,
    parts: tuple[str, ...],
) -> None:
    """Ask CHECKPOINT a QUESTION about the picture IMAGE."""
    from graftwork.generation import answer, encode_prompt
    from graftwork.records import Picture, Record, Turn

    assembly = open_for(session, checkpoint, base, parts, device=device).assembly
    record = Record("question", (Turn("user", f"<image>\n{question}"),), (Picture(image),))
    prompt = [encode_prompt(assembly, record, max_new_tokens)]
    (said,) = answer(assembly, prompt, max_new_tokens=max_new_tokens).texts
    if not both:
        click.echo(said)
        return
    with assembly.off():
        (before,) = answer(assembly, prompt, max_new_tokens=max_new_tokens).texts
    click.echo(f"base:    {before}\nadapter: {said}")


def _console(as_json: bool) -> Console:
    """Where progress goes: the standard output, which is kept free for JSON if that is wanted."""
    from rich.console import Console

    if not as_json:
        return open_console()
    from graftwork import processes

    options: dict[str, Any] = {"stderr": True, "highlight": False, "quiet": not processes.is_first()}
    console = Console(**options)
    return console if console.is_terminal else Console(**options, width=PIPE_WIDTH)


def _evaluate_all(
    session: Session,
    console: Console,
    checkpoint: Path,
    arms: Sequence[str],
    *,
    names: Sequence[str],
    overrides: Sequence[str],
    limit: int | None,
    batch_size: int,
    out: Path | None,
    device: str | None,
    base: Path | None,
    parts: tuple[str, ...],
) -> Iterator[tuple[Opened, Result, Path]]:
    """Open a checkpoint once and run every evaluator on it."""
    from graftwork import manifest, processes
    from graftwork.checkpoint import newest
    from graftwork.events import Evaluated

    # Before the weights are opened, which takes long: a misspelt name should not.
    plan = manifest.read(newest(checkpoint)).plan
    recorded = plan.circumstance.evaluate
    settings = {choice.name: choice.settings for choice in recorded}
    if overrides and len(names) != 1:
        raise click.UsageError("--set changes the settings of one evaluator; name it with --on")
    if not names and not recorded:
        known = ", ".join(session.catalog.names("evaluator"))
        raise GraftworkError(f"the run of '{checkpoint}' named no evaluator; name one with --on; installed: {known}")
    wanted = names or tuple(dict.fromkeys(choice.label for choice in recorded))
    evaluators = [choose_evaluator(session, name, settings, overrides) for name in wanted]
    for evaluator in evaluators:
        if objections := list(evaluator.objections(plan)):
            raise GraftworkError(
                f"'{evaluator.name}' cannot be asked; set what it needs with --set KEY=VALUE", objections
            )
    opened = open_for(session, checkpoint, base, parts, device=device)
    for evaluator in evaluators:
        folder = out or opened.folder.parent / "evaluation"
        if out is None or len(evaluators) > 1:
            folder /= evaluator.name
        result = run_evaluation(
            console, opened.assembly, evaluator, folder, arms, identity_of(opened), batch_size=batch_size, limit=limit
        )
        if processes.is_first():
            session.catalog.emit(Evaluated(opened.folder.parent, evaluator.name, result.scores))
        yield opened, result, folder


def choose_evaluator(
    session: Session, name: str, recorded: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]
) -> Evaluator[Any]:
    """The evaluator of that name with the settings that the run recorded for it, if any, and those that are set here."""
    from graftwork.machine import missing_requirements
    from graftwork.settings import parse

    component = session.catalog.find("evaluator", name).component
    if missing := missing_requirements(component.requires):
        arguments = component.requires.install or " ".join(f'"{requirement}"' for requirement in missing)
        raise GraftworkError(f"the evaluator '{name}' needs {' and '.join(missing)}: pip install {arguments}")
    table = dict(recorded.get(component.name, {}))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not (key and equals):
            raise click.UsageError(f"--set takes KEY=VALUE, such as split=test, not '{override}'")
        try:
            table |= {key: tomllib.loads(f"value = {value}")["value"]}
        except tomllib.TOMLDecodeError:
            table[key] = value
    return cast("Evaluator[Any]", component(parse(component.Settings, table, where=name, folder=Path.cwd())))


def identity_of(opened: Opened) -> dict[str, str]:
    """The hashes that say whose answers these are: of the checkpoint, and of all base weights."""
    identity = opened.manifest.plan.identity
    choices = {"base": identity.model, **{f"base_{part}": choice for part, choice in identity.parts.items()}}
    return {
        "checkpoint": opened.sha256,
        **{name: choice.weights.sha256 for name, choice in choices.items() if choice.weights},
    }


def run_evaluation(
    console: Console,
    assembly: Assembly,
    evaluator: Evaluator[Any],
    folder: Path,
    arms: Sequence[str],
    identity: Mapping[str, str],
    *,
    batch_size: int = BATCH_SIZE,
    limit: int | None = None,
) -> Result:
    """Evaluate with a progress bar where there is a terminal; what could not be asked is said."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from graftwork.evaluation import evaluate as evaluate_arms

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(evaluator.name, total=None)
        result = evaluate_arms(
            assembly,
            evaluator,
            arms=arms,
            out=folder,
            identity=identity,
            batch_size=batch_size,
            limit=limit,
            strict=assembly.plan.circumstance.strict_data,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            say=lambda sentence: console.print(sentence, markup=False),
        )
    if result.bad:
        total = len(result.answered) + len(result.bad)
        console.print(f"{len(result.bad)} of {total} questions could not be asked:", style="yellow")
        for bad in result.bad[:5]:
            console.print(f"  {bad.where}: {bad.why}", style="yellow", markup=False)
    return result


def print_scores(console: Console, result: Result) -> None:
    """The table of one arm's scores."""
    from graftwork.scores import is_percent, shown

    percent = is_percent(result.rows)
    table = make_table([f"{result.evaluator.name}*", "questions*", "score*", "95% interval*", "always the same answer"])
    for row in result.rows:
        (score,) = row.scores.values()
        bounds = f"{shown(score.low, percent)} to {shown(score.high, percent)}" if score.known else "-"
        majority = f"{shown(row.majority, percent)} ({row.majority_answer})"
        table.add_row(row.name, f"{row.records:,}", shown(score.value, percent), bounds, majority)
    console.print(table)
    if result.bad:
        console.print(f"\n{result.unanswered()}", markup=False)


def print_comparison(comparison: Comparison) -> None:
    """The table of both arms' scores, and what was forgotten."""
    from rich.text import Text

    from graftwork.report.wording import SCORE_HEADERS, score_cells

    console = open_console()
    columns = [SCORE_HEADERS.index(header) for header in SCORE_HEADERS if not header.startswith("ratio")]
    headers = [comparison.evaluator, *SCORE_HEADERS[1:]]
    table = make_table([f"{headers[column]}{'*' if column < columns[-1] else ''}" for column in columns])
    for row in comparison.rows:
        cells = score_cells(row, comparison)
        table.add_row(*(Text(cells[column]) for column in columns))
    console.print(table)
    gained = sum(flip.gained for flip in comparison.flips)
    console.print("\n" + "\n".join([comparison.headline, *comparison.remarks]), markup=False)
    console.print(
        f"{len(comparison.flips)} answers changed sides: {gained} gained, {len(comparison.flips) - gained} lost."
    )
    for sentence in comparison.forgetting:
        console.print(sentence, style="yellow", markup=False)


def report_of(opened: Opened, comparison: Comparison) -> ReportContent:
    """What a report of a comparison alone says."""
    from graftwork.cli.job import notes
    from graftwork.report import ReportContent

    read = opened.manifest
    identity = read.plan.identity
    return ReportContent(
        title=f"{identity.peft.name if identity.peft else 'training'} on {identity.model.name}",
        verdict=read.health,
        comparisons=[comparison],
        plan=read.plan,
        counts=read.counts,
        kernels=comparison.provenance["runs"][-1]["attention"],
        data=read.data.get("stages", ()),
        proof={"checkpoint": str(opened.folder), "sha256": opened.sha256, **asdict(opened.proof)},
        provenance=read.provenance,
        notes=notes(read.data, read.fresh, read.probe.rounded),
    )
