"""What a step of the full-size MGM-2B needs, by rehearsal, beside the plain way of Hugging Face.

    python benchmarks/memory_targets.py

Gemma-2B, CLIP-L at 336 pixels, ConvNeXt-L at 768, LoRA of rank 16 on all linear layers of the language model, connector and mining
trained, bf16, records of 576 image and 512 text tokens, all text num_label_tokens. No weights are needed. The plain way is the
same model with the loss of transformers: logits of every position, in fp32.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from graftwork.config import runfile
from graftwork.config.machine import Machine
from graftwork.config.resolve import resolve
from graftwork.config.sizes import format_size
from graftwork.contracts import Found, MemoryStrategy, NoSettings, Stepper
from graftwork.memory.rehearsal import rehearsing
from graftwork_registry import Catalog

CONFIGS = Path(__file__).parents[1] / "examples" / "mgm-2b" / "configs"
SPARING = ["checkpointing", "chunked-loss", "mining-recompute"]
CANDIDATES: tuple[list[str], ...] = (
    *([], ["checkpointing"], SPARING[:2], SPARING, [*SPARING, "nf4"]),
    *(["all-logits"], ["all-logits", "checkpointing"]),
)
"""By default; others are named on the command line, such as `checkpointing,chunked-loss`."""


class AllLogits(MemoryStrategy[NoSettings]):
    """The loss of transformers: logits of every position, in fp32"""

    name = "all-logits"

    def stepper(self, assembly: Any, settings: Any) -> Stepper:
        """A stepper with that loss."""
        from transformers.loss.loss_utils import ForCausalLMLoss

        class Plain(Stepper):
            def accumulate(self, batch: Any, num_label_tokens: int) -> Any:
                with self.assembly.autocast():
                    logits = self.assembly.model.logits(self.assembly.model(batch))
                    loss = ForCausalLMLoss(logits, batch.labels, logits.shape[-1], num_items_in_batch=num_label_tokens)
                loss.backward()
                return loss.detach()

        return Plain(assembly, settings)


class WithAllLogits:
    """The installed components, and the plain loss."""

    def __init__(self) -> None:
        self.catalog = Catalog.discover()

    def find(self, kind: str, name: str) -> Found:
        """The component."""
        if name.endswith(AllLogits.name):
            return Found(AllLogits, "benchmarks", "benchmarks", "0")
        return self.catalog.find(kind, name)

    def emit(self, event: object) -> None:
        """Nobody listens."""


def main() -> None:
    """Print a row for each candidate."""
    warnings.filterwarnings("ignore")
    lookup = WithAllLogits()
    candidates = [argument.split(",") for argument in sys.argv[1:]] or CANDIDATES
    print(
        "| strategies | micro-batch | peak | frozen weights | trained, gradients, optimizer | activations | temporaries |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for candidate in candidates:
        table = {
            "model": {
                "use": "mgm-gemma",
                "config": "gemma-2b-it",
                "image_size_aux": 768,
                "parts": {
                    "low": {"use": "clip", "config": "clip-vit-large-patch14-336"},
                    "high": {"use": "openclip-convnext", "config": "openclip-convnext-large-d-320"},
                },
            },
            "peft": {
                "use": "lora",
                "on": ["language.attention", "language.mlp"],
                "also_train": ["connector", "mining"],
                "rank": 16,
            },
            "attention": {"prefer": ["sdpa"]},
            "memory": {"use": candidate},
            "data": {"source": [{"use": "easy-vqa"}]},
            "train": {"batch_size": 128, "max_length": 1088},
        }
        plan = resolve(runfile.parse_run(table, CONFIGS), lookup)
        with rehearsing(plan, lookup, Machine(), device="cuda") as watched:
            for size in (1, 8):
                step = watched.take(size).footprint
                held = step.categories
                trained = held["trained weights"] + held["gradients"] + held["optimizer state"]
                shown = (held["frozen weights"], trained, held["activations"], held["temporaries"])
                print(
                    f"| {', '.join(candidate) or 'none'} | {size} | {format_size(step.peak)} | "
                    f"{' | '.join(map(format_size, shown))} |",
                    flush=True,
                )
                for thing in step.largest:
                    print(
                        f"    {format_size(thing.bytes)} {thing.category}: {thing.count} of {thing.path or 'the step'} "
                        f"{thing.shape} {thing.dtype}",
                        file=sys.stderr,
                    )


if __name__ == "__main__":
    main()
