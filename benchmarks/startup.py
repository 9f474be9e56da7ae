"""Cold start of `graftwork list` beside an interpreter that only imports click and rich, in one run.

    python benchmarks/startup.py [--rounds 15]

The two alternate; the ratio is taken round by round.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

BARE = [sys.executable, "-c", "import click, rich.table, rich.console"]
LIST = [sys.executable, "-m", "graftwork", "list"]


def seconds(command: list[str]) -> float:
    """How long a process takes from start to end."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Print the medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    seconds(BARE), seconds(LIST)  # The first of each fills the caches of the disk.
    pairs = [(seconds(BARE), seconds(LIST)) for _ in range(rounds)]
    bare, listing = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = [ours / theirs for theirs, ours in pairs]
    print(f"click and rich: {bare:.3f} s; graftwork list: {listing:.3f} s; medians of {rounds}")
    print(f"ratio: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
