"""The commands that take a checkpoint: inspect, verify, merge, export."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graftwork.cli import Session
from graftwork.cli.console import open_console, print_facts, print_json, progress_console
from graftwork.cli.drawing import drawing
from graftwork.cli.options import FOLDER, JSON, PRECISION, base_options, parse_parts, place_options
from graftwork.cli.printing import print_diagnosis
from graftwork.errors import CheckpointError

if TYPE_CHECKING:
    from rich.console import Console

    from graftwork.checkpoint.manifest import Manifest
    from graftwork.checkpoint.merging import Certificate
    from graftwork.checkpoint.store import Opened


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@place_options
@JSON
@click.pass_obj
def inspect(
    session: Session,
    folder: Path,
    base: Path | None,
    parts: tuple[str, ...],
    search: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Show what FOLDER is, without loading it.

    FOLDER can be a checkpoint, or what other code left: an adapter, a stage-1 run, a whole model. Then it also shows
    what is missing, what is inconsistent, and which command makes a checkpoint of it. --base, --part and --search say where
    the weights are that such a folder names.
    """
    from graftwork.checkpoint import manifest
    from graftwork.checkpoint.store import checkpoints
    from graftwork.foreign.diagnosis import diagnose

    console = open_console()
    if not (folder / manifest.FILE).is_file() and not any((c / manifest.FILE).is_file() for c in checkpoints(folder)):
        diagnosis = diagnose(folder, session.catalog, base=base, parts=parse_parts(parts), search=search)
        if as_json:
            print_json(diagnosis.to_json())
        else:
            print_diagnosis(console, diagnosis)
        return
    print_checkpoint(console, folder, as_json)


def print_checkpoint(console: Console, given: Path, as_json: bool) -> None:
    """What a checkpoint of Graftwork is; an exit status of 1 when its files are not as they were written."""
    from graftwork.checkpoint import manifest
    from graftwork.checkpoint.store import newest

    folder = newest(given)
    read = manifest.read(folder)
    if as_json:
        print_json(asdict(read))
        return
    console.print(f"[bold]{folder}[/bold]: a Graftwork checkpoint\n")
    print_facts(console, checkpoint_facts(read))
    try:
        manifest.check_files(read, folder)
    except CheckpointError as error:
        console.print(f"\n[red]Not intact:[/red] {error.sentence}")
        raise SystemExit(1) from None
    console.print(
        f"\nAll {len(read.files)} files are as they were written. To verify that it works: graftwork verify {given}"
    )


def checkpoint_facts(read: Manifest) -> list[tuple[str, str]]:
    """What a checkpoint is: labels, and a phrase for each."""
    model_spec = read.plan.model_spec
    values = sum(_size(entry.shape) for entry in read.tensors.values())
    created = read.provenance.get("created", "")
    rows = [("trained", f"{read.step} of {read.steps} steps, by Graftwork {read.graftwork}, {created}")]
    if origin := read.provenance.get("imported from"):
        steps = f"; trained there in {read.steps:,} steps" if read.steps else ""
        rows = [("imported", f"from {origin}, by Graftwork {read.graftwork}, {created}{steps}")]
    rows += [("verdict", read.health.sentence())]
    for role, choice in [("model", model_spec.model), *model_spec.parts.items()]:
        where = f", base weights '{choice.weights.given}' at {choice.weights.path}" if choice.weights else ""
        rows.append((role, f"{choice.name} ({choice.distribution} {choice.version}){where}"))
    if model_spec.peft:
        settings = ", ".join(f"{key} = {json.dumps(value)}" for key, value in model_spec.peft.settings.items())
        rows.append(
            ("method", f"{model_spec.peft.name} on {', '.join(model_spec.on)}" + (f"; {settings}" if settings else ""))
        )
    if model_spec.also_train:
        rows.append(("also trained", ", ".join(model_spec.also_train)))
    if read.newly_initialised:
        rows.append(
            (
                "not in the base",
                f"{', '.join(read.newly_initialised)} (disabling the adapter leaves these as trained)",
            )
        )
    share = read.counts["trained"] / read.counts["total"]
    rows.append(("parameters", f"{read.counts['trained']:,} trained of {read.counts['total']:,} ({share:.2%})"))
    rows.append(("holds", f"{len(read.tensors)} tensors with {values:,} values"))
    rows.append(
        (
            "adapter",
            f"moves the golden inputs' logits by up to {read.golden.distance:.3g} (largest logit {read.golden.largest:.3g})",
        )
    )
    for site, facts in read.attention.items():
        ran = ", ".join(facts.get("ran", {})) or "nothing"
        fallbacks = f"; {'; '.join(facts['fallbacks'])}" if facts.get("fallbacks") else ""
        rows.append(
            (f"attention, {site}", f"{ran} ran in {read.golden.precision} on the {read.golden.device}{fallbacks}")
        )
    groups = ", ".join(f"{name} ({count:,})" for name, count in read.data.get("groups", {}).items())
    rows.append(("data", f"{read.data.get('records', 0):,} records" + (f": {groups}" if groups else "")))
    return rows


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def open_for(session: Session, folder: Path, base: Path | None, parts: tuple[str, ...], **options: Any) -> Opened:
    """Open a checkpoint as a command's options say; what differs from the recorded run goes to the standard error."""
    from graftwork.jobs import verify as jobs

    with drawing(progress_console(quiet=True)) as listen:
        where = {"base": base, "parts": parse_parts(parts)}
        return jobs.open_for(folder, session.catalog, listen=listen, **where, **options)


