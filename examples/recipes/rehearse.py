"""Rehearses every run file here for its card, from configurations alone, and writes the tables of the READMEs. See README.md."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import graftwork
from graftwork.config.sizes import format_size

HERE = Path(__file__).parent
BEGIN, END = "<!-- rehearsed -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Rehearsed:
    """What a step of a run file takes."""

    run: Path
    strategies: str
    micro_batch: int
    images: str
    peak: str

    @property
    def line(self) -> str:
        """Its line in the table of its folder."""
        card = self.run.stem.rpartition("-")[2].removesuffix("gb")
        cells = (f"[{self.run.name}]({self.run.name})", f"{card} GB", self.strategies, self.images)
        return "| " + " | ".join((*cells, str(self.micro_batch), self.peak)) + " |\n"


def runs() -> list[Path]:
    """All run files, model by model."""
    return sorted(HERE.glob("*/*.toml"))


def rehearse(run: Path) -> Rehearsed:
    """Rehearse a run file with the largest micro-batch that fits into its budget."""
    planned = graftwork.plan(run)
    if planned.search is None or planned.search.chosen is None:
        raise SystemExit(f"{run} cannot be rehearsed: {planned.search.why if planned.search else 'nothing is trained'}")
    best = planned.search.candidates[planned.search.chosen]
    step = best.steps[-1]
    images = f"{step.shown.size}: {step.tokens - step.labels:,} of {step.tokens:,} tokens"
    return Rehearsed(run, best.name, step.micro_batch, images, format_size(step.footprint.peak))


def lines(folder: Path) -> dict[str, str]:
    """The lines of a folder's table, by run file."""
    found = re.findall(r"^\| \[.*\n", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {line[len("| [") : line.index("]")]: line for line in found}


def table(folder: Path, known: Mapping[str, str]) -> str:
    """The folder's table."""
    head = "| run file | card | memory strategies | image | at a time | peak |\n| --- | --- | --- | --- | --- | --- |\n"
    return head + "".join(known[run.name] for run in runs() if run.parent == folder and run.name in known)


def overview(folder: Path) -> str:
    """The lines of a folder's table, as the table of all models has them."""
    return "".join(f"| {folder.name} {line.replace('](', f']({folder.name}/', 1)}" for line in lines(folder).values())


def put(text: str, readme: Path) -> None:
    """Replace the table of a README."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}", encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    """Rehearse the run files of all folders, or of those that are named; with `--missing` those alone that have no line yet, as after a
    run that was stopped: each line is written as soon as it is known."""
    names = [name for name in arguments if name != "--missing"]
    for run in runs():
        folder, known = run.parent, lines(run.parent)
        if (not names or folder.name in names) and not ("--missing" in arguments and run.name in known):
            put(table(folder, known | {run.name: rehearse(run).line}), folder / "README.md")
    head = "| model | run file | card | memory strategies | image | at a time | peak |\n"
    folders = sorted({run.parent for run in runs()})
    put(head + "| --- " * 7 + "|\n" + "".join(map(overview, folders)), HERE / "README.md")


if __name__ == "__main__":
    main(sys.argv[1:])
