"""The log of a run: a line of JSON for each logged step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from graftwork import processes
from graftwork.contracts.events import StepTaken

FILE = "log.jsonl"


class Log:
    """The log in the folder of a run; only the first process writes it."""

    def __init__(self, out: Path) -> None:
        self.file = out / FILE if processes.is_first() else Path(os.devnull)
        self.lines: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Make the folder, and empty the file of an earlier run."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if not self.lines:
            self.file.write_bytes(b"")

    def write(self, line: dict[str, Any]) -> None:
        """Add a line, unless it is there already."""
        if line in self.lines[-1:]:
            return
        self.lines.append(line)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def keep(self, step: int) -> None:
        """Drop what a killed run logged after `step`."""
        if not processes.is_first():
            return
        for text in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # The line that was being written when the run was killed.
            if line["step"] <= step:
                self.lines.append(line)
        work = self.file.with_suffix(".unfinished")
        work.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        work.replace(self.file)


LOGGED = ("step", "loss", "learning_rate", "gradient_norm", "images", "tokens", "seconds")


def line_of(step: StepTaken, skipped: bool) -> dict[str, Any]:
    """A step's line of the log."""
    return {key: getattr(step, key) for key in LOGGED} | ({"skipped": True} if skipped else {})
