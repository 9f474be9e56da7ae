"""Make a tiny MGM-Gemma that answers easy-VQA's yes/no questions, and nothing else.

    python examples/demo-base/make_base.py [FOLDER]

It sees only the yes/no questions about the training images, and takes a quarter of an hour or more on two CPU cores. FOLDER is
where the base goes; by default it replaces the one in this folder.

Such a model does not learn to see and to read at once: whether "yes" is right depends on question and image together,
and on neither alone. So it learns in two steps. First, towers, mining and connector learn to answer without reading, as
CLIP is trained before it is put into a larger model: every distinct question is one output of a linear head on the mean of
the image tokens, which is thrown away afterwards. Then the language model learns to ask the image tokens, from one
word to all of them.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from graftwork.build import compose
from graftwork.config import runfile
from graftwork.config.resolve import resolve
from graftwork.config.restore import restore_component
from graftwork.contracts import Assembly, Batch, DataSource, Image, Record, collate, summed_loss
from graftwork_registry import Catalog

HERE = Path(__file__).resolve().parent
MADE = HERE / "base"
WORDS = ["red", "green", "blue", "black", "gray", "teal", "brown", "yellow", "circle", "rectangle", "triangle"]
BATCH = 64
VISION_STEPS, VISION_RATE = 1500, 2e-3
LANGUAGE_STEPS, LANGUAGE_RATE, STEPS_PER_WORD = 3000, 2e-3, 50


def main() -> None:
    """Tokenizer, vision, language, and the folder."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else MADE
    subprocess.run([sys.executable, HERE / "make_tokenizer.py"], check=True)
    catalog = Catalog.discover()
    plan = resolve(runfile.load(HERE / "base.toml"), catalog, kernels=["sdpa"])
    assembly = compose.build(plan, catalog, device="cpu")
    source = restore_component(plan.run_context.sources[0], catalog)
    assert isinstance(source, DataSource)
    records = [record for record in source.records() if isinstance(record, Record)]
    random.seed(plan.run_context.seed)
    torch.manual_seed(plan.run_context.seed)

    pixels = learn_to_see(assembly, records)
    learn_to_ask(assembly, records, pixels)
    assembly.model.eval()
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    assembly.architecture.write(assembly, target)
    print(f"{target} holds the base: {assembly.adaptation.counts['total']:,} parameters")


def learn_to_see(assembly: Assembly, records: Sequence[Record]) -> dict[Image, dict[str, torch.Tensor]]:
    """Train everything before the language model; returns the pixels of every image."""
    model = assembly.model.train()
    questions = sorted({record.question for record in records})
    first = {record.images[0]: record for record in reversed(records)}
    place = {image: row for row, image in enumerate(first)}
    answers = torch.full((len(first), len(questions)), float("nan"))  # Not every question is asked about every image.
    for record in records:
        answers[place[record.images[0]], questions.index(record.question)] = float(record.turns[-1].text == "yes")
    pixels = {image: dict(assembly.processor.encode(record).pixels) for image, record in first.items()}
    stacked = join(list(pixels.values()))
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale_parameter"):
            # ConvNeXt starts it at 1e-6, which suits deep ones; a shallow one would see no shapes for a long time.
            parameter.data.fill_(0.1)
    head = torch.nn.Linear(model.model.embed_tokens.embedding_dim, len(questions))
    seeing = {name: p for name, p in assembly.trained().items() if ".layers." not in name or "vision" in name}
    for step, _ in optimize([*seeing.values(), *head.parameters()], VISION_RATE, VISION_STEPS):
        rows = torch.randint(len(first), (BATCH,))
        tokens = model.image_tokens(model.maps(turn({part: values[rows] for part, values in stacked.items()})))
        wanted = answers[rows]
        asked = ~wanted.isnan()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head(tokens.mean(1))[asked], wanted[asked])
        loss.backward()
        report("seeing", step, VISION_STEPS, loss)
    return pixels


def learn_to_ask(assembly: Assembly, records: Sequence[Record], pixels: dict[Image, dict[str, torch.Tensor]]) -> None:
    """Train the language model on what is seen, on balanced questions: about one word at first, then about more and more,
    then in the negative, and at last on all questions as they are."""
    model, processor = assembly.model.eval(), assembly.processor
    by_kind: dict[tuple[bool, str], dict[str, list[int]]] = {}
    for index, record in enumerate(records):
        kind = " not " in record.question, next(word for word in WORDS if word in record.question)
        by_kind.setdefault(kind, {"yes": [], "no": []})[record.turns[-1].text].append(index)
    order = [(negated, word) for negated in (False, True) for word in WORDS]
    with torch.no_grad():
        seen = {image: model.encode_images(one) for image, one in pixels.items()}
    encoded = [processor.encode(record) for record in records]
    reading = {name: p for name, p in assembly.trained().items() if "vision" not in name}
    balanced_until = LANGUAGE_STEPS * 4 // 5
    for step, _ in optimize(list(reading.values()), LANGUAGE_RATE, LANGUAGE_STEPS):
        chosen = []
        for _ in range(BATCH):
            answers = by_kind[random.choice(order[: 1 + step // STEPS_PER_WORD])]
            pool = answers[random.choice(("yes", "no"))] if step < balanced_until else range(len(records))
            chosen.append(random.choice(pool))
        batch: Batch = collate([encoded[index] for index in chosen], pad_id=processor.pad_id)
        features = [feature for index in chosen for feature in seen[records[index].images[0]]]
        loss = summed_loss(WithFeatures(model, features), batch) / sum(
            encoded[index].num_label_tokens for index in chosen
        )
        loss.backward()
        report("asking", step, LANGUAGE_STEPS, loss)


class WithFeatures:
    """A model whose towers have already looked."""

    def __init__(self, model: Any, features: Any) -> None:
        self.model, self.features, self.logits = model, features, model.logits

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The final hidden states."""
        return self.model(batch, features=self.features)  # type: ignore[no-any-return]


def optimize(
    parameters: list[torch.nn.Parameter], rate: float, steps: int
) -> Iterator[tuple[int, torch.optim.Optimizer]]:
    """AdamW with a warm-up and a linear end; the body of the loop that runs over this makes the gradients."""
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100, (steps - step) / (steps / 3))
        yield step, optimizer
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def turn(pixels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The images mirrored and turned at random, all parts alike: a shape is the same shape, and few images become many."""
    flips = [dim for dim in (-2, -1) if random.random() < 0.5]
    turned = {part: values.flip(flips) for part, values in pixels.items()}
    return {part: values.transpose(-2, -1) for part, values in turned.items()} if random.random() < 0.5 else turned


def join(pixels: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All images in one tensor for each part."""
    return {part: torch.cat([one[part] for one in pixels]) for part in pixels[0]}


def report(stage: str, step: int, steps: int, loss: torch.Tensor) -> None:
    """A line every hundred steps."""
    if step % 100 == 0 or step == steps - 1:
        print(f"{stage}: step {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
