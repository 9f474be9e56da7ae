"""A training step with packing beside one without: the same records, losses and gradients, in one run.

    python benchmarks/packing.py [--rounds 9]

A random LLaVA of 3 million parameters, every parameter trained, fp32 on this machine's CPU; 16 records a step, each third with an image, answers of lengths that
differ as those of conversations do (a log-normal distribution), cut at 512 tokens; 4 rows at a time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from graftwork.build import compose
from graftwork.config.resolve import resolve
from graftwork.config.runfile import parse_run
from graftwork.conformance import specimens
from graftwork.contracts import Assembly, Encoded, Record, Turn, batch_of, summed_loss
from graftwork.contracts.packing import MicroBatch, micro_batches
from graftwork_hf_vlm.example import write
from graftwork_registry import Catalog

LIMIT, RECORDS, ROWS = 512, 16, 4
SIZES: dict[str, dict[str, Any]] = {
    "text_config": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    "vision_config": {"hidden_size": 64, "intermediate_size": 128},
}


def assembly_of(folder: Path) -> Assembly:
    """The model."""
    write(folder)
    config = LlavaConfig.from_pretrained(folder).to_dict()
    for part, sizes in SIZES.items():
        config[part] = {**config[part], **sizes, "head_dim": None}
    config["text_config"] |= {"num_key_value_heads": 2, "head_dim": 64}
    LlavaConfig(**config).save_pretrained(folder)
    table = {
        "model": {"use": "hf-vlm", "config": str(folder)},
        "attention": {"prefer": ["sdpa"]},
        "train": {"precision": "fp32"},
    }
    catalog = Catalog.discover()
    assembly = compose.build(resolve(parse_run(table, folder), catalog), catalog, device="cpu", fake_pretrained=True)
    assembly.model.requires_grad_(True)
    return assembly


def records(assembly: Assembly) -> list[Encoded]:
    """The records of a step."""
    drawn, image = random.Random(0), specimens.image("teal", (40, 40))
    found = []
    for number in range(RECORDS):
        answer = "word " * min(95, max(2, round(drawn.lognormvariate(3, 1))))
        seen = (image,) if number % 3 == 0 else ()
        turns = (Turn("user", "<image>" * len(seen) + "what is it?"), Turn("assistant", answer))
        found.append(assembly.processor.encode(Record(str(number), turns, seen)))
    return found


def row_lengths(micro_batch: MicroBatch) -> list[int]:
    """The tokens of each of its rows."""
    return [sum(len(each.input_ids) for each in row) for row in micro_batch.by_row()]


def step(assembly: Assembly, cut: list[MicroBatch]) -> tuple[float, float]:
    """CPU seconds and loss of a forward and backward pass over all micro-batches."""
    assembly.model.zero_grad()
    began, loss = time.process_time(), 0.0
    for each in cut:
        part = summed_loss(assembly.model, batch_of(assembly.processor, each.examples, rows=each.rows))
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.item()
    return time.process_time() - began, loss


def pairs(folder: Path) -> Iterator[tuple[str, Callable[[], float], Callable[[], float]]]:
    """How records are cut into padded micro-batches, and what gives the seconds of a step with packing, and of that one."""
    assembly = assembly_of(folder)
    examples = records(assembly)
    orders = {
        "in the order of the data": examples,
        "cut by length, as without packing": sorted(examples, key=lambda each: -len(each.input_ids)),
    }
    packed = micro_batches(examples, ROWS, LIMIT)
    for name, order in orders.items():
        plain = MicroBatch(order).cut(ROWS)
        (_, loss), (_, other) = step(assembly, plain), step(assembly, packed)
        assert abs(loss - other) < 1e-5 * loss
        yield name, lambda: step(assembly, packed)[0], lambda plain=plain: step(assembly, plain)[0]  # type: ignore[misc]


def main() -> None:
    """Print both ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        for name, packed, plain in pairs(Path(folder)):
            ratios = [plain() / packed() for _ in range(rounds)]
            print(
                f"{name}: packed {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    main()
