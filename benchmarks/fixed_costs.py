"""What a run costs besides its steps, beside another version of the project: ratios of wall-clock time.

    python benchmarks/fixed_costs.py --other-tree FOLDER [--rounds 5] [PART …]

`saving` is how long a step waits for the checkpoint before it, and what the steps take in all, where every second step is saved; `verification` is from the last step to
the verdict of the fresh process. Each measurement is a process of its own, and the two versions take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from parts import spread, tree_on_path

WHOLE = {"peft": {"use": "full", "on": ["language"]}}
SIZE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 16384}


def saving(folder: Path) -> dict[str, float]:
    """Twelve steps of a whole language model whose weights and optimizer's state come to more than 100 MB, every second one saved."""
    import memory

    from graftwork.contracts import StepTaken
    from graftwork.train.loop import train
    from graftwork_registry import Catalog

    memory.SIZES["saving"] = SIZE
    catalog, steps = Catalog.discover(), 12
    train_settings = {"train.steps": steps, "train.batch_size": 8, "train.save_every": 2, "train.keep": 2}
    plan = memory.make_plan(folder, catalog, "saving", 64, WHOLE | train_settings)
    taken: list[tuple[float, float]] = []

    def listen(event: Any) -> None:
        if isinstance(event, StepTaken):
            taken.append((time.perf_counter(), event.seconds))

    train(plan, catalog, folder / "out", device="cpu", listen=listen)
    bytes_saved = sum(file.stat().st_size for file in (folder / "out" / f"checkpoint-{steps}").rglob("*.safetensors"))
    waits = [after - before - seconds for (before, _), (after, seconds) in pairwise(taken)]
    return {
        "a step's wait for a save, s": statistics.median(waits[3::2]),  # Of the first one more is done.
        "from the first step to the last, s": taken[-1][0] - taken[0][0],
        "MB of a checkpoint": bytes_saved / 1e6,
    }


def verification(folder: Path) -> dict[str, float]:
    """A run of the demo's tiny model, long enough for the other process to import what it needs."""
    import graftwork
    from graftwork.contracts import StepTaken

    base = Path(__file__).parents[1] / "examples" / "demo-base" / "base"
    towers = {"low": {"use": "clip", "config": str(base / "low")}}
    towers["high"] = {"use": "openclip-convnext", "config": str(base / "high")}
    run = {
        "seed": 1,
        "model": {"use": "mgm-gemma", "weights": str(base), "parts": towers},
        "peft": {"use": "lora", "on": ["language.attention"], "rank": 4},
        "data": {"source": [{"use": "easy-vqa", "limit": 400}]},
        "train": {"steps": 40, "batch_size": 8, "learning_rate": 5e-3, "precision": "fp32", "max_length": 128},
    }
    ends: list[float] = []
    begun = time.perf_counter()

    def listen(event: Any) -> None:
        if isinstance(event, StepTaken):
            ends[:] = [time.perf_counter()]
        elif "reopens as saved" in getattr(event, "text", ""):
            ends.append(time.perf_counter())

    graftwork.train(run, folder / "out", device="cpu", on_event=listen)
    return {"last step to verdict, s": ends[1] - ends[0], "the whole command, s": ends[1] - begun}


PARTS: dict[str, Callable[[Path], dict[str, float]]] = {part.__name__: part for part in (saving, verification)}


def measure(part: str, tree: Path | None) -> dict[str, float]:
    """What a process with one version of the project measures of a part."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if tree:
        environment["PYTHONPATH"] = tree_on_path(tree)
    command = [sys.executable, __file__, "--measure", part]
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return found


def main() -> None:
    """Print a table: both versions' times, and their ratio, round by round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all when none is named")
    parser.add_argument("--other-tree", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        warnings.filterwarnings("ignore")
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[options.measure](Path(folder))
        print(json.dumps(found))
        return
    if not options.other_tree:
        parser.error("name the other version's folder with --other-tree")
    print("| part | before | after | ratio |\n| --- | --- | --- | --- |", flush=True)
    for part in options.parts or PARTS:
        trees = options.other_tree.resolve(), None
        rounds = [[measure(part, tree) for tree in trees] for _ in range(options.rounds)]
        for name in rounds[0][0]:
            before, after = ([each[name] for each in column] for column in zip(*rounds, strict=True))
            ratio = spread((b / a for b, a in zip(before, after, strict=True)), 2)
            print(f"| {part}: {name} | {spread(before, 3)} | {spread(after, 3)} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
