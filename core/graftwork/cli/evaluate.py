"""The commands that ask a checkpoint: evaluate, compare, ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from graftwork.cli import Session
from graftwork.cli.checkpoint import open_for
from graftwork.cli.console import print_json, progress_console
from graftwork.cli.drawing import drawing
from graftwork.cli.launch import on_processes
from graftwork.cli.options import DEVICE, FOLDER, JSON, base_options, parse_parts, parse_settings
from graftwork.cli.printing import print_comparison, print_scores
from graftwork.jobs.evaluate import BATCH_SIZE, EvaluationRequest, compare_checkpoint, evaluate_checkpoint


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
    """Score CHECKPOINT with evaluators. Questions that were answered before are not asked again."""
    from graftwork.evaluate.scores import ADAPTER

    request, where = questions_of(options)
    results = []
    console = progress_console(as_json)
    with drawing(console) as listen:
        for _, result, folder in evaluate_checkpoint(
            checkpoint, session.catalog, (ADAPTER,), request, listen=listen, **where
        ):
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
    request, where = questions_of(options)
    comparisons = []
    console = progress_console(as_json)
    with drawing(console) as listen:
        for comparison, folder in compare_checkpoint(checkpoint, session.catalog, request, listen=listen, **where):
            comparisons.append({**comparison.to_json(), "out": str(folder)})
            if not as_json:
                print_comparison(console, comparison)
                console.print(f"report: {folder / 'report.html'}")
    if as_json:
        print_json(comparisons)


def questions_of(options: Mapping[str, Any]) -> tuple[EvaluationRequest, dict[str, Any]]:
    """What `evaluation_options` say is asked, and where the checkpoint's weights are."""
    names, overrides = options["names"], options["overrides"]
    if overrides and len(names) != 1:
        raise click.UsageError("--set changes the settings of one evaluator; name it with --on")
    settings = parse_settings(overrides)
    request = EvaluationRequest(names, settings, options["limit"], options["batch_size"], options["out"])
    parts = parse_parts(options["parts"])
    return request, {"base": options["base"], "parts": parts, "device": options["device"]}


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
    """Ask CHECKPOINT a QUESTION about the image IMAGE."""
    from graftwork.contracts.records import Image, Record, Turn
    from graftwork.evaluate.generation import answer, encode_prompt

    assembly = open_for(session, checkpoint, base, parts, device=device).assembly
    record = Record("question", (Turn("user", f"<image>\n{question}"),), (Image(image),))
    prompt = [encode_prompt(assembly, record, max_new_tokens)]
    answers = {"adapter": answer(assembly, prompt, max_new_tokens=max_new_tokens)}
    if both:
        with assembly.disable_adapter():
            answers = {"base": answer(assembly, prompt, max_new_tokens=max_new_tokens), **answers}
    for variant, given in answers.items():
        click.echo(f"{variant + ':':<9}" * both + given.texts[0])
    for variant, given in answers.items():
        if not given.ended[0]:
            click.echo(
                f"the {variant}'s answer did not end by itself, and was stopped at {given.tokens[0]} tokens; allow more with "
                "--max-new-tokens, unless the model's context ends there",
                err=True,
            )
