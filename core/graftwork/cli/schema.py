"""`graftwork schema`: the JSON Schema of run files, for editors."""

from __future__ import annotations

from pathlib import Path

import click

from graftwork.cli import Session
from graftwork.cli.console import print_json


@click.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write it to a file.")
@click.pass_obj
def schema(session: Session, output: Path | None) -> None:
    """Write the JSON Schema of the run files that the installed components allow.

    Editors complete and check run files by it; Taplo, for one, by a first line `#:schema run.schema.json`.
    """
    import json

    from graftwork.jobs.catalogue import run_file_schema

    described = run_file_schema(session.catalog)
    if output is None:
        print_json(described)
    else:
        output.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
