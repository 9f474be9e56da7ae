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
from pathlib import Path
from typing import Any

import torch

from graftwork.build import compose
from graftwork.config import runfile
from graftwork.config.resolve import resolve
from graftwork.contracts import IGNORED, Encoded, Event, Plan, StepTaken, collate
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


class HuggingFace(torch.nn.Module):
    """The same model as `transformers.Trainer` wants it: logits for all positions, and their loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mean cross entropy of the num_label_tokens positions."""
        logits = self.model.logits(self.model(batch))
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        return {"loss": loss}


def time_trainer(plan: Plan, catalog: Catalog, steps: int, batch_size: int) -> float:
    """The same seconds in `transformers.Trainer`, with `peft`'s LoRA on the same modules."""
    from dataclasses import replace

    from peft import LoraConfig, inject_adapter_in_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    bare = replace(plan, model_spec=replace(plan.model_spec, peft=None, on=(), also_train=()))
    assembly = compose.build(bare, catalog)
    data = load_training_data(plan, catalog, assembly.processor)
    sampler = Sampler(data.lengths, batch_size, seed=plan.run_context.seed, by_length=True)
    order = [index for step in range(steps) for index in sampler.batch(step)]
    targets = [
        f"{name}.{leaf}" if leaf else name
        for role in ("language.attention", "language.mlp")
        for name in assembly.structure.roles[role]
        for leaf, module in assembly.model.get_submodule(name).named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=targets), assembly.model)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **others: Any) -> None:
            ends.append(time.perf_counter())

    class Records(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(order)

        def __getitem__(self, index: int) -> Encoded:
            return assembly.processor.encode(data.records[order[index]])

    def join(examples: Sequence[Encoded]) -> dict[str, Any]:
        batch = collate(examples, pad_id=assembly.processor.pad_id)
        return {"batch": batch, "labels": batch.labels}

    class InOrder(Trainer):
        def _get_train_sampler(self, *arguments: Any, **others: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _prepare_input(self, data: Any) -> Any:
            return data.to(self.args.device) if hasattr(data, "pixels") else super()._prepare_input(data)

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out,
            per_device_train_batch_size=batch_size,
            max_steps=steps,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            logging_strategy="no",
        )
        InOrder(
            HuggingFace(assembly.model), arguments, train_dataset=Records(), data_collator=join, callbacks=[Clock()]
        ).train()
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
    for number in range(options.approximates):
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
