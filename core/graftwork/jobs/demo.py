"""The demo: a run file and base weights that ship with the project, and all of the job on them."""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from os import PathLike
from pathlib import Path

from graftwork.checkpoint.merging import refuse_existing
from graftwork.contracts.lookup import Lookup
from graftwork.jobs.messages import Listener, Message, ignore
from graftwork.jobs.results import TrainResult
from graftwork.jobs.run import load_run
from graftwork.jobs.train import train


def demo(out: str | PathLike[str], *, on_event: Listener = ignore, lookup: Lookup | None = None) -> TrainResult:
    """Copy the demo into the new folder `out`, and carry it out there."""
    out = Path(out)
    refuse_existing(out)
    with as_file(files("graftwork_demo")) as source:
        shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    on_event(Message(f"{out} holds the run file demo.toml and the base weights that it names; change it and run"))
    on_event(Message(f"  graftwork train {out / 'demo.toml'} --out {out / 'mine'}\n"))
    return train(load_run(out / "demo.toml"), on_event=on_event, lookup=lookup)
