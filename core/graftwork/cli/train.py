"""The commands that start from a run file: plan, train, demo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graftwork.cli import Session
from graftwork.cli.console import make_table, open_console, print_json
from graftwork.cli.launch import on_processes

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from graftwork.budget import Ladder
    from graftwork.events import Event
    from graftwork.machine import Machine
    from graftwork.plan import Choice, Plan
    from graftwork.planning import Outline
    from graftwork.runfile import RunFile

RUN = click.argument("run", type=click.Path(path_type=Path))
SET = click.option(
    "overrides",
    "--set",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change the run file, such as train.learning_rate=1e-4.",
)


def resolve_run(session: Session, run: RunFile, *, fetch: bool = True, absent: list[str] | None = None) -> Plan:
    """The plan of a run file on this machine, with every installed and ready kernel to fall back on (see `resolve`)."""
    from graftwork.machine import probe
    from graftwork.resolve import resolve

    return resolve(run, session.catalog, probe(), kernels=preferred_kernels(session), fetch=fetch, absent=absent)


def preferred_kernels(session: Session) -> list[str]:
    """The attention kernels that work here, the fastest first by their own word."""
    ready = session.catalog.names("attention", ready_only=True)
    found = {name: session.catalog.find("attention", name).component for name in ready}
    return sorted(ready, key=lambda name: -getattr(found[name], "preference", 0))


TOO_MUCH = 3
"""The exit status of a plan that does not fit."""


@click.command()
@RUN
@SET
@click.option("as_json", "--json", is_flag=True, help="Print JSON.")
@click.option("--device-memory", metavar="SIZE", help="Rehearse for a CUDA card of that memory, such as 24GiB.")
@click.option("--processes", type=click.IntRange(1), default=1, metavar="N", help="Reckon with N processes.")
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
    from graftwork import budget, machine, planning, runfile
    from graftwork.cli.memory import print_ladder

    session: Session = ctx.obj
    absent: list[str] = []
    loaded = runfile.load(run, overrides)
    resolved = resolve_run(session, loaded, fetch=False, absent=absent)
    here = machine.probe()
    allowed = budget.allowance(resolved, here, device_memory)
    outline = planning.outline(resolved, session.catalog, here)
    if outline.no_processor and not any(line.startswith("model.weights:") for line in absent):
        absent.append(f"model: {outline.no_processor}")
    ladder = None
    if rehearse and outline.trained:
        device = "cuda" if here.cuda or allowed is not None else "cpu"
        with waiting() as listen:
            ladder = budget.climb(
                resolved, session.catalog, here, device=device, budget=allowed, processes=processes, listen=listen
            )
    if as_json:
        facts = {"outline": asdict(outline), "memory": ladder.to_json() if ladder else None, "absent": absent}
        print_json({"plan": resolved.to_json(), **facts, "out": str(loaded.out)})
    else:
        console = open_console()
        print_plan(console, resolved)
        print_outline(console, outline)
        if ladder:
            print_ladder(console, ladder)
        if absent:
            console.print("\nNot there yet, and needed to train or evaluate:", style="yellow")
            for line in absent:
                console.print(f"  {line}", style="yellow", markup=False)
    if ladder and ladder.fits is False:
        ctx.exit(TOO_MUCH)


@contextmanager
def waiting() -> Iterator[Callable[[str], None]]:
    """Shows, in a terminal, what is being rehearsed."""
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield lambda line: status.update(f"rehearsing: {line}")


def print_plan(console: Console, plan: Plan) -> None:
    """Every choice of a plan with all its settings."""
    identity, circumstance = plan.identity, plan.circumstance
    table = make_table(["what*", "component", "settings"])

    def add(what: str, choice: Choice, more: Sequence[str] = ()) -> None:
        lines = [*more, *(f"{key} = {shown(value)}" for key, value in choice.settings.items())]
        weights = choice.weights.path if choice.weights else None
        if choice.folder and choice.folder != weights:
            alone = not (weights or identity.model.weights)
            lines.insert(0, f"config = {choice.folder}" + " (random weights)" * alone)
        if weights:
            lines.insert(0, f"weights = {weights}" + " (not there yet)" * (not Path(weights).is_dir()))
        origin = f"{choice.distribution} {choice.version}"
        table.add_row(what, f"{choice.name}\n[dim]{choice.plugin}, {origin}[/dim]", "\n".join(lines))

    add("model", identity.model)
    for part, choice in identity.parts.items():
        add(f"model.parts.{part}", choice)
    if identity.peft:
        add("peft", identity.peft, [f"on = {', '.join(identity.on)}"])
    if identity.also_train:
        table.add_row("also_train", "", ", ".join(identity.also_train))
    for choice in circumstance.memory:
        add("memory", choice)
    for what, choices in (("source", circumstance.sources), ("operator", circumstance.operators)):
        for choice in choices:
            add(f"data.{what}", choice)
    table.add_row(
        "train", "", "\n".join(f"{key} = {shown(value)}" for key, value in asdict(circumstance.train).items())
    )
    table.add_row("seed", "", str(circumstance.seed))
    for choice in circumstance.evaluate:
        add("evaluate", choice)
    console.print(table)


def shown(value: Any) -> str:
    """A setting's value as a run file writes it, and `-` for none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(shown, value)) if isinstance(value, list | tuple) else str(value)


