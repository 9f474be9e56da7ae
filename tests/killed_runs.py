"""Training commands that are killed while they save, and what they leave. See benchmarks/kills.md.

As a program: `python tests/killed_runs.py FOLDER` makes those that FOLDER does not hold yet, and prints the table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from process_runs import Launched, Runs
from test_resume import content
from tiny_runs import COMPONENTS, random_base

from graftwork.checkpoint.store import checkpoints, open_checkpoint
from graftwork.checkpoint.writing import UNFINISHED
from graftwork.contracts import DictLookup

ROOT = Path(__file__).parents[1]
KILLS = 100
HOW = {
    "touch": "when a file of the run was touched for the n-th time, n drawn from 1 to 300",
    "folder": "up to 0.1 s after a hidden folder was there",
    "moment": "up to 1.5 s after training had begun",
}
TURNS = ("touch", "folder", "moment", "folder")
"""How one run is killed in turn."""
MOST_TOUCHES, MOST_SECONDS, SOON = 300, 1.5, 0.1
SETTINGS = ("train.save_every=1", "train.keep=3", "train.steps=30", "peft.dropout=0.3")
KILLER = """
import sys
from pathlib import Path
from graftwork import hookimpl
from tiny_runs import die_at

@hookimpl
def happened(event):
    if type(event).__name__ == "RunStarted":
        if touch := int(Path("touch").read_text()):
            die_at(event.out, touch)
        sys.stdout.write("begun\\n")
        sys.stdout.flush()
"""
"""A plugin that says when training begins, and lets its process be killed at the so many-th touch of a file from then on."""
TABLE = "what killed runs left"
"""The property of a test's report that holds the table."""


@dataclass(frozen=True)
class Kill:
    """One kill, and what was there then."""

    how: str
    unfinished: int
    """Hidden folders of checkpoints that were being written, or removed."""
    opened: int
    """Checkpoints with a name that were opened and verified."""
    damaged: tuple[str, ...]
    """What was wrong with others."""


@dataclass(frozen=True)
class Chain:
    """One run that was killed and resumed until it ended."""

    kills: tuple[Kill, ...]
    equal: bool
    """Whether its log, its tensors and its optimizer are, to the last bit, those of the run that nobody killed."""


class Chains:
    """Runs of one folder, with the run that all of them should equal."""

    def __init__(self, folder: Path) -> None:
        self.runs = Runs(folder, random_base(folder / "base"))
        (folder / "killer.py").write_text(KILLER, encoding="utf-8")
        self.end("whole")
        self.expected = content(folder / "whole")

    def begin(self, out: str, touch: int = 0) -> Launched:
        """Begin a run or go on with it; it is killed at a touch, unless that is 0."""
        (self.runs.folder / "touch").write_text(str(touch), encoding="utf-8")
        sets = [word for setting in SETTINGS for word in ("--set", setting)]
        command = ["train", "run.toml", "--out", out, "--device", "cpu", "--resume", *sets]
        return self.runs.start("--plugin", "killer.py", *command)

    def end(self, out: str) -> None:
        """Begin a run or go on with it to its end."""
        launched = self.begin(out)
        said, errors = launched.output()
        assert launched.process.returncode == 0, said + errors

    def kill(self, out: str, how: str, chance: random.Random) -> Kill | None:
        """Go on with a run, kill it, and open every checkpoint that it has left; None where it ended before it was killed."""
        process = self.begin(out, chance.randrange(1, MOST_TOUCHES) if how == "touch" else 0).process
        assert process.stdout
        while (line := process.stdout.readline()) and line != "begun\n":
            pass
        folder, opened, damaged = self.runs.folder / out, 0, []
        if how != "touch":
            time.sleep(chance.uniform(0, MOST_SECONDS))
            while how == "folder" and process.poll() is None and not [*folder.glob(f"{UNFINISHED}*")]:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, SOON if how == "folder" else 0))
            process.kill()
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        if process.returncode == 0:
            return None
        unfinished = len([*folder.glob(f"{UNFINISHED}*")])
        for each in checkpoints(folder):
            try:
                verified = open_checkpoint(each, DictLookup(*COMPONENTS), device="cpu").verification
                assert verified.error == 0.0, verified
                opened += 1
            except Exception as error:  # whatever it is, it is what this looks for
                damaged.append(f"{each.name}: {error!r}")
        return Kill(how, unfinished, opened, tuple(damaged))

    def chain(self, seed: int) -> Chain:
        """A run that is killed at moments that the seed draws, and then ends."""
        out, chance, kills = f"chain-{seed}", random.Random(seed), list[Kill]()
        for how in TURNS:
            if kill := self.kill(out, how, chance):
                kills.append(kill)
        self.end(out)
        (lines, tensors), (expected, wanted) = content(self.runs.folder / out), self.expected
        same = tensors.keys() == wanted.keys() and all(tensors[name].equal(wanted[name]) for name in wanted)
        shutil.rmtree(self.runs.folder / out)
        return Chain(tuple(kills), same and lines == expected)


def campaign(folder: Path) -> list[Chain]:
    """Chains until there are `KILLS`; those that `folder` holds, of this state of the code, are not repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    state, found = digest(), list[Chain]()
    with TemporaryDirectory(dir=folder) as work:
        chains = None
        while sum(len(chain.kills) for chain in found) < KILLS:
            file = folder / f"{len(found)}.json"
            known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            if known.pop("state", None) != state:
                chains = chains or Chains(Path(work))
                known = dataclasses.asdict(chains.chain(len(found)))
                file.write_text(json.dumps({"state": state, **known}), encoding="utf-8")
            kills = (Kill(**{**kill, "damaged": tuple(kill["damaged"])}) for kill in known["kills"])
            found.append(Chain(tuple(kills), known["equal"]))
    return found


def digest() -> str:
    """What identifies the code that saves and resumes."""
    folders = [ROOT / "core" / "graftwork" / name for name in ("checkpoint", "train")]
    files = [Path(__file__), *sorted(file for folder in folders for file in folder.glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def table(found: list[Chain]) -> Iterator[str]:
    """Lines of Markdown: for each way to kill, what was left."""
    yield "| killed | kills | of them while a checkpoint was written or removed | checkpoints opened and verified | damaged |"
    yield "| --- | --- | --- | --- | --- |"
    for how, what in HOW.items():
        kills = [kill for chain in found for kill in chain.kills if kill.how == how]
        busy, opened = sum(bool(kill.unfinished) for kill in kills), sum(kill.opened for kill in kills)
        yield f"| {what} | {len(kills)} | {busy} | {opened} | {sum(len(kill.damaged) for kill in kills)} |"
    equal = sum(chain.equal for chain in found)
    yield ""
    yield f"Of {len(found)} runs that were killed so, resumed and ended, {equal} equal the one that nobody killed, to the last bit."


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = campaign(Path(sys.argv[1]))
    sys.stdout.write("\n".join(table(results)) + "\n")
