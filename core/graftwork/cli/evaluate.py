"""The commands that ask a checkpoint: evaluate, compare, ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from graftwork.cli import Session
from graftwork.cli.checkpoint import open_checkpoint
from graftwork.cli.console import print_json, progress_console
from graftwork.cli.launch import on_processes
from graftwork.cli.options import DEVICE, FOLDER, JSON, TAKE_OVER, base_options, parse_settings
from graftwork.cli.printing import print_comparison, print_scores
from graftwork.jobs.checkpoint import MAX_NEW_TOKENS
from graftwork.jobs.evaluate import BATCH_SIZE, EvaluationRequest


def evaluation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what is asked, how, and where the answers go."""
    options: list[Callable[..., Any]] = [
        click.option("--on", "names", multiple=True, metavar="NAME", help="An evaluator; by default those of the run."),
        click.option("overrides", "--set", multiple=True, metavar="KEY=VALUE", help="A setting of the evaluator."),
        click.option("--limit", type=click.IntRange(1), metavar="N", help="Ask the first N whole questions only."),
        click.option("--batch-size", type=click.IntRange(1), default=BATCH_SIZE, show_default=True, metavar="N"),
        click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Where the answers go."),
        TAKE_OVER,
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
    """Score CHECKPOINT with evaluators. Questions that were answered before are not asked again."""
    console, request, results = progress_console(as_json), request_of(options), []
    with open_checkpoint(session, checkpoint, options, console) as opened:
        for scored in opened.evaluate_all(request):
            results.append(scored.to_json())
            if not as_json:
                print_scores(console, scored.result)
                console.print(f"answers: {scored.folder / 'answers.jsonl'}")
    if as_json:
        print_json(results)


@click.command()
@FOLDER
@evaluation_options
@on_processes
@click.pass_obj
def compare(session: Session, /, checkpoint: Path, as_json: bool, **options: Any) -> None:
    """Score CHECKPOINT and its base in one pass, and show what the adapter changed and what it forgot."""
    console, request, comparisons = progress_console(as_json), request_of(options), []
    with open_checkpoint(session, checkpoint, options, console) as opened:
        for compared in opened.compare_all(request):
            comparisons.append(compared.to_json())
            if not as_json:
                print_comparison(console, compared.comparison)
                console.print(f"report: {compared.folder / 'report.html'}")
    if as_json:
        print_json(comparisons)


def request_of(options: Mapping[str, Any]) -> EvaluationRequest:
    """What `evaluation_options` say is asked."""
    names, overrides = options["names"], options["overrides"]
    if overrides and len(names) != 1:
        raise click.UsageError("--set changes the settings of one evaluator; name it with --on")
    settings = parse_settings(overrides)
    return EvaluationRequest(
        names, settings, options["limit"], options["batch_size"], options["out"], options["take_over"]
    )


@click.command()
@FOLDER
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("question")
@click.option("both", "--base", is_flag=True, help="Answer with the adapter switched off as well.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=MAX_NEW_TOKENS, show_default=True, metavar="N")
@DEVICE
@base_options
@click.pass_obj
def ask(
    session: Session, /, checkpoint: Path, image: Path, question: str, both: bool, max_new_tokens: int, **options: Any
) -> None:
    """Ask CHECKPOINT a QUESTION about the image IMAGE."""
    variants = ("base", "adapter") if both else ("adapter",)
    with open_checkpoint(session, checkpoint, options) as opened:
        answers = opened.ask_variants(image, question, variants, max_new_tokens=max_new_tokens)
    for variant, answer in answers.items():
        click.echo(f"{variant + ':':8} {answer}" if both else answer)
