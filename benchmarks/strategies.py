"""What each memory strategy saves and costs: steps of the same run with and without it, one after another.

    python benchmarks/strategies.py [--rounds 5] [--steps 3] [--batch-size 8] [--precision fp32]

The model is a random MGM-Gemma of the shape in examples/demo-base, some sizes larger, with LoRA on the language model, and connector and
mining trained. Time is CPU time over that of the plain steps of the same round, so that what else the machine does matters
little. Memory is the most bytes of tensors alive in a step, weights, gradients and optimizer included, watched operation by
operation. `host-offload` is watched with the CPU in the place of a device, without the bytes that it moves; its time needs
a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graftwork.build import compose
from graftwork.config import runfile
from graftwork.config.resolve import resolve
from graftwork.contracts import Assembly, Batch, Stepper, collate, stepper_for
from graftwork.data.training_data import load_training_data
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
        "data": {"source": [{"use": "easy-vqa", "split": "train", "kind": "open", "images": 16}]},
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


class Watch(TorchDispatchMode):
    """The most bytes of storages alive, besides those of `hosts`, from what was there before and what operations make."""

    def __init__(self, there: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.hosts: set[int] = set()
        self.total = self.peak = 0
        self.note(there)

    def note(self, tensors: Sequence[Any]) -> None:
        """Count what is alive now, with these among it."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                known = self.alive.get(storage._cdata)
                if known is None or known[0].expired():
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.total += storage.nbytes()
        if self.total > self.peak:  # only then it matters what is no longer there
            self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
            self.total = sum(size for key, (_, size) in self.alive.items() if key not in self.hosts)
            self.peak = max(self.peak, self.total)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(tree_leaves(result))
        return result


def take_step(stepper: Stepper, batch: Batch, num_label_tokens: int) -> float:
    """One step of training; its loss."""
    loss = stepper.accumulate(batch, num_label_tokens)
    stepper.gradient_norm()
    stepper.update()
    stepper.clear()
    return float(loss)


def peak_of(assembly: Assembly, stepper: Stepper, batch: Batch, num_label_tokens: int) -> int:
    """The most bytes alive in a step, after one that has made the optimizer's state."""
    import graftwork_host_offload

    model = assembly.model
    if any(strategy.name == "host-offload" for strategy in assembly.strategies):
        model.forward = partial(graftwork_host_offload.forward, model, model.forward, 64 << 10, assembly.device)
    take_step(stepper, batch, num_label_tokens)
    state = [value for values in stepper.optimizer.state.values() for value in values.values()]
    watch = Watch([*model.parameters(), *model.buffers(), *state, *tree_leaves(vars(batch))])
    pack = graftwork_host_offload.Away.pack

    def watched(self: Any, tensor: torch.Tensor) -> Any:
        kept = pack(self, tensor)
        if isinstance(kept, graftwork_host_offload.Moved):
            watch.hosts.add(kept.host.untyped_storage()._cdata)
        return kept

    graftwork_host_offload.Away.pack = watched  # type: ignore[method-assign]
    try:
        with watch:
            take_step(stepper, batch, num_label_tokens)
    finally:
        graftwork_host_offload.Away.pack = pack  # type: ignore[method-assign]
    if "forward" in vars(model):
        del model.forward
    return watch.peak


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
            running[variant] = stepper, peak_of(assembly, stepper, batch, num_label_tokens)
        seconds: dict[str, list[float]] = {variant: [] for variant in running}
        for _ in range(options.approximates):
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
