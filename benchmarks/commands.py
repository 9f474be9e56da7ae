"""Commands as processes of their own, beside an interpreter that imports the libraries which they need."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

DEMO = Path(__file__).parents[1] / "examples" / "demo-base" / "demo.toml"
GRAFTWORK = [sys.executable, "-W", "ignore", "-m", "graftwork"]
BARE = {
    "list": "import click, rich.table, rich.console",
    "ask": "import torch, transformers, peft",
    "verify": "import torch, transformers, peft",
}
"""What a command needs at least."""


def children() -> float:
    """The processor seconds of this process's children that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds(command: Sequence[str]) -> float:
    """The processor seconds of a process, on one thread."""
    before = children()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([*command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    return children() - before


def checkpoint(folder: Path) -> Path:
    """A checkpoint of forty steps on the demo's model, and an image to ask about."""
    Image.new("RGB", (64, 64), "teal").save(folder / "image.png")
    options = ["train.epochs=1", "train.batch_size=8", "evaluate={}", "data.source.0.limit=320"]
    changes = [option for change in options for option in ("--set", change)]
    seconds([*GRAFTWORK, "train", str(DEMO), "--out", str(folder / "run"), *changes])
    return folder / "run" / "checkpoint-40"


def pair(name: str, folder: Path) -> tuple[Callable[[], float], Callable[[], float]]:
    """A command of Graftwork's, and the bare interpreter: what gives the seconds of one."""
    arguments = [name]
    if name != "list":
        found = folder / "run" / "checkpoint-40"
        arguments.append(str(found if found.exists() else checkpoint(folder)))
    if name == "ask":
        arguments += [str(folder / "image.png"), "what colour is it?"]
    return (
        lambda: seconds([*GRAFTWORK, *arguments]),
        lambda: seconds([sys.executable, "-W", "ignore", "-c", BARE[name]]),
    )
