"""The command `import`: a checkpoint made of a folder that other code wrote."""

from __future__ import annotations

from pathlib import Path

import click

from graftwork.cli import Session
from graftwork.cli.console import open_console
from graftwork.cli.options import parse_parts, place_options


@click.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("out", "-o", "--out", required=True, type=click.Path(path_type=Path), metavar="OUT", help="A new folder.")
@place_options
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="What to verify it in, and to evaluate it in by default.",
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
    """Make a checkpoint OUT of a FOLDER that other code wrote, such as a LoRA run of MGM, and verify it against that code where it is
    installed, such as peft.

    What the folder names as its base and towers is looked for there, beside the folder and below --search, from any
    working directory; what is found must fit.
    """
    from graftwork.jobs import importing as jobs

    result = jobs.import_folder(
        folder,
        out,
        base=base,
        parts=parse_parts(parts),
        search=search,
        precision=precision,
        lookup=session.catalog,
    )
    console, diagnosis, imported, facts = open_console(), result.diagnosis, result.imported, result.verification
    undecided = facts["undecided"]
    console.print(
        f"[bold]{out}[/bold] is a checkpoint of '{folder}', {diagnosis.description}: {result.verified}", soft_wrap=True
    )
    for what, place in diagnosis.places.items():
        name = "base" if what == "base" else f"{what} part"
        if what in imported.stored_parts:
            console.print(f"  {name:9}  its weights are in the checkpoint; sizes from {place.found}", soft_wrap=True)
        else:
            console.print(f"  {name:9}  {place.found or 'not found: the checkpoint holds everything'}", soft_wrap=True)
    held = "all that the base lacks or that differs from it" if diagnosis.places["base"].found else "the whole model"
    console.print(f"  tensors    {len(imported.manifest.tensors)}: {held}")
    for line in result.not_taken:
        console.print(f"  noticed    {line}", style="yellow", soft_wrap=True)
    if undecided:
        console.print(f"  logits     {undecided.removeprefix('the logits ')}", soft_wrap=True)
    else:
        console.print(
            f"  logits     differ by {facts['error']:.3g} in a fresh process; at most {facts['tolerance']:.3g} is rounding"
        )
    for clause in facts["compared"]:
        console.print(f"  compared   {clause}", soft_wrap=True)
    if facts["distance"]:
        console.print(f"  adapter    has an effect: it moves the logits by up to {facts['distance']:.3g}")
    else:
        console.print("  adapter    none: all that was trained is new to the base, so there is nothing to disable")
    if diagnosis.places["base"].found:
        console.print("  That the base is the one it was trained from cannot be verified: its hash was not recorded.")
    for line in diagnosis.inconsistent:
        console.print(f"  noticed    {line}", style="yellow")
    if not imported.manifest.health.healthy:
        console.print(f"  {imported.manifest.health.sentence()}", style="bold red")
