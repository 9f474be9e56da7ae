"""The command `import`, and what `inspect` says of folders that Graftwork did not write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graftwork.cli import Session
from graftwork.cli.console import open_console, print_facts

if TYPE_CHECKING:
    from rich.console import Console

    from graftwork.diagnosis import Diagnosis


def place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say where a foreign folder's base and towers are."""
    base = click.option(
        "base", "--base", type=click.Path(path_type=Path), metavar="DIR", help="What it was trained from."
    )
    part = click.option(
        "parts", "--part", multiple=True, metavar="NAME=DIR", help="The tower of one part, such as low=DIR."
    )
    search = click.option(
        "search",
        "--search",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Look for both below this folder; their names do not matter.",
    )
    return base(part(search(command)))


def print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """A diagnosis for a person."""
    console.print(f"[bold]{diagnosis.folder}[/bold]: {diagnosis.said}\n", soft_wrap=True)
    print_facts(console, facts(diagnosis))
    for title, lines in (
        ("Not in it", diagnosis.adoption.missing if diagnosis.adoption else ()),
        ("Inconsistent", diagnosis.inconsistent),
    ):
        if lines:
            console.print(f"\n[bold]{title}[/bold]")
            for line in lines:
                console.print(f"  - {line}")
    if diagnosis.refused:
        console.print(f"\n[red]It cannot be imported:[/red] {diagnosis.refused}.")
    else:
        console.print("\nTo make a proven checkpoint of it:")
        console.print(f"  {diagnosis.command}", soft_wrap=True)
        if diagnosis.adoption and diagnosis.adoption.whole and not diagnosis.places["base"].found:
            console.print("With --base DIR it can be compared with the language model that it was trained from.")


def facts(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    """What is known of a foreign folder, a label and a phrase each."""
    if diagnosis.architecture:
        yield "model", diagnosis.architecture
    if diagnosis.adoption:
        yield from diagnosis.adoption.facts
    elif diagnosis.adapter:
        yield "adapter", diagnosis.adapter.said
    for what, place in diagnosis.places.items():
        yield "trained from" if what == "base" else f"{what} part", place.line()
    if losses := diagnosis.losses:
        yield "trained", f"{diagnosis.steps:,} steps, loss {losses[0]:.4g} to {losses[-1]:.4g}"


@click.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("out", "-o", "--out", required=True, type=click.Path(path_type=Path), metavar="OUT", help="A new folder.")
@place_options
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="What to prove it in, and to evaluate it in unless told otherwise.",
)
@click.pass_obj
def import_command(
    session: Session,
    folder: Path,
    out: Path,
    base: Path | None,
    parts: tuple[str, ...],
    search: tuple[Path, ...],
    precision: str,
) -> None:
    """Make a proven checkpoint OUT of a FOLDER that other code wrote, such as a LoRA run of MGM.

    What the folder names as its base and towers is looked for there, beside the folder and below --search, from any
    working directory; what is found must fit.
    """
    import shutil

    from graftwork.cli.checkpoint import parse_parts, verify_in_fresh_process
    from graftwork.cli.train import preferred_kernels
    from graftwork.diagnosis import diagnose
    from graftwork.errors import CheckpointError
    from graftwork.importing import import_folder
    from graftwork.merging import refuse_existing

    refuse_existing(out)
    console = open_console()
    diagnosis = diagnose(folder, session.catalog, base=base, parts=parse_parts(parts), search=search)
    imported = import_folder(diagnosis, session.catalog, out, precision=precision, kernels=preferred_kernels(session))
    try:
        proven = verify_in_fresh_process(session, out)
    except CheckpointError:
        shutil.rmtree(out, ignore_errors=True)
        raise
    console.print(f"[bold]{out}[/bold] is a proven checkpoint of '{folder}': {diagnosis.said}", soft_wrap=True)
    for what, place in diagnosis.places.items():
        name = "base" if what == "base" else f"{what} part"
        if what in imported.own:
            console.print(f"  {name:9}  its weights are in the checkpoint; sizes from {place.found}", soft_wrap=True)
        else:
            console.print(
                f"  {name:9}  {place.found or 'not at hand: the checkpoint holds everything'}", soft_wrap=True
            )
    held = "all that the base lacks or has otherwise" if diagnosis.places["base"].found else "the whole model"
    console.print(f"  tensors    {len(imported.manifest.tensors)}: {held}")
    console.print(
        f"  logits     differ by {proven['error']:.3g} in a fresh process; at most {proven['tolerance']:.3g} is rounding"
    )
    if proven["distance"]:
        console.print(f"  adapter    alive: it moves the logits by up to {proven['distance']:.3g}")
    else:
        console.print("  adapter    none: all that was trained is new to the base, so there is nothing to switch off")
    if diagnosis.places["base"].found:
        console.print(
            "  That the base is the very one it was trained from cannot be proven: its hash was not recorded."
        )
    for line in diagnosis.inconsistent:
        console.print(f"  noticed    {line}", style="yellow")
    if not imported.manifest.health.healthy:
        console.print(f"  {imported.manifest.health.sentence()}", style="bold red")
