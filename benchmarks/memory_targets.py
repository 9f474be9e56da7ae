"""What a step of the full-size MGM-2B needs, by rehearsal, beside the plain way of Hugging Face.

    python benchmarks/memory_targets.py

Gemma-2B, CLIP-L at 336 pixels, ConvNeXt-L at 768, LoRA of rank 16 on all linear layers of the language model, connector and mining
trained, bf16, records of 576 picture and 512 text tokens, all text labelled. No weights are needed. The plain way is the
same model with the loss of transformers: logits of every position, in fp32.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from graftwork import runfile
from graftwork.component import NoSettings
from graftwork.kinds import MemoryStrategy
from graftwork.lookup import Found
from graftwork.machine import Machine
from graftwork.rehearsal import rehearsing
from graftwork.resolve import resolve
from graftwork.sizes import shown_size
from graftwork.stepping import Stepper
from graftwork_registry import Catalog

DEMO = Path(__file__).parents[1] / "examples" / "demo-base"
CONFIGS: dict[str, dict[str, Any]] = {
    "language": {
        "model_type": "gemma",
        "vocab_size": 256_000,
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "hidden_act": "gelu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
    },
    "low": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    "high": {"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3], "patch_size": 4, "image_size": 320},
}
SPARING = ["checkpointing", "chunked-loss", "mining-recompute"]
RUNGS: tuple[list[str], ...] = (
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
            def accumulate(self, batch: Any, labelled: int) -> Any:
                with self.assembly.autocast():
                    logits = self.assembly.model.logits(self.assembly.model(batch))
                    loss = ForCausalLMLoss(logits, batch.labels, logits.shape[-1], num_items_in_batch=labelled)
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
    """Print a row for each rung."""
    warnings.filterwarnings("ignore")
    lookup = WithAllLogits()
    rungs = [argument.split(",") for argument in sys.argv[1:]] or RUNGS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, config in CONFIGS.items():
            (folder / part).mkdir()
            (folder / part / "config.json").write_text(json.dumps(config))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / "language" / file).write_text((DEMO / "language" / file).read_text())
        print(
            "| strategies | micro-batch | peak | frozen weights | trained, gradients, optimizer | activations | temporaries |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for rung in rungs:
            table = {
                "model": {
                    "use": "mgm-gemma",
                    "config": "language",
                    "image_size_aux": 768,
                    "parts": {
                        "low": {"use": "clip", "config": "low"},
                        "high": {"use": "openclip-convnext", "config": "high"},
                    },
                },
                "peft": {
                    "use": "lora",
                    "on": ["language.attention", "language.mlp"],
                    "also_train": ["connector", "mining"],
                    "rank": 16,
                },
                "attention": {"prefer": ["sdpa"]},
                "memory": {"use": rung},
                "data": {"source": [{"use": "easy-vqa"}]},
                "train": {"batch_size": 128, "max_length": 1088},
            }
            plan = resolve(runfile.parse_run(table, folder), lookup)
            with rehearsing(plan, lookup, Machine(), device="cuda") as watched:
                for size in (1, 8):
                    step = watched.take(size).footprint
                    held = step.categories
                    trained = held["trained weights"] + held["gradients"] + held["optimizer state"]
                    shown = (held["frozen weights"], trained, held["activations"], held["temporaries"])
                    print(
                        f"| {', '.join(rung) or 'none'} | {size} | {shown_size(step.peak)} | "
                        f"{' | '.join(map(shown_size, shown))} |",
                        flush=True,
                    )
                    for thing in step.largest:
                        print(
                            f"    {shown_size(thing.bytes)} {thing.category}: {thing.count} of {thing.path or 'the step'} "
                            f"{thing.shape} {thing.dtype}",
                            file=sys.stderr,
                        )


if __name__ == "__main__":
    main()
