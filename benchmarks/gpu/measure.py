"""What a GPU has to show: whether all works on it, needs the memory that was predicted, and is fast.

    python benchmarks/gpu/measure.py [--seconds 840] [--out gpu-out] [--tiny] [CHECK …]

The checks are carried out in the order of their worth, each in a process of its own with a limit, until the seconds are up. After each, `measure.json` in
the folder holds all that was found so far; one that fails or hangs stops none of the others. `--tiny` takes tiny models, on a CPU where there is no GPU. No network
is used, and no weights: models are drawn at random from the configurations in `examples`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


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


def run(check: Check, out: Path, limit: float, tiny: bool) -> dict[str, Any]:
    """A check in a process of its own; how it ended, and what it found before."""
    file, began = out / f"{check.name.replace(' ', '-')}.json", time.monotonic()
    file.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--check",
        check.name,
        "--seconds",
        str(limit),
        "--out",
        str(out),
    ]
    process = subprocess.Popen([*command, "--tiny"] if tiny else command, start_new_session=True)
    try:
        # A check ends by itself before its limit; this is for one that hangs.
        ended = {0: "done"}.get(process.wait(timeout=limit + 15), "failed")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it has started
        process.wait()
        ended = "killed at its limit"
    found = json.loads(file.read_text()) if file.exists() else {}
    return {"ended": ended, "seconds": round(time.monotonic() - began, 1), "found": found}


def carry_out(name: str, out: Path, limit: float, tiny: bool) -> None:
    """A check, in its process."""
    from report import Report
    from subject import Size

    (check,) = (each for each in CHECKS if each.name == name)
    report = Report(out / f"{name.replace(' ', '-')}.json", limit)
    getattr(importlib.import_module(check.module), check.function)(Size(tiny), report)


def main() -> None:
    """Carry out the checks that are named, by default all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(check.name for check in CHECKS)}")
    parser.add_argument("--seconds", type=float, default=840)
    parser.add_argument("--out", type=Path, default=Path("gpu-out"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.check:
        carry_out(options.check, options.out, options.seconds, options.tiny)
        return
    if unknown := {*options.checks} - {check.name for check in CHECKS}:
        parser.error(f"there is no check '{min(unknown)}'; there are {', '.join(check.name for check in CHECKS)}")
    ends = time.monotonic() + options.seconds
    told: dict[str, Any] = {
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "tiny": options.tiny,
        "checks": {},
    }
    for check in CHECKS:
        if options.checks and check.name not in options.checks:
            continue
        left = ends - time.monotonic()
        print(f"{check.name}: {left:.0f} s are left", flush=True)
        told["checks"][check.name] = (
            {"ended": "left out", "seconds": 0, "found": {}}
            if left < 20
            else run(check, options.out, min(check.seconds, left), options.tiny)
        )
        (options.out / "measure.json").write_text(json.dumps(told, indent=1))
    print(f"written: {options.out / 'measure.json'}; python benchmarks/gpu/table.py makes tables of it")


if __name__ == "__main__":
    main()
