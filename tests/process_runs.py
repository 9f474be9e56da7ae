"""Small runs by the command line on several processes, and what they must equal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from graftwork.checkpoint import manifest
from graftwork.checkpoint.store import checkpoints
from graftwork.config import runfile
from graftwork.config.resolve import resolve
from graftwork.train.loop import Outcome, train
from graftwork_registry import Catalog

TESTS = Path(__file__).parent
SHAPES = """
from graftwork import hookimpl
from tiny_runs import Shapes

@hookimpl
def data_sources():
    return [Shapes]
"""
RUN = """
seed = 5
[model]
use = "mgm-gemma"
weights = "{base}"
[model.parts.low]
use = "clip"
config = "{base}/low"
[model.parts.high]
use = "openclip-convnext"
config = "{base}/high"
[peft]
use = "lora"
on = ["language.attention", "language.mlp"]
also_train = ["connector"]
rank = 3
[attention]
prefer = ["sdpa"]
[[data.source]]
use = "shapes"
broken = [12]
[train]
steps = 6
batch_size = 5
micro_batch_size = 2
save_every = 4
learning_rate = 1e-2
weight_decay = 0.5
precision = "fp32"
max_length = 128
"""
"""Steps whose five records never share out evenly, one of them without any image, and one broken image."""


@dataclass
class Launched:
    """A run on several processes that is going on."""

    process: subprocess.Popen[str]

    def kill(self, rank: int) -> float:
        """Kill one of the processes; returns the seconds until all have ended."""
        ranks = {child.environ().get("RANK"): child for child in psutil.Process(self.process.pid).children()}
        others = [child for name, child in ranks.items() if name != str(rank)]
        began = time.perf_counter()
        ranks[str(rank)].send_signal(signal.SIGKILL)
        self.process.wait(timeout=60)
        assert not any(other.is_running() for other in others)
        return time.perf_counter() - began

    def output(self) -> tuple[str, str]:
        """The standard output and the standard error, once it has ended."""
        return self.process.communicate(timeout=1800)


class Runs:
    """The run file of a folder, and what the command line makes of it."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        (folder / "run.toml").write_text(RUN.format(base=base), encoding="utf-8")
        (folder / "shapes_source.py").write_text(SHAPES, encoding="utf-8")
        self.catalog = Catalog.discover(files=[folder / "shapes_source.py"])

    def start(self, *arguments: str, launcher: Sequence[str] = ("-m",)) -> Launched:
        """Start `graftwork`, by a launcher's Python arguments if need be."""
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        # No compiler's cache of this machine may help, and nothing may be put into it.
        cache = self.folder / "torch_extensions"
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(cache)}
        command = [
            sys.executable,
            *launcher,
            "graftwork",
            "--plugin",
            str(self.folder / "shapes_source.py"),
            *arguments,
        ]
        return Launched(
            subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )

    def start_training(self, out: str, processes: int, changes: Sequence[str], *options: str) -> Launched:
        """Start a training run into `out` on so many processes, with keys of the run file changed."""
        sets = [word for change in changes for word in ("--set", change)]
        return self.start("train", "run.toml", "--out", out, "--processes", str(processes), *options, *sets)

    def train(self, out: str, processes: int, changes: Sequence[str] = (), *options: str) -> str:
        """Train, which must succeed; returns what was said."""
        launched = self.start_training(out, processes, changes, *options)
        said, errors = launched.output()
        assert launched.process.returncode == 0, said + errors
        assert errors == "" and not (self.folder / "torch_extensions").exists()
        return said

    def log(self, out: str) -> list[dict[str, Any]]:
        """The log of a run."""
        return [json.loads(line) for line in (self.folder / out / "log.jsonl").read_text().splitlines()]

    def rewind(self, out: str, to: str) -> Path:
        """A copy of a run's folder without its last checkpoint."""
        copied = Path(shutil.copytree(self.folder / out, self.folder / to))
        shutil.rmtree(checkpoints(copied)[-1])
        return copied

    def train_here(self, out: str) -> Outcome:
        """Train in this process, alone."""
        plan = resolve(runfile.load(self.folder / "run.toml", ()), self.catalog)
        return train(plan, self.catalog, self.folder / out, device="cpu")

    def resume_here(self, out: Path) -> Outcome:
        """Go on with a run's plan in this process, alone."""
        return train(manifest.read(checkpoints(out)[-1]).plan, self.catalog, out, resume=True, device="cpu")


def farthest(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], key: str = "loss") -> float:
    """The largest difference between two logs, which must be of the same steps on the same records."""
    for name in ("step", "images", "tokens"):
        assert [line[name] for line in one] == [line[name] for line in other]
    return max(abs(a[key] - b[key]) for a, b in zip(one, other, strict=True))
