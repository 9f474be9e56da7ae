"""What a rehearsal predicts of a step's memory, beside what the step takes.

    python benchmarks/memory.py

Each plan's step is rehearsed on fake tensors, then taken. On a CPU it is compared with the same tracker on real tensors, and
with the account of PyTorch's CPU allocator, which sees what kernels take for themselves as well. Where there is a CUDA device,
it is compared with `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from graftwork.config import runfile
from graftwork.config.machine import detect_machine
from graftwork.config.resolve import resolve
from graftwork.config.sizes import format_size
from graftwork.contracts import Plan
from graftwork.memory.budget import rehearse, with_candidate
from graftwork.memory.rehearsal import rehearsing, watching
from graftwork_registry import Catalog

DEMO = Path(__file__).parents[1] / "examples" / "demo-base"
LORA = {"use": "lora", "on": ["language.attention", "language.mlp"], "rank": 8}
SIZES: dict[str, dict[str, Any]] = {
    "1M": {},
    "8M": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 4096},
    "30M": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 32000},
}
"""What of the tiny language model is changed for each size."""
CHUNKED: dict[str, Any] = {"use": ["chunked-loss"], "chunked-loss": {"labels": 32}}
MINING: dict[str, Any] = {"peft.also_train": ["connector", "mining"]}
WHOLE: dict[str, Any] = {"peft": {"use": "full", "on": ["language"]}}
PLANS: tuple[tuple[str, str, int, int, dict[str, Any]], ...] = (
    ("LoRA", "1M", 4, 128, {}),
    ("LoRA", "1M", 16, 128, {}),
    ("LoRA", "1M", 4, 512, {}),
    ("LoRA", "8M", 1, 128, {}),
    ("LoRA", "8M", 4, 128, {}),
    ("LoRA", "30M", 2, 64, {}),
    ("LoRA, bf16", "8M", 2, 128, {"train.precision": "bf16"}),
    ("LoRA, bf16", "30M", 2, 64, {"train.precision": "bf16"}),
    ("LoRA, plain attention", "8M", 2, 256, {"attention.prefer": ["eager"]}),
    ("LoRA with dropout", "8M", 2, 128, {"peft.dropout": 0.1}),
    ("LoRA, connector and mining", "8M", 2, 128, MINING),
    ("connector and mining", "8M", 2, 128, {"peft": {"also_train": ["connector", "mining"]}}),
    ("IA3", "8M", 2, 128, {"peft": {"use": "ia3", "on": ["language"]}}),
    ("the whole language model", "8M", 2, 128, WHOLE),
    ("LoRA, checkpointing", "1M", 16, 128, {"memory.use": ["checkpointing"]}),
    ("LoRA, checkpointing", "8M", 4, 128, {"memory.use": ["checkpointing"]}),
    ("LoRA, checkpointing, bf16", "30M", 2, 64, {"memory.use": ["checkpointing"], "train.precision": "bf16"}),
    ("LoRA, chunked-loss", "30M", 2, 128, {"memory": CHUNKED}),
    ("LoRA and mining, mining-recompute", "8M", 8, 128, MINING | {"memory.use": ["mining-recompute"]}),
    ("LoRA, nf4", "8M", 2, 128, {"memory.use": ["nf4"]}),
    ("the whole language model, adam8bit", "8M", 2, 128, WHOLE | {"memory.use": ["adam8bit"]}),
    (
        "LoRA, checkpointing and chunked-loss",
        "30M",
        4,
        128,
        {"memory": CHUNKED | {"use": ["checkpointing", "chunked-loss"]}},
    ),
    (
        "LoRA and mining, checkpointing and mining-recompute",
        "8M",
        8,
        128,
        MINING | {"memory.use": ["checkpointing", "mining-recompute"]},
    ),
    ("LoRA, checkpointing and nf4", "8M", 4, 128, {"memory.use": ["checkpointing", "nf4"]}),
    ("LoRA, nf4 and adam8bit", "8M", 2, 128, {"memory.use": ["nf4", "adam8bit"]}),
    ("LoRA, one micro-batch for a step", "8M", 4, 128, {"train.batch_size": 4}),
)
"""What is trained and how, the model's size, the micro-batch, the tokens of a record, and changes of the run file."""


def make_plan(folder: Path, catalog: Catalog, size: str, length: int, changes: dict[str, Any]) -> Plan:
    """A plan for a base of random weights."""
    language = folder / size
    if not language.exists():
        language.mkdir()
        config = json.loads((DEMO / "language" / "config.json").read_text()) | SIZES[size]
        (language / "config.json").write_text(json.dumps(config))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (language / name).write_text((DEMO / "language" / name).read_text())
    table: dict[str, Any] = {
        "model": {
            "use": "mgm-gemma",
            "config": str(language),
            "image_size_aux": 64,
            "aspect_ratio": "square",
            "parts": {
                "low": {"use": "clip", "config": str(DEMO / "low")},
                "high": {"use": "openclip-convnext", "config": str(DEMO / "high")},
            },
        },
        "peft": dict(LORA),
        "attention": {"prefer": ["sdpa"]},
        "data": {"source": [{"use": "easy-vqa"}]},
        "train": {"batch_size": 64, "precision": "fp32", "max_length": length},
    }
    for dotted, value in changes.items():
        here = table
        *path, last = dotted.split(".")
        for key in path:
            here = here.setdefault(key, {})
        here[last] = value
    return resolve(runfile.parse_run(table, folder), catalog)


