"""Everything about speed that a CPU can show, in one run: each part of the work beside the same work done with other libraries alone.

    python benchmarks/bench.py [--json FILE] [--rounds N] [--against FILE] [GROUP …]
    python benchmarks/bench.py [--json FILE] --pages

The two take turns, and a ratio is taken round by round: above 1, Graftwork is quicker. `--against` names the JSON of an earlier run: a ratio that got
worse by more than its range is reported, and the exit status is 1. `--pages` measures nothing, and puts
the table of the JSON into the pages that show it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from parts import PARTS, spread

HERE = Path(__file__).parent
RESULT = HERE / "bench.json"
PAGES = (HERE / "README.md", HERE.parent / "docs" / "speed.md")
BEGIN, END = "<!-- bench -->\n", "<!-- end of bench -->\n"
Seconds = Callable[[], float]


@dataclass(frozen=True)
class Compared:
    """A part of the work, done in two ways."""

    what: str
    beside: str
    """What the other way is."""
    ours: Seconds
    """Carries it out, and gives the processor seconds that it took."""
    other: Seconds
    rounds: int


def parts(rounds: int, folder: Path) -> Iterator[Compared]:
    """What lies around and in a step, on one thread."""
    import torch
    from references import REFERENCES

    torch.set_num_threads(1)
    for name, reference in REFERENCES.items():
        (place := folder / name).mkdir()
        # In this order: the files that both read are made by the first.
        ours, other = PARTS[name](place), reference(place)
        told = [" ".join((each[name].__doc__ or "").split()).rstrip(".") for each in (PARTS, REFERENCES)]
        yield Compared(f"`{name}`. {told[0]}", told[1], timed(ours), timed(other), rounds)


def timed(work: Callable[[], Any]) -> Seconds:
    """The processor seconds of a call."""

    def seconds() -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    return seconds


def steps(rounds: int, folder: Path) -> Iterator[Compared]:
    """Steps of training."""
    import steps as cases
    import torch

    torch.set_num_threads(1)
    for case in cases.CASES:
        ours, other = cases.pair(case)
        yield Compared(f"a step: {case}", "`transformers.Trainer` with `peft`", ours, other, (rounds + 2) // 3)


def packing(rounds: int, folder: Path) -> Iterator[Compared]:
    """Records packed into rows."""
    import packing as rows
    import torch

    torch.set_num_threads(1)
    for name, ours, other in rows.pairs(folder):
        yield Compared("a step of 16 packed records", f"padded, {name}", ours, other, (rounds + 1) // 2)


def commands(rounds: int, folder: Path) -> Iterator[Compared]:
    """Whole commands."""
    import commands as whole

    for name, bare in whole.BARE.items():
        ours, other = whole.pair(name, folder)
        yield Compared(f"`graftwork {name}`", f"an interpreter that does `{bare}`", ours, other, (rounds + 1) // 2)


GROUPS: dict[str, Callable[[int, Path], Iterator[Compared]]] = {
    group.__name__: group for group in (parts, packing, steps, commands)
}


def measure(compared: Compared) -> dict[str, Any]:
    """Both ways in turn, after each has been done once."""
    compared.ours(), compared.other()
    pairs = [(compared.ours(), compared.other()) for _ in range(compared.rounds)]
    return {
        "what": compared.what,
        "beside": compared.beside,
        "seconds": [round(ours, 6) for ours, _ in pairs],
        "beside seconds": [round(other, 6) for _, other in pairs],
        "ratios": [round(other / max(ours, 1e-9), 4) for ours, other in pairs],
    }


def milliseconds(values: Sequence[float]) -> str:
    """The median of seconds."""
    found = statistics.median(values) * 1e3
    return f"{found:,.0f}" if found >= 100 else f"{found:.3g}"


def table(told: Mapping[str, Any]) -> str:
    """The table of a run, in Markdown."""
    packages = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    lines = [
        f"Measured on {told['begun'][:10]} on a CPU, one thread, with {packages}: medians of processor time, and the ratio with its range.\n",
        "| part | Graftwork, ms | beside | ms | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in told["parts"]:
        digits = 2 if statistics.median(row["ratios"]) < 20 else 0
        cells = (row["what"], milliseconds(row["seconds"]), row["beside"], milliseconds(row["beside seconds"]))
        lines.append(f"| {' | '.join(cells)} | {spread(row['ratios'], digits)} |")
    return "\n".join(lines) + "\n"


def with_table(page: str, made: str) -> str:
    """A page with another table between its marks."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + made + END + rest.partition(END)[2]


def worse(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """The parts whose ratio is lower than before by more than it varied then, a sentence each."""
    known = {(row["what"], row["beside"]): row["ratios"] for row in before["parts"]}
    found = []
    for row in now["parts"]:
        old, new = known.get((row["what"], row["beside"])), statistics.median(row["ratios"])
        if old and statistics.median(old) - new > max(old) - min(old):
            found.append(
                f"{row['what']}, beside {row['beside']}: the ratio was {spread(old, 2)} and is {spread(row['ratios'], 2)}"
            )
    return found


def main() -> None:
    """Measure, write and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; by default all")
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--pages", action="store_true")
    options = parser.parse_args()
    if unknown := {*options.groups} - GROUPS.keys():
        parser.error(f"there is no group '{min(unknown)}'; there are {', '.join(GROUPS)}")
    if options.pages:
        made = table(json.loads(options.json.read_text(encoding="utf-8")))
        for page in PAGES:
            page.write_text(with_table(page.read_text(encoding="utf-8"), made), encoding="utf-8")
        return
    if options.against and not options.against.is_file():
        parser.error(f"there is no file '{options.against}' to compare with; name the JSON of an earlier run")
    before = json.loads(options.against.read_text(encoding="utf-8")) if options.against else None
    warnings.filterwarnings("ignore")
    versions = {name: version(name) for name in ("graftwork", "torch", "transformers", "peft")}
    told: dict[str, Any] = {"begun": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions, "parts": []}
    for name in options.groups or GROUPS:
        with tempfile.TemporaryDirectory() as folder:
            for compared in GROUPS[name](options.rounds, Path(folder)):
                row = measure(compared)
                told["parts"].append(row)
                print(f"{row['what']}: {spread(row['ratios'], 2)} times as fast as {row['beside']}", flush=True)
                options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if before and (found := worse(told, before)):
        print("worse than before:", *found, sep="\n  ")
        sys.exit(1)


if __name__ == "__main__":
    main()
