"""A training step whose blocks are compiled (`train.compile`) beside one whose blocks are not: ratios of processor time.

    python benchmarks/compiling.py [--rounds 9] [demo] [smollm2]

`demo` is the MGM-Gemma of examples/demo-base, 8 records; `smollm2` a LLaVA whose language model has the shape of SmolLM2-135M, 4 records of 40 tokens or so.
LoRA of rank 16 on the language model, fp32, on one thread. Both take the same records in turn, in one process; what compiling takes is told apart.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import steps
import torch

from graftwork.build import compose
from graftwork.conformance import specimens
from graftwork.contracts import Batch, Record, Stepper, Turn, batch_of, stepper_for
from graftwork.train.compiling import BACKEND, compile_blocks
from graftwork_registry import Catalog


def stepper_of(name: str, folder: Path) -> Stepper:
    """A stepper of one of both models, built in an empty folder."""
    catalog = Catalog.discover()
    model = steps.demo_model() if name == "demo" else steps.smollm2_model(folder)
    torch.manual_seed(0)
    plan = steps.plan_of(model, 1, catalog, peft=steps.LORA)
    assembly = compose.build(plan, catalog, device="cpu", fake_pretrained=True)
    assembly.model.train()
    return stepper_for(assembly, plan.run_context.train)


def batch_for(stepper: Stepper, count: int) -> Batch:
    """A micro-batch of equal records with an image."""
    turns = (Turn("user", "<image>what is it, and where?"), Turn("assistant", "a shape"))
    processor = stepper.assembly.processor
    one = processor.encode(Record("one", turns, (specimens.image("teal", (40, 40)),)))
    return batch_of(processor, [one] * count)


def step(stepper: Stepper, batch: Batch) -> tuple[float, float]:
    """CPU seconds and loss of a forward and backward pass."""
    began = time.process_time()
    loss = float(stepper.accumulate(batch, 8.0))
    took = time.process_time() - began
    stepper.clear()
    return took, loss


def main() -> None:
    """Print the ratio of each model that is named, by default of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["demo", "smollm2"])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for name in options.models:
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other_folder:
            plain, compiled = stepper_of(name, Path(one)), stepper_of(name, Path(other_folder))
            batch, assembly = batch_for(plain, 8 if name == "demo" else 4), compiled.assembly
            compiled.reached(batch)  # kernels are chosen
            blocks = [assembly.model.get_submodule(block) for block in assembly.structure.blocks["language"]]
            compile_blocks(blocks, BACKEND)
            began = time.perf_counter()
            step(compiled, batch)
            compiling = time.perf_counter() - began
            step(plain, batch)
            ratios, losses = list[float](), set[float]()
            for _ in range(options.rounds):
                (before, loss), (after, other) = step(plain, batch), step(compiled, batch)
                ratios.append(before / after)
                losses.add(abs(loss - other) / loss)
            shape = " x ".join(map(str, batch.input_ids.shape))
            print(
                f"{name}, {shape} tokens: compiled {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f}); "
                f"losses {max(losses):.0e} apart; compiling took {compiling:.0f} s of wall clock",
                flush=True,
            )


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    main()
