"""Carries out the task in `task.json` of the working directory: `check` operators, or `run` them on `rows.jsonl`.

The outcome is `result.json`: what is wrong with the operators, or the sentence of what went wrong with the run. Of a run, the rows as
the operators left them are in the file that the outcome names.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from . import guard
from .checking import check
from .duplicates import drop_duplicates
from .engines import CannotRun, chunks_of, local, on_ray
from .judging import FATAL, limits_of


def main() -> None:
    """Carry out the task; what fails, fails with a sentence."""
    folder = Path.cwd()
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    outcome: dict[str, Any]
    try:
        outcome = _carry_out(task, folder)
    except CannotRun as error:
        outcome = {"error": str(error)}
    except guard.InstallRefused as error:
        outcome = {"error": f"an operator wanted to install {error}, which is never done: pip install {error} yourself"}
    except guard.NotAllowed as error:
        outcome = {"error": f"an operator was stopped: {error}"}
    except OSError as error:
        if error.errno not in FATAL:
            raise
        sys.exit(error.errno)  # Where nothing can be written, the status is all that can be said.
    (folder / "result.json").write_text(json.dumps(outcome), encoding="utf-8")


def _carry_out(task: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    guard.install()
    try:
        registry = guard.import_data_juicer().modules
        from data_juicer import __version__
    except ImportError as error:
        raise CannotRun(f"Data-Juicer is not installed in it, or not whole ({error})") from None
    if problems := check(task["steps"]):
        return {"problems": problems}
    if task["mode"] == "check":
        return {"problems": []}
    for step in task["steps"]:
        step["limits"] = limits_of(registry[step["op"]], step["params"])
    return {"version": __version__, "rows": str(_run(task, folder))}


def _run(task: Mapping[str, Any], folder: Path) -> Path:
    """Pass the rows through all steps, and return the file that holds them in the end."""
    rows = folder / "rows.jsonl"
    with (on_ray if task["engine"] == "ray" else local)(task) as begin:
        for number, steps in enumerate(_stages(task["steps"])):
            out = folder / f"rows-{number}.jsonl"
            if steps[0]["duplicates"]:
                drop_duplicates(steps[0], rows, out)
            else:
                with (
                    begin(steps) as work,
                    rows.open(encoding="utf-8") as read,
                    out.open("w", encoding="utf-8") as written,
                ):
                    written.writelines(work(chunks_of(read)))
            rows.unlink()
            rows = out
    return rows


def _stages(steps: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The steps, those together that look at one row at a time."""
    for duplicates, group in groupby(steps, lambda step: bool(step["duplicates"])):
        found = list(group)
        yield from ([step] for step in found) if duplicates else [found]


def _end_with_parent(folder: Path) -> None:
    """Wait for the end of the input, which says that Graftwork is gone, and then end this group of processes."""
    while os.read(sys.stdin.fileno(), 64):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