def print_outline(console: Console, outline: Outline) -> None:
    """Roles, counts and kernels of a plan."""
    table = make_table(["role*", "modules", "parameters", "adapted", "trained", ""])
    for name in ("modules", "parameters", "adapted", "trained"):
        column = next(c for c in table.columns if c.header == name)
        column.justify = "right"
    for row in outline.roles:
        trained = f"{row.trained:,}" if row.trained else "-"
        note = "not in the base weights" if row.fresh else ""
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
@click.option("--device", metavar="NAME", help="Such as cpu or cuda:1; by default cuda where there is one.")
@on_processes
@click.pass_obj
def train(
    session: Session, run: Path, overrides: tuple[str, ...], out: Path | None, resume: bool, device: str | None
) -> None:
    """Train as the run file RUN says; save, prove, compare with the base, and report."""
    from graftwork import runfile

    loaded = runfile.load(run, overrides)
    resolved = resolve_run(session, loaded)
    carry_out(session, resolved, out or loaded.out, resume=resume, device=device)


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

    from graftwork import runfile
    from graftwork.merging import refuse_existing

    refuse_existing(out)
    with as_file(files("graftwork_demo")) as source:
        shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    console = open_console()
    console.print(
        f"[bold]{out}[/bold] holds the run file demo.toml and the base weights that it names; change it and run"
    )
    console.print(f"  graftwork train {out / 'demo.toml'} --out {out / 'mine'}\n")
    loaded = runfile.load(out / "demo.toml")
    carry_out(session, resolve_run(session, loaded), loaded.out)


def carry_out(session: Session, plan: Plan, out: Path, *, resume: bool = False, device: str | None = None) -> None:
    """The whole job: train, prove in a fresh process, compare, report; an unhealthy run ends in an error."""
    from graftwork import machine, planning
    from graftwork.budget import on_rung
    from graftwork.checkpoint import checkpoints
    from graftwork.cli.job import finish
    from graftwork.manifest import read
    from graftwork.training import train as run_training

    console, here = open_console(), machine.probe()
    ladder = None
    if resume and (saved := checkpoints(out)):
        now, then = plan.circumstance, read(saved[-1]).plan.circumstance
        memory = then.memory if then.memory in now.rungs else now.memory
        plan = on_rung(plan, memory, now.train.micro_batch_size or then.train.micro_batch_size)
    else:
        plan, ladder = fitted(session, console, plan, here, device or ("cuda" if here.cuda else "cpu"))
    outline = planning.outline(plan, session.catalog, here)
    console.print(
        f"training {outline.trained:,} of {outline.total:,} parameters ({outline.share:.2%}), "
        f"attention: {', '.join(f'{kernel.kernel} ({kernel.site})' for kernel in outline.kernels)}"
    )
    with progress(console) as listen:
        outcome = run_training(plan, session.catalog, out, resume=resume, device=device, listen=listen)
    finish(session, console, plan, outline, outcome, out, ladder)


def fitted(session: Session, console: Console, plan: Plan, machine: Machine, device: str) -> tuple[Plan, Ladder | None]:
    """The plan with the memory strategies and micro-batch size that fit, and what was rehearsed to find them.

    Where nobody says how much memory there is, the plan stays, and nothing is rehearsed.
    """
    from graftwork import budget, processes

    card = device.startswith("cuda")
    allowed = budget.allowance(plan, machine) if card else plan.circumstance.budget
    if allowed is None:
        return plan, None
    kind = "cuda" if card else "cpu"
    with waiting() as listen:
        ladder = budget.climb(
            plan, session.catalog, machine, device=kind, budget=allowed, processes=processes.count(), listen=listen
        )
    if ladder.best is None:
        console.print(f"{ladder.why}; training begins all the same", style="yellow")
        return plan, None
    console.print(f"memory: {ladder.why}")
    return budget.settled(plan, ladder), ladder


@contextmanager
def progress(console: Console) -> Iterator[Callable[[Event], None]]:
    """A live line of the run: loss, learning rate, pictures a second and time left. Without a terminal, ten plain lines."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from graftwork.events import CheckpointSaved, MemoryRanOut, RunStarted, StepTaken
    from graftwork.sizes import shown_size

    bar = Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("training", total=None, facts="")
    rates: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, RunStarted):
            bar.update(task, total=event.steps, completed=event.step)
            for remark in event.remarks:
                console.print(f"memory: {remark}", style="yellow")
            if event.step:
                console.print(f"resumed after step {event.step} of {event.steps}")
        elif isinstance(event, StepTaken):
            rates.append((event.images or event.tokens) / event.seconds)
            unit = "images" if event.images else "tokens"
            recent = rates[-20:]
            facts = f"loss {event.loss:.4f}  lr {event.learning_rate:.2e}  {sum(recent) / len(recent):.0f} {unit}/s"
            if event.memory:
                facts += f"  {shown_size(event.memory)}"
            bar.update(task, completed=event.step, facts=facts)
            tenth = max(1, event.steps // 10)
            if not console.is_terminal and (event.step % tenth == 0 or event.step in (1, event.steps)):
                console.print(f"step {event.step}/{event.steps}  {facts}")
        elif isinstance(event, MemoryRanOut):
            console.print(event.sentence, style="yellow")
        elif isinstance(event, CheckpointSaved) and console.is_terminal:
            bar.console.print(f"saved {event.folder}")

    with bar:
        yield listen
