"""Every family tried, and docs/models.md's table of it.

As a program: `python tests/vlm_campaign.py FOLDER` tries those families that FOLDER does not hold yet of the code as it is, and writes the
table.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import vlm_trial as trial
from vlm_families import FAMILIES, UNREAD, write

from graftwork.errors import GraftworkError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "models.md"
SOURCES = ("core/**/*.py", "plugins/**/*.py", "tests/vlm_*.py")
"""What decides what comes of a family."""
BEGINS, ENDS = "<!-- families: begin -->\n", "<!-- families: end -->"
HEAD = (
    "| family | logits | answers | labels | LoRA, verified | base | merged | PEFT | rehearsal | attention |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)
Row = dict[str, Any]


def tried(name: str, work: Path) -> Row:
    """What came of one family: differences of logits, what was equal, and whose attention is computed. AssertionError where a run
    failed."""
    folder = write(name, work / "model")
    assembly, model = trial.built(folder), trial.theirs(folder)
    row: Row = {"logits": trial.logits_error(assembly, model)}
    row["answers"] = all(ours == theirs for ours, theirs in trial.answers(assembly, model))
    row["labels"] = all(
        tuple(trial.labelled(assembly, each)) == labels
        for each, labels in zip(trial.READ, FAMILIES[name].labels, strict=True)
    )
    opened = trial.trained(folder, work / "out", UNREAD.get(name, ()))
    row["verified"] = True
    row["base"] = trial.base_error(opened, model)
    row["merged"], row["peft"] = trial.exports_error(opened, model, folder, work)
    rehearsed, tracked = trial.peaks(folder)
    row["rehearsal"] = rehearsed / tracked - 1
    row["attention"] = trial.attention(folder)
    return row


def faults(row: Mapping[str, Any]) -> list[str]:
    """What of a row is not as promised."""
    wanted = {
        "logits": row["logits"] < 1e-5,
        "answers": row["answers"],
        "labels": row["labels"],
        "base": row["base"] <= 1e-6,
        "merged": row["merged"] < 1e-5,
        "peft": row["peft"] < 1e-5,
        "rehearsal": abs(row["rehearsal"]) < 0.01,
    }
    return [f"{name}: {row[name]}" for name, kept in wanted.items() if not kept]


@cache
def state() -> str:
    """Which code this is: a hash of the sources."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in SOURCES for file in ROOT.glob(pattern)):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def kept(name: str, folder: Path) -> Row:
    """What came of a family with this code, from `folder` where that holds it already."""
    file = folder / state() / f"{name}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as work:
            file.write_text(json.dumps(tried(name, Path(work))), encoding="utf-8")
    row: Row = json.loads(file.read_text(encoding="utf-8"))
    return row


def line_of(name: str, row: Mapping[str, Any]) -> str:
    """A row of the table."""

    def worded(value: Any) -> str:
        return f"{value:.0e}" if isinstance(value, float) else "equal" if value is True else str(value)

    cells = [worded(row[key]) for key in ("logits", "answers", "labels")]
    cells += ["yes", *(worded(row[key]) for key in ("base", "merged", "peft")), f"{row['rehearsal']:+.2%}"]
    own = [each for each in row["attention"] if "transformers'" in each]
    return f"| `{name}` | {' | '.join(cells)} | {'; '.join(own) or 'kernels'} |"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of all families, as Markdown."""
    return "\n".join([*HEAD, *(line_of(name, row) for name, row in rows.items()), ""])


def committed() -> str:
    """The table in docs/models.md."""
    return DOCS.read_text(encoding="utf-8").split(BEGINS)[1].split(ENDS)[0]


def main() -> None:
    """Try what is lacking, say what is not as promised, and write the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows, failed = {}, []
    for name in FAMILIES:
        try:
            rows[name] = kept(name, Path(sys.argv[1]))
            print(line_of(name, rows[name]), "; ".join(faults(rows[name])), flush=True)
        except (AssertionError, GraftworkError) as error:
            failed.append(name)
            print(f"{name} failed: {error}", flush=True)
    if failed:
        raise SystemExit(f"{', '.join(failed)}: failed, so the table stays as it was")
    before, rest = DOCS.read_text(encoding="utf-8").split(BEGINS)
    DOCS.write_text(before + BEGINS + table(rows) + ENDS + rest.split(ENDS)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
