"""Opening a checkpoint, and verifying it in a fresh process, which may be started before the checkpoint is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import processes
from graftwork.contracts.events import StepTaken
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.plan import Plan
from graftwork.errors import CheckpointError
from graftwork.jobs.messages import Listener, Message, ignore

if TYPE_CHECKING:
    from graftwork.checkpoint.store import Opened

AWAITED = "<standard input>"
"""In the place of a checkpoint's folder: it is named on standard input (see `awaited`)."""
LEAD_SECONDS = 30.0
"""How long before the expected end of training a process starts: its imports take seconds to half a minute on a busy machine."""


def open_for(folder: Path, lookup: Lookup, *, listen: Listener = ignore, **options: Any) -> Opened:
    """Open a checkpoint (see `open_checkpoint`), and report what is different about it."""
    from graftwork.checkpoint.store import open_checkpoint

    opened = open_checkpoint(folder, lookup, **options)
    if opened.note:
        listen(Message(opened.note, "warning"))
    return opened


class FreshProcess:
    """`graftwork verify` for one checkpoint, in another process and another working directory; of the model that was trained
    it knows nothing but what is on the disk.

    It may be started as soon as the plan is known: then it imports what the plan needs, and waits for the folder's name. It ends with this
    object, and with this process, however that ends.
    """

    def __init__(self, lookup: Lookup, against: Path | None = None) -> None:
        """`against` is the folder that the checkpoint was imported from, to compare with what other code makes of it."""
        self.lookup, self.against = lookup, against
        self._folder = tempfile.TemporaryDirectory()
        self.process: subprocess.Popen[str] | None = None
        """None before it is started."""

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        self._folder.cleanup()

    def _end(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()

    def start(self, plan: Plan | None = None) -> None:
        """Start it, once; with a `plan` it imports beforehand what that needs."""
        if self.process and self.process.poll() is None:
            return
        self._end()  # It ended before it was asked.
        compared = ["--against", str(self.against.resolve())] if self.against else []
        command = [sys.executable, "-m", "graftwork", *self.lookup.options(), "verify", AWAITED, "--json", *compared]
        self.process = subprocess.Popen(
            command,
            cwd=self._folder.name,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # A signal for this command is no reason to say anything there.
        )
        assert self.process.stdin
        with suppress(BrokenPipeError):  # It has failed already, and says why when it is asked.
            print(json.dumps([os.getpid(), plan and plan.to_json()]), file=self.process.stdin, flush=True)

    def starting(self, plan: Plan, listen: Listener) -> Listener:
        """A listener that also starts it shortly before a run is expected to take its last step."""

        def heard(event: object) -> None:
            if (
                not self.process
                and isinstance(event, StepTaken)
                and (event.steps - event.step) * event.seconds < LEAD_SECONDS
            ):
                self.start(plan)
            listen(event)

        return heard if processes.is_first() else listen

    def verify(self, folder: Path) -> dict[str, Any]:
        """What `graftwork verify` finds out about a checkpoint. Raises CheckpointError with its message."""
        self.start()
        assert self.process
        said, errors = self.process.communicate(f"{json.dumps(str(folder.resolve()))}\n")
        if self.process.returncode:
            lines = errors.strip().splitlines() or ["it printed nothing"]
            raise CheckpointError(
                f"'{folder}' could not be verified in a fresh process: {lines[0].removeprefix('Error: ')}", lines[1:]
            )
        facts: dict[str, Any] = json.loads(said)
        return facts


def awaited(lookup: Lookup) -> Path:
    """The folder that `FreshProcess.verify` names; meanwhile what the plan needs is imported. Exits where whoever would name it has ended."""
    parent, given = json.loads(sys.stdin.readline() or "[0, null]")
    processes.end_with(parent)
    with suppress(Exception):  # Whatever is wrong, opening the checkpoint says so.
        if given and (plan := Plan.from_json(given)):
            from graftwork.build import compose

            compose.build_shape(plan, lookup)
    named = sys.stdin.readline()
    if not named:
        raise SystemExit(1)
    return Path(json.loads(named))
