"""The commands that take a checkpoint: inspect, verify, merge, export."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graftwork.cli import Session
from graftwork.cli.console import open_console, print_facts, print_json, progress_console
from graftwork.cli.drawing import drawing
from graftwork.cli.options import FOLDER, JSON, PRECISION, base_options, parse_parts, place_options
from graftwork.cli.printing import print_accounts, print_diagnosis, print_learned

if TYPE_CHECKING:
    from rich.console import Console

    from graftwork.checkpoint.certificate import Certificate
    from graftwork.checkpoint.manifest import Manifest
    from graftwork.jobs.checkpoint import Checkpoint
    from graftwork.jobs.importing import Inspected


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
    from graftwork.jobs import importing as jobs

    found = jobs.inspect(folder, base=base, parts=parse_parts(parts), search=search, lookup=session.catalog)
    if as_json:
        print_json(found.to_json())
    elif isinstance(found, jobs.Inspected):
        print_checkpoint(open_console(), folder, found)
    else:
        print_diagnosis(open_console(), found)


def print_checkpoint(console: Console, given: Path, found: Inspected) -> None:
    """What a checkpoint of Graftwork is; an exit status of 1 when its files are not as they were written."""
    console.print(f"[bold]{found.folder}[/bold]: a Graftwork checkpoint\n")
    print_facts(console, checkpoint_facts(found.manifest))
    print_accounts(console, found.manifest.accounts)
    if found.damage:
        console.print(f"\n[red]Not intact:[/red] {found.damage}")
        raise SystemExit(1)
    if found.learned:
        console.print()
        print_learned(console, found.learned)
    files = len(found.manifest.files)
    console.print(f"\nAll {files} files are as they were written. To verify that it works: graftwork verify {given}")


def checkpoint_facts(read: Manifest) -> list[tuple[str, str]]:
    """What a checkpoint is: labels, and a phrase for each."""
    model_spec = read.plan.model_spec
    values = sum(_size(entry.shape) for entry in read.tensors.values())
    created = read.provenance.get("created", "")
    rows = [("trained", f"{read.step} of {read.steps} steps, by Graftwork {read.graftwork}, {created}")]
    if origin := read.provenance.get("imported from"):
        steps = f"; trained there in {read.steps:,} steps" if read.steps else ""
        rows = [("imported", f"from {origin}, by Graftwork {read.graftwork}, {created}{steps}")]
    if read.began_with:
        rows.append(("began with", f"the tensors of {read.began_with}"))
    if verified := read.provenance.get("verified"):
        rows.append(("import", f"{verified} ({read.provenance['compared']})"))
    rows += [("verdict", read.health.sentence())]
    for role, choice in [("model", model_spec.model), *model_spec.parts.items()]:
        where = f", base weights '{choice.weights.given}' at {choice.weights.path}" if choice.weights else ""
        given = [f"; {key} = {json.dumps(value)}" for key, value in choice.settings.items() if value is not None]
        rows.append((role, f"{choice.name} ({choice.distribution} {choice.version}){where}{''.join(given)}"))
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
        ran = facts.get("own") or ", ".join(facts.get("ran", {})) or "nothing"
        fallbacks = f"; {'; '.join(facts['fallbacks'])}" if facts.get("fallbacks") else ""
        rows.append(
            (f"attention, {site}", f"{ran} ran in {read.golden.precision} on the {read.golden.device}{fallbacks}")
        )
    groups = ", ".join(f"{name} ({count:,})" for name, count in read.data.get("groups", {}).items())
    used = read.record_counts or f"{read.data.get('records', 0):,} records"
    rows.append(("data", f"{used}: {groups}" if groups else str(used)))
    return rows


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


@contextmanager
def open_checkpoint(
    session: Session, folder: Path, options: Mapping[str, Any], console: Console | None = None
) -> Iterator[Checkpoint]:
    """The checkpoint as a command's options say; what it reports is drawn, by default on the standard error."""
    from graftwork.jobs import checkpoint as jobs

    where = {"base": options["base"], "parts": parse_parts(options["parts"]), "device": options.get("device")}
    with drawing(console or progress_console(quiet=True)) as listen:
        yield jobs.open(folder, **where, on_event=listen, lookup=session.catalog)


