"""Training throughput beside `transformers.Trainer` + `peft`: the same model, adapter, records and batches, in one run.

    python benchmarks/throughput.py [--steps 60] [--rounds 3] [--batch-size 32]

Both train LoRA on the tiny MGM-Gemma, in fp32 on this machine's CPU or GPU. The rounds alternate, and the ratio is taken
round by round, so that what else the machine does falls on both. Both read and encode every record when it is needed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import trainer

from graftwork.build import compose
from graftwork.config import runfile
from graftwork.config.resolve import resolve
from graftwork.contracts import Encoded, Event, Plan, StepTaken
from graftwork.data.sampling import Sampler
from graftwork.data.training_data import load_training_data
from graftwork.train import loop
from graftwork_registry import Catalog

RATE = 1e-3


def make_plan(catalog: Catalog, steps: int, batch_size: int) -> Plan:
    """Its plan, for so many steps, without an evaluation."""
    settings = {
        "train.steps": steps,
        "train.batch_size": batch_size,
        "train.learning_rate": RATE,
        "train.schedule": '"constant"',
    }
    overrides = [f"{key}={value}" for key, value in settings.items()] + [
        "train.warmup_ratio=0",
        "data.source.0.pictures=400",
    ]
    run = runfile.load(Path(__file__).parents[1] / "examples" / "demo-base" / "demo.toml", overrides)
    return resolve(run, catalog)


def time_graftwork(plan: Plan, catalog: Catalog) -> float:
    """Seconds from the second step's beginning to the last one's end, in Graftwork's loop."""
    ends: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepTaken):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        loop.train(plan, catalog, Path(out), listen=listen)
    return ends[-1] - ends[0]


class Read(Sequence[Encoded]):
    """The records of a plan in the order of its batches, read and encoded when they are asked for."""

    def __init__(self, plan: Plan, catalog: Catalog, processor: Any, steps: int, batch_size: int) -> None:
        self.processor, self.data = processor, load_training_data(plan, catalog, processor)
        sampler = Sampler(self.data.lengths, batch_size, seed=plan.run_context.seed, by_length=True)
        self.order = [index for step in range(steps) for index in sampler.batch(step)]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> Any:
        return self.processor.encode(self.data.records[self.order[index]])


def time_trainer(plan: Plan, catalog: Catalog, steps: int, batch_size: int) -> float:
    """The same seconds in `transformers.Trainer`, with `peft`'s LoRA on the same modules."""
    bare = replace(plan, model_spec=replace(plan.model_spec, peft=None, on=(), also_train=()))
    assembly = compose.build(bare, catalog)
    trainer.inject_lora(assembly)
    records = Read(plan, catalog, assembly.processor, steps, batch_size)
    with tempfile.TemporaryDirectory() as out:
        ends = trainer.train(assembly, records, batch_size, steps, Path(out), learning_rate=RATE)
    return ends[-1] - ends[0]


def main() -> None:
    """Print images per second of both, and the ratio of each round."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    catalog = Catalog.discover()
    plan = make_plan(catalog, options.steps, options.batch_size)
    images = (options.steps - 1) * options.batch_size
    ratios = []
    for number in range(options.rounds):
        ours = images / time_graftwork(plan, catalog)
        theirs = images / time_trainer(plan, catalog, options.steps, options.batch_size)
        ratios.append(ours / theirs)
        print(
            f"round {number + 1}: graftwork {ours:6.1f} images/s, Trainer + peft {theirs:6.1f} images/s, ratio {ours / theirs:.2f}",
            flush=True,
        )
    print(f"ratio: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {options.batch_size}, {options.steps} steps"
    )


if __name__ == "__main__":
    main()
