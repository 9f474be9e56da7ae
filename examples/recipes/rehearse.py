"""Rehearses every run file here for its card, from configurations alone, and writes the tables of the READMEs. See README.md."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
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
        return "| " + " | ".join((*cells, str(self.micro_batch), self.peak)) + " |"


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
    size = " x ".join(map(str, step.shown.sizes[0])) if step.shown.what else "any size"
    images = f"{size}: {step.tokens - step.labels:,} of {step.tokens:,} tokens"
    return Rehearsed(run, best.name, step.micro_batch, images, format_size(step.footprint.peak))


def table(rows: Sequence[Rehearsed]) -> str:
    """A folder's table."""
    head = "| run file | card | memory strategies | image | at a time | peak |\n| --- | --- | --- | --- | --- | --- |\n"
    return head + "".join(f"{row.line}\n" for row in rows)


def overview(folder: Path) -> str:
    """The lines of a folder's table, as the table of all models has them."""
    lines = re.findall(r"^\| \[.*", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return "".join(f"| {folder.name} {line.replace('](', f']({folder.name}/', 1)}\n" for line in lines)


def put(text: str, readme: Path) -> None:
    """Replace the table of a README."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}", encoding="utf-8")


def main(names: Sequence[str]) -> None:
    """Rehearse all folders, or those that are named."""
    folders = sorted({run.parent for run in runs()})
    for folder in folders:
        if not names or folder.name in names:
            put(table([rehearse(run) for run in runs() if run.parent == folder]), folder / "README.md")
    head = "| model | run file | card | memory strategies | image | at a time | peak |\n"
    put(head + "| --- " * 7 + "|\n" + "".join(map(overview, folders)), HERE / "README.md")


if __name__ == "__main__":
    main(sys.argv[1:])
