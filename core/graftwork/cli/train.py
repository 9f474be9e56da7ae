"""The commands that start from a run file: plan, train, demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graftwork.cli import Session
from graftwork.cli.console import make_table, open_console, print_json
from graftwork.cli.drawing import drawing
from graftwork.cli.launch import on_processes
from graftwork.cli.options import DEVICE, TAKE_OVER

if TYPE_CHECKING:
    from rich.console import Console

    from graftwork.build.outline import Outline
    from graftwork.contracts.plan import Choice, Plan

RUN = click.argument("run", type=click.Path(path_type=Path))
SET = click.option(
    "overrides",
    "--set",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the run file, such as train.learning_rate=1e-4.",
)


TOO_MUCH = 3
"""The exit status of a plan that does not fit."""


@click.command()
@RUN
@SET
@click.option("as_json", "--json", is_flag=True, help="Print JSON.")
@click.option("--device-memory", metavar="SIZE", help="Rehearse for a CUDA device of that memory, such as 24GiB.")
@click.option("--processes", type=click.IntRange(1), default=1, metavar="N", help="Rehearse for N processes.")
@click.option(
    "--rehearse/--no-rehearse", default=True, help="Whether to take a step on fake tensors; by default it is."
)
@click.option(
    "--weather", is_flag=True, help="Tell which batches of the data would not fit, and what makes all of them fit."
)
@click.pass_context
def plan(
    ctx: click.Context,
    run: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    device_memory: str | None,
    processes: int,
    rehearse: bool,
    weather: bool,
) -> None:
    """Show what the run file RUN resolves to: every default, the parts, what is trained, the kernels, and the memory.

    No weights are read, and they need not be there where `config` names their configuration, nor need data or a GPU. The
    exit status is 3 where the run does not fit into its memory.budget, or into --device-memory.
    """
    from graftwork.cli.memory import print_search
    from graftwork.jobs import planning as jobs
    from graftwork.jobs.run import load_run

    session: Session = ctx.obj
    console = open_console()
    with drawing(console) as listen:
        planned = jobs.plan(
            load_run(run, overrides),
            device_memory=device_memory,
            processes=processes,
            rehearse=rehearse,
            weather=weather,
            on_event=listen,
            lookup=session.catalog,
        )
    if as_json:
        print_json(planned.to_json())
    else:
        print_plan(console, planned.plan, planned.begins_with)
        print_outline(console, planned.outline)
        if planned.search:
            print_search(console, planned.search)
        if planned.weather:
            console.print()
            for sentence in planned.weather.sentences():
                console.print(sentence, markup=False)
        if planned.unknown_images:
            console.print(
                f"\nThe images of the data are not known: {planned.unknown_images}", style="yellow", markup=False
            )
        if planned.missing_files:
            console.print("\nNot there yet, and needed to train or evaluate:", style="yellow")
            for line in planned.missing_files:
                console.print(f"  {line}", style="yellow", markup=False)
    if planned.fits is False:
        ctx.exit(TOO_MUCH)


def print_plan(console: Console, plan: Plan, beginning: str = "") -> None:
    """Every choice of a plan with all its settings; `beginning` is the checkpoint that it begins with."""
    model_spec, run_context = plan.model_spec, plan.run_context
    table = make_table(["what*", "component", "settings"])

    def add(what: str, choice: Choice, more: Sequence[str] = ()) -> None:
        lines = [*more, *(f"{key} = {format_setting(value)}" for key, value in choice.settings.items())]
        lines += [f"coordinates = {choice.coordinates}"] * bool(choice.coordinates)
        weights = choice.weights.path if choice.weights else None
        if choice.folder and choice.folder != weights:
            alone = not (weights or model_spec.model.weights)
            lines.insert(0, f"config = {choice.folder}" + " (random weights)" * alone)
        if weights:
            lines.insert(0, f"weights = {weights}" + " (not there yet)" * (not Path(weights).is_dir()))
        origin = f"{choice.distribution} {choice.version}"
        table.add_row(what, f"{choice.name}\n[dim]{choice.plugin}, {origin}[/dim]", "\n".join(lines))

    add("model", model_spec.model)
    for part, choice in model_spec.parts.items():
        add(f"model.parts.{part}", choice)
    if model_spec.peft:
        add("peft", model_spec.peft, [f"on = {', '.join(model_spec.on)}"])
    if model_spec.also_train:
        table.add_row("also_train", "", ", ".join(model_spec.also_train))
    if run_context.init_from:
        table.add_row("init_from", "", beginning or f"'{run_context.init_from.given}' (not there yet)")
    for choice in run_context.memory:
        add("memory", choice)
    for what, choices in (("source", run_context.sources), ("operator", run_context.operators)):
        for choice in choices:
            add(f"data.{what}", choice)
    table.add_row(
        "train", "", "\n".join(f"{key} = {format_setting(value)}" for key, value in asdict(run_context.train).items())
    )
    table.add_row("seed", "", str(run_context.seed))
    for choice in run_context.evaluate:
        add("evaluate", choice)
    console.print(table)


def format_setting(value: Any) -> str:
    """A setting's value as a run file writes it, and `-` for none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(format_setting, value)) if isinstance(value, list | tuple) else str(value)


def print_outline(console: Console, outline: Outline) -> None:
    """Roles, counts and kernels of a plan."""
    table = make_table(["role*", "modules", "parameters", "adapted", "trained", ""])
    for name in ("modules", "parameters", "adapted", "trained"):
        column = next(c for c in table.columns if c.header == name)
        column.justify = "right"
    for row in outline.roles:
        trained = f"{row.trained:,}" if row.trained else "-"
        note = "not in the base weights" if row.newly_initialised else ""
        table.add_row(row.role, str(row.modules), f"{row.parameters:,}", str(row.adapted or "-"), trained, note)
    table.add_section()
    table.add_row("all", "", f"{outline.total:,}", "", f"{outline.trained:,}", f"{outline.share:.2%} trained")
    console.print()
    console.print(table)
    kernels = make_table(["attention site*", "kernel*", "passed over"])
    for kernel in outline.kernels:
        kernels.add_row(
            kernel.site, kernel.kernel, "\n".join(f"{name}: {why}" for name, why in kernel.passed_over) or "-"
        )
    console.print()
    console.print(kernels)


@click.command()
@RUN
@SET
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Where to write; by default as the run file says."
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the folder.")
@click.option("--accept-data", is_flag=True, help="Resume on other data than the run began with.")
@TAKE_OVER
@DEVICE
@on_processes
@click.pass_obj
def train(session: Session, /, run: Path, overrides: tuple[str, ...], out: Path | None, **options: Any) -> None:
    """Train as the run file RUN says; save, verify, compare with the base, and report."""
    from graftwork.jobs import train as jobs
    from graftwork.jobs.run import load_run

    with drawing(open_console()) as listen:
        jobs.train(load_run(run, overrides), out, **options, on_event=listen, lookup=session.catalog)


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("graftwork-demo"),
    show_default=True,
    metavar="DIR",
    help="Where to write.",
)
@click.pass_obj
def demo(session: Session, out: Path) -> None:
    """Train an adapter for open questions onto a tiny model that knows yes/no questions, and show what changed."""
    from graftwork.jobs import demo as jobs

    with drawing(open_console()) as listen:
        jobs.demo(out, on_event=listen, lookup=session.catalog)
