"""What a GPU has to show: whether all works on it, needs the memory that was predicted, and is fast.

    python benchmarks/gpu/measure.py [--seconds 540] [--out gpu-out] [--tiny] [CHECK …]

The checks are carried out in the order of their worth, each in a process of its own with a limit, until the seconds are up; one that fails or hangs stops none of
the others. After each case, `measure.json` in the folder, by default that which the environment variable OUT names, holds all that was found so far, and another call
with the same folder goes on with what it lacks; checks that are named are carried out anew. `--tiny` takes tiny models, on a CPU where there is no GPU. No network is
used, and no weights: models are drawn at random from the configurations in `examples`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import kept


@dataclass(frozen=True)
class Check:
    """A check: a function `check(size, report)` in the module of that name."""

    name: str
    module: str
    function: str
    seconds: int
    """Its limit."""


CHECKS = (
    Check("ceilings", "working", "ceilings", 40),
    Check("tests", "working", "tests", 90),
    Check("job", "working", "job", 80),
    Check("memory", "memory", "memory", 110),
    Check("speed", "speed", "speed", 90),
    Check("peer", "speed", "peer", 70),
    Check("changes", "speed", "changes", 100),
    Check("answers", "answering", "answers", 50),
    Check("vlm memory", "memory", "vlm_memory", 60),
    Check("vlm speed", "speed", "vlm_speed", 60),
    Check("vlm peer", "speed", "vlm_peer", 45),
    Check("vlm answers", "answering", "vlm_answers", 45),
)

LEAST = 20
"""With fewer seconds left no check is begun."""


def run(check: Check, file: Path, limit: float, tiny: bool) -> str:
    """Carry out a check in a process of its own, which ends with this one; returns how it ended."""
    command = [sys.executable, "-W", "ignore", __file__, "--check", check.name, *(["--tiny"] if tiny else [])]
    command += ["--seconds", str(limit), "--out", str(file.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        try:
            # A check ends by itself before its limit; this is for one that hangs.
            return "done" if process.wait(timeout=limit + 15) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "killed at its limit"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                wait_for_memory()


def wait_for_memory() -> None:
    """Wait until nobody computes on the device, for 5 seconds at most: the memory of a process that was killed is free only a moment later."""
    ask, ends = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"], time.monotonic() + 5
    with contextlib.suppress(FileNotFoundError, subprocess.TimeoutExpired):
        while time.monotonic() < ends and subprocess.run(ask, capture_output=True, timeout=5).stdout.strip():
            time.sleep(0.5)


def carry_out(name: str, file: Path, limit: float, tiny: bool) -> None:
    """A check, whose cases go into the file, which has its entry already."""
    from report import Report
    from subject import Size

    (check,) = (each for each in CHECKS if each.name == name)
    getattr(importlib.import_module(check.module), check.function)(Size(tiny), Report(file, name, limit))


def end_with_parent() -> None:
    """Kill this process and all that it has started as soon as nobody holds the other end of its input, however that came."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def carry_out_all(checks: Sequence[Check], file: Path, seconds: float, tiny: bool, *, anew: bool) -> None:
    """Checks one after the other, `anew` or from where an earlier call ended, until the seconds are up."""
    ends = time.monotonic() + seconds
    told = {"begun": datetime.now(UTC).isoformat(timespec="seconds"), "tiny": tiny, "checks": {}} | kept.read(file)
    for check in checks:
        entry = told["checks"].get(check.name)
        if anew or not entry:
            told["checks"][check.name] = {"ended": "left out", "seconds": 0.0, "found": {}}
        elif entry["ended"] == "begun":  # The command was killed, so the case that did not end is not to blame.
            entry["found"] = {case: value for case, value in entry["found"].items() if value != kept.UNFINISHED}
    kept.write(file, told)
    for check in checks:
        left, began, entry = ends - time.monotonic(), time.monotonic(), told["checks"][check.name]
        if left < LEAST or not kept.missing(entry):
            continue
        print(f"{check.name}: {left:.0f} s are left", flush=True)
        kept.update(file, check.name, ended="begun")
        ended = run(check, file, min(check.seconds, left), tiny)
        kept.update(file, check.name, ended=ended, seconds=round(entry["seconds"] + time.monotonic() - began, 1))


def main() -> None:
    """Carry out the checks that are named, by default all that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(check.name for check in CHECKS)}")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-out")))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    options = parser.parse_args()
    file = options.out / "measure.json"
    if options.check:
        end_with_parent()
        carry_out(options.check, file, options.seconds, options.tiny)
        return
    if unknown := {*options.checks} - {check.name for check in CHECKS}:
        parser.error(f"there is no check '{min(unknown)}'; there are {', '.join(check.name for check in CHECKS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    if kept.read(file).get("tiny", options.tiny) != options.tiny:
        parser.error(f"{file} has models of another size; choose another --out")
    chosen = [check for check in CHECKS if not options.checks or check.name in options.checks]
    carry_out_all(chosen, file, options.seconds, options.tiny, anew=bool(options.checks))
    print(f"written: {file}; python benchmarks/gpu/table.py makes tables of it")
    if lacking := [name for name, entry in kept.read(file)["checks"].items() if kept.missing(entry)]:
        print(f"not whole: {', '.join(lacking)}; another call with --out {options.out} goes on with them")


if __name__ == "__main__":
    main()