@click.command()
@FOLDER
@base_options
@JSON
@click.pass_obj
def verify(session: Session, checkpoint: Path, base: Path | None, parts: tuple[str, ...], as_json: bool) -> None:
    """Rebuild CHECKPOINT from its files alone, and verify that it gives the logits that it was saved with."""
    opened = open_for(session, checkpoint, base, parts, as_trained=True)
    facts = {"checkpoint": str(opened.folder), "sha256": opened.sha256, **asdict(opened.verification)}
    if as_json:
        print_json(facts)
        return
    console = open_console()
    tensors, verification = opened.manifest.tensors, opened.verification
    console.print(f"[bold]{opened.folder}[/bold] is verified.")
    console.print(f"  files     all {len(opened.manifest.files)} are as they were written")
    console.print(f"  tensors   {len(tensors)} of {len(tensors)} expected ones were loaded, none is left over")
    if verification.comparable:
        console.print(
            f"  logits    differ by {verification.error:.3g} from those recorded; at most {verification.tolerance:.3g} is rounding"
        )
    else:
        console.print(
            "  logits    not comparable: the precision, the device or the quantized weights are not the recorded ones"
        )
    console.print(f"  adapter   has an effect: it moves the logits by up to {verification.distance:.3g}")


@click.command()
@FOLDER
@click.argument("out", type=click.Path(path_type=Path))
@base_options
@PRECISION
@click.pass_obj
def merge(
    session: Session, checkpoint: Path, out: Path, base: Path | None, parts: tuple[str, ...], precision: str | None
) -> None:
    """Fold CHECKPOINT's adapter into its base, write the whole model to OUT, and certify that it is the same model."""
    from graftwork.checkpoint.merging import CERTIFICATE, refuse_existing
    from graftwork.checkpoint.merging import merge as merge_opened

    refuse_existing(out)
    opened = open_for(session, checkpoint, base, parts, device="cpu", precision="fp32")
    certificate = merge_opened(opened, out, session.catalog, precision=precision)
    console = open_console()
    console.print(f"[bold]{out}[/bold] holds the merged model, in {certificate.precision}.")
    print_certificate(console, certificate)
    console.print(f'  see {CERTIFICATE} there; use it as a base with weights = "{out}"')


def print_certificate(console: Console, certificate: Certificate) -> None:
    """What shows that a merged model equals the checkpoint."""
    console.print(
        f"  tensors   {certificate.tensors}: {certificate.changed} changed, {certificate.unchanged} as in the base, "
        f"{certificate.new} that the base lacks; none dropped"
    )
    console.print(
        f"  logits    differ by {certificate.error:.3g} from the unmerged model; at most {certificate.tolerance:.3g} is rounding"
    )


@click.command()
@FOLDER
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", "to", required=True, metavar="FORMAT", help="The format, such as 'peft' or 'mgm'.")
@base_options
@PRECISION
@click.pass_obj
def export(
    session: Session,
    checkpoint: Path,
    out: Path,
    to: str,
    base: Path | None,
    parts: tuple[str, ...],
    precision: str | None,
) -> None:
    """Write CHECKPOINT to OUT in a format that other tools read: its adapter ('peft'), or the whole model ('mgm').

    A whole model is stored in fp32 by default, so that it can be imported again without loss.
    """
    from graftwork.checkpoint.merging import export as export_opened

    opened = open_for(session, checkpoint, base, parts, device="cpu", precision="fp32")
    certificate = export_opened(opened, to, out, session.catalog, precision=precision or "fp32")
    files = ", ".join(sorted(file.name for file in out.iterdir()))
    console = open_console()
    console.print(f"[bold]{out}[/bold] holds the checkpoint as '{to}': {files}")
    if certificate:
        print_certificate(console, certificate)
