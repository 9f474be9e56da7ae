"""What the checks measure: models in full size, or tiny ones, made of random weights on the device, their plans, records, and clocks."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from graftwork.build import compose
from graftwork.config import runfile
from graftwork.config.resolve import resolve
from graftwork.contracts import IGNORED, Assembly, Encoded, Plan
from graftwork.memory import rehearsal
from graftwork_registry import Catalog

EXAMPLES = Path(__file__).parents[2] / "examples"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CATALOG = Catalog.discover()
LORA = {"use": "lora", "on": ["language.attention", "language.mlp"], "rank": 16, "alpha": 32.0}
TINY = "bf16" if CUDA else "fp32"
"""The precision of tiny models: few CPUs compute bf16 fast."""
ALL = ("checkpointing", "chunked-loss", "mining-recompute")
"""The strategies with which MGM-2B needs the least while its weights stay in 16 bits."""


@dataclass(frozen=True)
class Subject:
    """A model and the records that it is measured with."""

    name: str
    model: Mapping[str, Any]
    """The table of a run file."""
    length: int
    """The tokens of a record."""
    labels: int
    also_train: Sequence[str] = ()
    batch: int = 16
    """The records of a step."""
    plans: Sequence[tuple[tuple[str, ...], int]] = ()
    """Memory strategies and micro-batches, whose memory and speed are measured."""
    precision: str = "bf16"

    def plan(self, memory: Sequence[str] = (), micro: int | None = None, **changes: Any) -> Plan:
        """A plan for LoRA; `changes` replace tables of the run file, or leave them out, or add to `train`."""
        table: dict[str, Any] = {
            "seed": 17,
            "model": dict(self.model),
            "peft": {**LORA, "also_train": list(self.also_train)},
            "memory": {"use": list(memory)},
            "attention": {"prefer": ["sdpa"]},
        }
        train = {
            "batch_size": self.batch,
            "micro_batch_size": micro,
            "precision": self.precision,
            "max_length": self.length,
        }
        table["train"] = {**train, "learning_rate": 2e-4, **changes.pop("train", {})}
        table = {name: value for name, value in (table | changes).items() if value is not None}
        table["train"] = {name: value for name, value in table["train"].items() if value is not None}
        return resolve(runfile.parse_run(table, EXAMPLES), CATALOG)


@dataclass(frozen=True)
class Size:
    """Full, or tiny: the same checks on models of which a CPU computes a step in a moment."""

    tiny: bool

    @cached_property
    def mgm(self) -> Subject:
        """MGM-2B (Gemma-2B with CLIP-L at 336 pixels and ConvNeXt-L at 768), or one of a million parameters."""
        if self.tiny:
            folder, names = EXAMPLES / "demo-base", ("language", "low", "high")
        else:
            folder = EXAMPLES / "mgm-2b" / "configs"
            names = ("gemma-2b-it", "clip-vit-large-patch14-336", "openclip-convnext-large-d-320")
        language, low, high = (str(folder / name) for name in names)
        parts = {"low": {"use": "clip", "config": low}, "high": {"use": "openclip-convnext", "config": high}}
        model = {"use": "mgm-gemma", "config": language, "image_size_aux": 64 if self.tiny else 768, "parts": parts}
        if self.tiny:
            plans: Sequence[tuple[tuple[str, ...], int]] = (((), 1), (ALL, 2))
            return Subject("MGM, tiny", model, 112, 24, ("connector", "mining"), 2, plans, TINY)
        plans = (
            ((), 1),
            (("chunked-loss",), 4),
            (("checkpointing", "chunked-loss"), 8),
            (ALL, 8),
            (ALL, 16),
            ((*ALL, "nf4"), 16),
        )
        return Subject("MGM-2B", model, 676, 40, ("connector", "mining"), 16, plans)

    @cached_property
    def vlm(self) -> Subject:
        """Qwen2.5-VL-3B from its configuration, or a tiny LLaVA."""
        if self.tiny:
            from graftwork_hf_vlm.example import write

            write(folder := Path(tempfile.mkdtemp()))
            return Subject("LLaVA, tiny", {"use": "hf-vlm", "config": str(folder)}, 64, 16, (), 2, (((), 2),), TINY)
        folder = EXAMPLES / "recipes" / "qwen2.5-vl-3b" / "config"
        model = {"use": "hf-vlm", "config": str(folder), "max_pixels": 802_816}
        plans = (((), 1), (("chunked-loss",), 4), (("checkpointing", "chunked-loss"), 8))
        return Subject("Qwen2.5-VL-3B", model, 1124, 40, (), 16, plans)


def build(plan: Plan) -> Assembly:
    """The plan's model with random weights, which are drawn on the device: on a CPU that takes minutes in full size."""
    with torch.device(DEVICE) if CUDA else contextlib.nullcontext():
        assembly = compose.build(plan, CATALOG, device=DEVICE, fake_pretrained=True)
        if isinstance(assembly.processor, compose.NoProcessor):
            with torch.device("cpu"):
                assembly.processor = rehearsal.stand_in(assembly)
    clean()
    return assembly


def records(assembly: Assembly, subject: Subject, count: int, *, prompts: bool = False) -> list[Encoded]:
    """So many of one length, with an image each and random words, of which the last are labelled; as `prompts` without labels, and of slightly
    different lengths."""
    blank = next(row[0] for _, row in rehearsal.longest_rows(assembly.processor, subject.length))
    seen, words = list(blank.image_token_mask), min(assembly.processor.vocabulary, 250_000)
    # Tokens after the image are words; those before it, and around it, belong to the template.
    last = max(place for place, is_image in enumerate(seen) if is_image) + 2
    first = len(seen) - (0 if prompts else subject.labels)

    def one(number: int) -> Encoded:
        draw, end = random.Random(number), len(seen) - (number % 8) * prompts
        ids = [token if place < last else draw.randrange(10, words) for place, token in enumerate(blank.input_ids)]
        labels = [token if place >= first else IGNORED for place, token in enumerate(ids)]
        fields = {name: list(values)[:end] for name, values in blank.token_fields.items()}
        return replace(
            blank, input_ids=ids[:end], image_token_mask=seen[:end], labels=labels[:end], token_fields=fields
        )

    return [one(number) for number in range(count)]


def clean() -> None:
    """Give everything back, and forget earlier peaks."""
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def sync() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], *, warm: int = 1, times: int = 3) -> float:
    """The median wall seconds of a call and what it left the device to do."""
    for _ in range(warm):
        work()
    found = []
    for _ in range(times):
        sync()
        began = time.perf_counter()
        work()
        sync()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def peak_gib() -> float:
    """The most that tensors took since `clean`, in GiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
