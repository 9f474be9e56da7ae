"""Opening a checkpoint, and verifying it in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.contracts.lookup import Lookup
from graftwork.errors import CheckpointError
from graftwork.jobs.messages import Listener, Message, ignore

if TYPE_CHECKING:
    from graftwork.checkpoint.store import Opened


def open_for(folder: Path, lookup: Lookup, *, listen: Listener = ignore, **options: Any) -> Opened:
    """Open a checkpoint (see `open_checkpoint`), and report what is different about it."""
    from graftwork.checkpoint.store import open_checkpoint

    opened = open_checkpoint(folder, lookup, **options)
    if opened.note:
        listen(Message(opened.note, "warning"))
    return opened


def verify_in_fresh_process(folder: Path, lookup: Lookup, against: Path | None = None) -> dict[str, Any]:
    """Run `graftwork verify` on a checkpoint in another process, from another working directory; its facts.

    With `against` it is also compared with what other code makes of the folder that it was imported from. Raises
    CheckpointError with that process's message.
    """
    command = [sys.executable, "-m", "graftwork", *lookup.options()]
    compared = ["--against", str(against.resolve())] if against else []
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [*command, "verify", str(folder.resolve()), "--json", *compared],
            cwd=elsewhere,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it printed nothing"]
        raise CheckpointError(
            f"'{folder}' could not be verified in a fresh process: {lines[0].removeprefix('Error: ')}", lines[1:]
        )
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts
