"""Steps of training beside those of `transformers.Trainer` with `peft`: the same model, adapter and records, encoded before, in fp32."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import trainer

from graftwork.build import compose
from graftwork.config import runfile
from graftwork.config.resolve import resolve
from graftwork.conformance import specimens
from graftwork.contracts import Assembly, Encoded, Plan, Record, Turn, batch_of, stepper_for
from graftwork_registry import Catalog

EXAMPLES = Path(__file__).parents[1] / "examples"
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
"""The sizes of SmolLM2-135M (its config.json at huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)."""
LORA = {"use": "lora", "on": [*trainer.TARGETS], "rank": 16, "alpha": 32.0}
WORDS = ("the", "image", "shows", "a", "red", "circle", "near", "two", "blue", "squares", "of", "light")
STEPS = 3
"""How many are taken at a time, of which the first does not count."""


def demo_model() -> dict[str, Any]:
    """The tiny MGM-Gemma of examples/demo-base, of a million parameters."""
    folder = EXAMPLES / "demo-base"
    parts = {
        "low": {"use": "clip", "config": str(folder / "low")},
        "high": {"use": "openclip-convnext", "config": str(folder / "high")},
    }
    return {"use": "mgm-gemma", "config": str(folder / "language"), "image_size_aux": 64, "parts": parts}


def smollm2_model(folder: Path) -> dict[str, Any]:
    """A LLaVA with a language model of SmolLM2-135M's sizes and a tiny CLIP, of random weights."""
    from transformers import LlavaConfig

    from graftwork_hf_vlm.example import write

    write(folder)
    config = LlavaConfig.from_pretrained(folder).to_dict()
    config["text_config"] = {**config["text_config"], **SMOLLM2}
    LlavaConfig(**config).save_pretrained(folder)
    return {"use": "hf-vlm", "config": str(folder)}


def records(count: int, words: Sequence[int]) -> list[Record]:
    """So many, each third without an image, with answers of so many words in turn."""
    drawn, image = random.Random(0), specimens.image("teal", (64, 64))
    found = []
    for number in range(count):
        answer = " ".join(drawn.choices(WORDS, k=words[number % len(words)]))
        seen = () if number % 3 == 2 else (image,)
        asked = Turn("user", "<image>\n" * len(seen) + "what is there?")
        found.append(Record(str(number), (asked, Turn("assistant", answer)), seen))
    return found


CASES: Mapping[str, tuple[str, int, Sequence[int]]] = {
    "the demo's model, 32 records": ("demo", 32, (1,)),
    "SmolLM2-135M, 4 short records": ("smollm2", 4, (1, 2)),
    "SmolLM2-135M, 2 long records": ("smollm2", 2, (40, 56)),
}
"""The model, the records of a step, and the words of their answers."""


def plan_of(model: Mapping[str, Any], batch: int, catalog: Catalog, **peft: Any) -> Plan:
    """A plan for steps of one micro-batch."""
    train = {"batch_size": batch, "precision": "fp32", "max_length": 512, "learning_rate": 2e-4}
    table = {"seed": 17, "model": dict(model), "attention": {"prefer": ["sdpa"]}, "train": train, **peft}
    return resolve(runfile.parse_run(table, EXAMPLES), catalog)


def pair(case: str, clock: Callable[[], float] = time.process_time) -> tuple[Callable[[], float], Callable[[], float]]:
    """Graftwork's step and Trainer's: what gives the seconds of one, by the `clock`."""
    use, count, words = CASES[case]
    catalog, folder = Catalog.discover(), Path(tempfile.mkdtemp())
    model = demo_model() if use == "demo" else smollm2_model(folder)

    def built(**peft: Any) -> tuple[Assembly, list[Encoded]]:
        assembly = compose.build(plan_of(model, count, catalog, **peft), catalog, device="cpu", fake_pretrained=True)
        assembly.model.train()
        return assembly, [assembly.processor.encode(each) for each in records(count, words)]

    (assembly, examples), (other, others) = built(peft=LORA), built()
    other.model.requires_grad_(False)
    trainer.inject_lora(other)
    stepper = stepper_for(assembly, assembly.plan.run_context.train)
    labels = sum(each.num_label_tokens for each in examples)

    def ours() -> float:
        ends = []
        for _ in range(STEPS):
            float(stepper.accumulate(batch_of(assembly.processor, examples), labels))
            float(stepper.gradient_norm())
            stepper.update()
            stepper.clear()
            ends.append(clock())
        return min(after - before for before, after in pairwise(ends))

    def theirs() -> float:
        ends = trainer.train(other, others * STEPS, count, STEPS, folder / "trainer", clock=clock, use_cpu=True)
        return min(after - before for before, after in pairwise(ends))

    return ours, theirs