@click.command()
@FOLDER
@base_options
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="What it was imported from: compare it with what peft or transformers make of that.",
)
@JSON
@click.pass_obj
def verify(session: Session, /, checkpoint: Path, against: Path | None, as_json: bool, **options: Any) -> None:
    """Rebuild CHECKPOINT from its files alone, and verify that it gives the logits that it was saved with."""
    from graftwork.jobs.verify import AWAITED, awaited

    checkpoint = awaited(session.catalog) if str(checkpoint) == AWAITED else checkpoint
    with open_checkpoint(session, checkpoint, options) as found:
        opened = found.verify(against=against)
    from graftwork.report.learning_wording import summary

    tensors, verification = opened.manifest.tensors, opened.verification
    shown = {"verified": verification.words, "undecided": verification.undecided, "compared": [*verification.compared]}
    shown |= asdict(verification) | {"learned": summary(opened.learned) if opened.learned else ""}
    if as_json:
        print_json({"checkpoint": str(opened.folder), "sha256": opened.sha256, **shown})
        return
    console = open_console()
    undecided = verification.undecided
    console.print(f"[bold]{opened.folder}[/bold]: {verification.words}.")
    console.print(f"  files     all {len(opened.manifest.files)} are as they were written")
    console.print(f"  tensors   {len(tensors)} of {len(tensors)} expected ones were loaded, none is left over")
    if undecided:
        console.print(f"  logits    {undecided.removeprefix('the logits ')}", soft_wrap=True)
    else:
        console.print(
            f"  logits    differ by {verification.error:.3g} from those recorded; at most {verification.tolerance:.3g} is rounding"
        )
    for clause in verification.compared:
        console.print(f"  compared  {clause}")
    console.print(f"  adapter   has an effect: it moves the logits by up to {verification.distance:.3g}")
    if opened.learned:
        print_learned(console, opened.learned)


@click.command()
@FOLDER
@click.argument("out", type=click.Path(path_type=Path))
@base_options
@PRECISION
@click.pass_obj
def merge(session: Session, /, checkpoint: Path, out: Path, precision: str | None, **options: Any) -> None:
    """Fold CHECKPOINT's adapter into its base, write the whole model to OUT, and certify that it is the same model."""
    with open_checkpoint(session, checkpoint, options) as opened:
        merged = opened.merge(out, precision=precision)
    console = open_console()
    console.print(f"[bold]{out}[/bold] holds the merged model, in {merged.certificate.precision}.")
    print_certificate(console, merged.certificate)
    console.print(f'  see {merged.file.name} there; use it as a base with weights = "{out}"')


def print_certificate(console: Console, certificate: Certificate) -> None:
    """What shows that a merged model equals the checkpoint."""
    console.print(
        f"  tensors   {certificate.tensors}: {certificate.changed} changed, {certificate.unchanged} as in the base, "
        f"{certificate.new} that the base lacks; none dropped"
    )
    effect = f"; the adapter moves them by {certificate.distance:.3g}" if certificate.distance else ""
    console.print(
        f"  logits    differ by {certificate.error:.3g} from the unmerged model, {certificate.tolerance:.3g} is allowed{effect}"
    )
    if certificate.share:
        console.print(f"  kept      {certificate.share}", soft_wrap=True)
    if certificate.rounded:
        console.print(f"  rounded   {certificate.rounded}", soft_wrap=True)
    if certificate.carried:
        console.print(f"  carried   {', '.join(certificate.carried)}, from the base", soft_wrap=True)
    if certificate.not_carried:
        console.print(f"  left      {', '.join(certificate.not_carried)}, in the base's folder", soft_wrap=True)


@click.command()
@FOLDER
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", "to", required=True, metavar="FORMAT", help="The format, such as 'peft' or 'mgm'.")
@base_options
@PRECISION
@click.pass_obj
def export(session: Session, /, checkpoint: Path, out: Path, to: str, precision: str | None, **options: Any) -> None:
    """Write CHECKPOINT to OUT in a format that other tools read: its adapter ('peft'), or the whole model ('mgm').

    A whole model is stored in fp32 by default, so that it can be imported again without loss.
    """
    with open_checkpoint(session, checkpoint, options) as opened:
        exported = opened.export(out, to=to, precision=precision)
    files = ", ".join(sorted(file.name for file in out.iterdir()))
    console = open_console()
    console.print(f"[bold]{out}[/bold] holds the checkpoint as '{to}': {files}")
    if exported.certificate:
        print_certificate(console, exported.certificate)
    if (read_back := exported.read_back) and read_back.reader:
        console.print(
            f"  read back by {read_back.reader}: logits differ by {read_back.error:.3g}; the adapter moves them by {read_back.distance:.3g}"
        )
    for line in exported.notes:
        console.print(f"  {line}", soft_wrap=True)