@contextmanager
def collected() -> Iterator[None]:
    """Without what others left behind, and without the collector's own moments."""
    gc.collect()
    yield
    gc.collect()


def allocated(plan: Plan, catalog: Catalog, micro_batch: int) -> int:
    """The peak of a step by the account of PyTorch's CPU allocator, without what waits in main memory: the record that its batches
    are made of, and the base's values of what is trained."""
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
        watching(plan, catalog) as watched,
    ):
        with torch.profiler.record_function("measured"):
            watched.take(micro_batch)
        rows = [example for _, row in watched.examples for example in row]
        seen = {each.untyped_storage().data_ptr(): each for example in rows for each in example.pixels.values()}
        waiting = [*seen.values(), *watched.assembly.adaptation.base_copy.values()]
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    (measured,) = (event for event in events if event.name() == "measured")
    begins, ends = measured.start_ns(), measured.end_ns()
    bytes_now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        bytes_now += event.nbytes()
        if begins <= event.start_ns() <= ends:
            peak = max(peak, bytes_now)
    return peak - sum(tensor.nbytes for tensor in waiting)


def on_card(plan: Plan, catalog: Catalog, micro_batch: int) -> tuple[int, int]:
    """Predicted, and measured by the CUDA allocator."""
    from graftwork.build import compose
    from graftwork.contracts import batch_of, stepper_for
    from graftwork.memory.rehearsal import longest_rows

    with rehearsing(plan, catalog, detect_machine(), device="cuda") as watched:
        predicted = watched.take(micro_batch).footprint.peak
    assembly = compose.build(plan, catalog, device="cuda")
    assembly.model.train()
    stepper = stepper_for(assembly, plan.run_context.train)
    micro_batches = 1 if plan.run_context.train.batch_size == micro_batch else 2
    rows, peaks = longest_rows(assembly.processor, plan.run_context.train.max_length), []
    for _, row in rows * 2:  # the first time around there is no optimizer's state yet
        torch.cuda.reset_peak_memory_stats()
        for number in range(micro_batches):
            batch = batch_of(assembly.processor, row * micro_batch).to(assembly.device)
            stepper.accumulate(batch, 1, last=number + 1 == micro_batches)
        stepper.gradient_norm()
        stepper.update()
        stepper.clear()
        peaks.append(torch.cuda.max_memory_allocated())
    return predicted, max(peaks[len(rows) :])


def shown_error(error: float) -> str:
    """In per cent, with a sign where there is something to sign."""
    text = f"{error:+.2%}"
    return "0.00%" if text[1:] == "0.00%" else text


def main() -> None:
    """Print a row for each plan, and the median and worst error."""
    warnings.filterwarnings("ignore")
    catalog, errors, seen = Catalog.discover(), [], []
    with tempfile.TemporaryDirectory() as name:
        print("| trained | model | records x tokens | predicted | tracked | error | allocator | error |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for what, size, micro_batch, length, changes in PLANS:
            plan = make_plan(Path(name), catalog, size, length, changes)
            if torch.cuda.is_available():
                predicted, peak = on_card(plan, catalog, micro_batch)
                errors.append(predicted / peak - 1)
                print(
                    f"| {what} | {size} | {micro_batch} x {length} | {format_size(predicted)} | CUDA {format_size(peak)} | {shown_error(errors[-1])} |"
                )
                continue
            with collected():
                fixed = with_candidate(plan, plan.run_context.memory, micro_batch)
                predicted = rehearse(fixed, catalog, detect_machine(), "cpu", None).peak or 0
            with collected(), watching(plan, catalog) as watched:
                tracked = watched.take(micro_batch).footprint.peak
            with collected():
                peak = allocated(plan, catalog, micro_batch)
            errors.append(predicted / tracked - 1)
            seen.append(predicted / peak - 1)
            print(
                f"| {what} | {size} | {micro_batch} x {length} | {format_size(predicted)} | {format_size(tracked)} "
                f"| {shown_error(errors[-1])} | {format_size(peak)} | {shown_error(seen[-1])} |",
                flush=True,
            )
    for name, found in (("tracker" if seen else "max_memory_allocated", errors), ("allocator", seen)):
        if found:
            sizes = [abs(error) for error in found]
            print(
                f"against the {name}: median error {statistics.median(sizes):.2%}, worst {max(sizes):.2%}, of {len(sizes)} plans"
            )


if __name__ == "__main__":
    main()
