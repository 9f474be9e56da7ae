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
from graftwork.cli.options import DEVICE

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
@click.pass_context
def plan(
    ctx: click.Context,
    run: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    device_memory: str | None,
    processes: int,
    rehearse: bool,
) -> None:
    """Show what the run file RUN resolves to: every default, the parts, what is trained, the kernels, and the memory.

    No weights are read, and they need not be there where `config` names their configuration, nor need data or a GPU. The
    exit status is 3 where the run does not fit into its memory.budget, or into --device-memory.
    """
    from graftwork.build.outline import outline as outline_of
    from graftwork.cli.memory import print_search
    from graftwork.config import machine, runfile
    from graftwork.jobs.messages import Rehearsing
    from graftwork.jobs.resolve import resolve_run
    from graftwork.memory import budget

    session: Session = ctx.obj
    console = open_console()
    missing_files: list[str] = []
    loaded = runfile.load(run, overrides)
    resolved = resolve_run(loaded, session.catalog, fetch=False, missing_files=missing_files)
    here = machine.detect_machine()
    allowed = budget.budget_bytes(resolved, here, device_memory)
    outline = outline_of(resolved, session.catalog, here)
    if outline.no_processor and not any(line.startswith("model.weights:") for line in missing_files):
        missing_files.append(f"model: {outline.no_processor}")
    search = None
    if rehearse and outline.trained:
        device = "cuda" if here.cuda or allowed is not None else "cpu"
        with drawing(console) as listen:
            search = budget.search_candidates(
                resolved,
                session.catalog,
                here,
                device=device,
                budget=allowed,
                processes=processes,
                listen=lambda strategies: listen(Rehearsing(strategies)),
            )
    if as_json:
        facts = {
            "outline": asdict(outline),
            "memory": search.to_json() if search else None,
            "missing_files": missing_files,
        }
        print_json({"plan": resolved.to_json(), **facts, "out": str(loaded.out)})
    else:
        print_plan(console, resolved)
        print_outline(console, outline)
        if search:
            print_search(console, search)
        if missing_files:
            console.print("\nNot there yet, and needed to train or evaluate:", style="yellow")
            for line in missing_files:
                console.print(f"  {line}", style="yellow", markup=False)
    if search and search.fits is False:
        ctx.exit(TOO_MUCH)


def print_plan(console: Console, plan: Plan) -> None:
    """Every choice of a plan with all its settings."""
    model_spec, run_context = plan.model_spec, plan.run_context
    table = make_table(["what*", "component", "settings"])

    def add(what: str, choice: Choice, more: Sequence[str] = ()) -> None:
        lines = [*more, *(f"{key} = {format_setting(value)}" for key, value in choice.settings.items())]
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
@DEVICE
@on_processes
@click.pass_obj
def train(
    session: Session, run: Path, overrides: tuple[str, ...], out: Path | None, resume: bool, device: str | None
) -> None:
    """Train as the run file RUN says; save, verify, compare with the base, and report."""
    from graftwork.config import runfile
    from graftwork.jobs import train as jobs
    from graftwork.jobs.resolve import resolve_run

    loaded = runfile.load(run, overrides)
    resolved = resolve_run(loaded, session.catalog)
    with drawing(open_console()) as listen:
        jobs.train(resolved, session.catalog, out or loaded.out, resume=resume, device=device, listen=listen)


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
    import shutil
    from importlib.resources import as_file, files

    from graftwork.checkpoint.merging import refuse_existing
    from graftwork.config import runfile
    from graftwork.jobs import train as jobs
    from graftwork.jobs.resolve import resolve_run

    refuse_existing(out)
    with as_file(files("graftwork_demo")) as source:
        shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    console = open_console()
    console.print(
        f"[bold]{out}[/bold] holds the run file demo.toml and the base weights that it names; change it and run"
    )
    console.print(f"  graftwork train {out / 'demo.toml'} --out {out / 'mine'}\n")
    loaded = runfile.load(out / "demo.toml")
    with drawing(console) as listen:
        jobs.train(resolve_run(loaded, session.catalog), session.catalog, loaded.out, listen=listen)
