"""What each memory strategy saves and costs: steps of the same run with and without it, one after another.

    python benchmarks/strategies.py [--rounds 5] [--steps 3] [--batch-size 8] [--precision fp32]

The model is a random MGM-Gemma of the shape in examples/demo-base, some sizes larger, with LoRA on the language model, and connector and
mining trained. Time is CPU time over that of the plain steps of the same round, so that what else the machine does matters
little. Memory is the most bytes of tensors alive in a step of records of 64 tokens whose text is all labelled, weights, gradients and optimizer
included, by the tracker of rehearsals. `host-offload` has the CPU in the place of a device, without the bytes that it moves; its time needs
a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from graftwork.build import compose
from graftwork.config import runfile
from graftwork.config.resolve import resolve
from graftwork.contracts import Batch, Plan, Stepper, collate, stepper_for
from graftwork.contracts.device import standing_for
from graftwork.data.training_data import load_training_data
from graftwork.memory.rehearsal import watching
from graftwork_registry import Catalog

DEMO = Path(__file__).parents[1] / "examples" / "demo-base"
SIZES: dict[str, dict[str, Any]] = {
    "language": {"vocab_size": 16000},
    "low": {},
    "high": {"hidden_sizes": [24, 48, 96, 192], "image_size": 128},
}
VARIANTS: dict[str, tuple[str, ...]] = {
    "checkpointing": ("checkpointing",),
    "chunked-loss": ("chunked-loss",),
    "mining-recompute": ("mining-recompute",),
    "nf4": ("nf4",),
    "adam8bit": ("adam8bit",),
    "host-offload": ("host-offload",),
    "the first three": ("checkpointing", "chunked-loss", "mining-recompute"),
    "all but host-offload": ("checkpointing", "chunked-loss", "mining-recompute", "nf4", "adam8bit"),
}


LENGTH = 64
"""The tokens of a record whose memory is measured."""


def table(base: Path, options: argparse.Namespace, memory: Sequence[str], *, weights: bool) -> dict[str, Any]:
    """The run file: base weights in `base`, or with `weights` false the configurations for them."""
    language = {"weights": str(base)} if weights else {"config": str(base / "language"), "image_size_aux": 128}
    peft = {"use": "lora", "on": ["language.attention", "language.mlp"], "also_train": ["connector", "mining"]}
    return {
        **({"peft": peft} if weights else {}),
        "model": {
            "use": "mgm-gemma",
            **language,
            "parts": {
                "low": {"use": "clip", "config": str(base / "low")},
                "high": {"use": "openclip-convnext", "config": str(base / "high")},
            },
        },
        "memory": {"use": list(memory), "chunked-loss": {"labels": 32}}
        if "chunked-loss" in memory
        else {"use": [*memory]},
        "data": {"source": [{"use": "easy-vqa", "split": "train", "kind": "open", "pictures": 16}]},
        "train": {"batch_size": options.batch_size, "precision": options.precision, "max_length": 512},
    }


def make_base(folder: Path, catalog: Catalog, options: argparse.Namespace) -> None:
    """Random base weights, with the towers' configurations beside them."""
    configs = folder.with_name("configs")
    for name, changes in SIZES.items():
        (configs / name).mkdir(parents=True)
        for file in (DEMO / name).iterdir():
            (configs / name / file.name).write_bytes(file.read_bytes())
        config = configs / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    run = runfile.parse_run(table(configs, options, (), weights=False), configs)
    assembly = compose.build(resolve(run, catalog), catalog, device="cpu")
    assembly.architecture.write(assembly, folder)


def take_step(stepper: Stepper, batch: Batch, num_label_tokens: int) -> float:
    """One step of training; its loss."""
    loss = stepper.accumulate(batch, num_label_tokens)
    stepper.gradient_norm()
    stepper.update()
    stepper.clear()
    return float(loss)


def peak_of(plan: Plan, catalog: Catalog, records: int) -> int:
    """The most bytes alive in a step of so many records of the same length, by the tracker of rehearsals; `host-offload` takes the CPU for a
    device."""
    away = any(choice.name == "host-offload" for choice in plan.run_context.memory)
    with standing_for("cuda") if away else nullcontext(), watching(plan, catalog, longest=LENGTH) as watched:
        return watched.take(records).footprint.peak


def main() -> None:
    """Print a row for each strategy."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="fp32")
    options = parser.parse_args()
    catalog = Catalog.discover()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        folder.mkdir()
        make_base(folder, catalog, options)
        running: dict[str, tuple[Stepper, int]] = {}
        for variant, memory in {"plain": (), **VARIANTS}.items():
            run = runfile.parse_run(table(folder, options, memory, weights=True), folder)
            plan = resolve(run, catalog)
            assembly = compose.build(plan, catalog, device="cpu")
            if variant == "plain":
                records = load_training_data(plan, catalog, assembly.processor).records[: options.batch_size]
                encoded = [assembly.processor.encode(record) for record in records]
                batch = collate(encoded, pad_id=assembly.processor.pad_id)
                num_label_tokens = sum(int(each.num_label_tokens) for each in encoded)
            assembly.model.train()
            stepper = stepper_for(assembly, plan.run_context.train)
            running[variant] = stepper, peak_of(plan, catalog, options.batch_size)
        seconds: dict[str, list[float]] = {variant: [] for variant in running}
        for _ in range(options.rounds):
            for variant, (stepper, _) in running.items():
                began = time.process_time()
                for _ in range(options.steps):
                    take_step(stepper, batch, num_label_tokens)
                seconds[variant].append(time.process_time() - began)
    plain = running["plain"][1]
    shape = tuple(batch.input_ids.shape)
    print(
        f"plain: {plain / 2**20:.0f} MiB at the peak, {statistics.median(seconds['plain']) / options.steps:.3f} s of CPU time a step"
    )
    for variant in VARIANTS:
        peak, ratios = running[variant][1], [a / b for a, b in zip(seconds[variant], seconds["plain"], strict=True)]
        cost = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"{variant:<22} peak {peak / 2**20:5.0f} MiB, {peak / plain - 1:+.0%}  "
            f"time {cost if variant != 'host-offload' else '-'}",
            flush=True,
        )
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.precision}, {shape} tokens, {num_label_tokens} labels"
    )


if __name__ == "__main__":
    main()
