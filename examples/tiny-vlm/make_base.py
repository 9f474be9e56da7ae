"""Make a tiny Idefics3 from nothing: it answers easy-VQA's yes/no questions, and nothing else. It is the demo's base.

    python examples/tiny-vlm/make_base.py [FOLDER]

It sees only the yes/no questions about the training images, and takes minutes on a CPU. FOLDER is where the model goes; by default it
replaces the one that ships.

Such a model does not learn to see and to read at once: whether "yes" is right depends on question and image together, and on neither
alone. So it learns in two steps. First, image encoder and connector learn to name what they see in the language model's own words, of which
the answers rule some out. Then the language model learns to ask the image tokens.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from folder import IMAGE_TOKENS, SIDE, write
from torch import Tensor
from torch.nn import Parameter

from graftwork import Run
from graftwork.build import compose
from graftwork.contracts import Assembly, Batch, Encoded, Image, Record, collate, summed_loss
from graftwork_easy_vqa import EasyVqaSource, EasyVqaSourceSettings
from graftwork_registry import Catalog

SHIPPED = Path(__file__).resolve().parents[2] / "plugins" / "demo" / "graftwork_demo" / "base"
COLOURS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
SEED, BATCH, PIECE = 1, 64, 32
PIECES_STEPS, IMAGES_STEPS, SEEING_RATE = 1200, 400, 2e-3
ASKING_STEPS, ASKING_RATE, PLAIN_SHARE = 1500, 2e-3, 0.4
"""Steps, learning rates, and the share of the steps in which nothing is asked in the negative."""


def main() -> None:
    """Begin with random weights, learn in two steps, and write the folder."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED
    random.seed(SEED)
    torch.manual_seed(SEED)
    records = list(EasyVqaSource(EasyVqaSourceSettings(kind="yes-no")).records())
    with TemporaryDirectory() as started:
        write(Path(started), sorted({f" {record.question} {record.turns[-1].text}" for record in records}))
        assembly = begin(started)
        images = list(dict.fromkeys(record.images[0] for record in records))
        first = {record.images[0]: record for record in records}
        pixels = torch.cat([assembly.processor.encode(first[image]).pixels["pixel_values"][0] for image in images])
        learn_to_see(assembly, pixels, possible(records, images))
        learn_to_ask(assembly, pixels, images, records)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        assembly.architecture.write(assembly, target)
    print(f"{target} holds the base: {assembly.adaptation.counts['total']:,} parameters")


def begin(folder: str) -> Assembly:
    """The model of a folder, all of which can be trained."""
    catalog = Catalog.discover()
    run = Run(
        model={"use": "hf-vlm", "weights": folder},
        peft={"use": "full", "on": ["language", "connector", "vision"]},
        data={"source": [{"use": "easy-vqa", "kind": "yes-no"}]},
        train={"precision": "fp32"},
    )
    return compose.build(run.plan(catalog), catalog, device="cpu")


# Seeing ---------------------------------------------------------------------------------------------------------------


def learn_to_see(assembly: Assembly, pixels: Tensor, facts: Tensor) -> None:
    """Train image encoder and connector, and the embeddings of the words for what is seen. Small pieces of images, with the shape in
    them, come first: they have a quarter of the patches, and so take a quarter of the time."""
    model: Any = assembly.model.train()
    words = [word_id(assembly, word) for word in (*COLOURS, *SHAPES)]
    learned = [*model.model.vision_model.parameters(), *model.model.connector.parameters()]
    learned.append(model.get_input_embeddings().weight)
    boxes = shape_boxes(pixels)

    def loss_of(shown: Tensor, rows: Tensor) -> Tensor:
        seen = model.model.connector(model.model.vision_model(shown).last_hidden_state).mean(1)
        colour, shape = model.logits(model.model.text_model.norm(seen))[:, words].split([len(COLOURS), len(SHAPES)], 1)
        both = colour.log_softmax(1)[:, :, None] + shape.log_softmax(1)[:, None]
        return -both.masked_fill(~facts[rows], -torch.inf).flatten(1).logsumexp(1).mean()

    def of_pieces(step: int) -> Tensor:
        rows = torch.randint(len(pixels), (BATCH,))
        return loss_of(turned(pieces(pixels[rows], boxes[rows])), rows)

    def of_images(step: int) -> Tensor:
        rows = torch.randint(len(pixels), (BATCH,))
        return loss_of(turned(pixels[rows]), rows)

    optimize("seeing pieces", learned, SEEING_RATE, PIECES_STEPS, of_pieces)
    optimize("seeing images", learned, SEEING_RATE / 2, IMAGES_STEPS, of_images)


def possible(records: Sequence[Record], images: Sequence[Image]) -> Tensor:
    """`[images, colours, shapes]`, bool: what the answers to the yes/no questions about an image leave possible."""
    place = {image: row for row, image in enumerate(images)}
    left = torch.ones(len(images), len(COLOURS), len(SHAPES), dtype=torch.bool)
    for record in records:
        asked = torch.zeros(len(COLOURS), len(SHAPES), dtype=torch.bool)
        for row, colour in enumerate(COLOURS):
            asked[row] |= f" {colour} " in record.question
        for column, shape in enumerate(SHAPES):
            asked[:, column] |= f" {shape}" in record.question
        left[place[record.images[0]]] &= asked if (record.turns[-1].text == "yes") != negated(record) else ~asked
    return left


def shape_boxes(pixels: Tensor) -> Tensor:
    """`[images, 2, 2]`: the first and the last row, and column, that is not all of the image's ground."""
    ground = pixels.flatten(2).median(2).values[..., None, None]
    drawn = (pixels != ground).any(1)
    lines = torch.stack([drawn.any(2), drawn.any(1)], 1).int()
    return torch.stack([lines.argmax(2), SIDE - 1 - lines.flip(2).argmax(2)], 2)


def pieces(pixels: Tensor, boxes: Tensor) -> Tensor:
    """Of each image a square of `PIECE` pixels, drawn at random from those with as much of its shape in them as can be."""
    ends = torch.stack([boxes[..., 1] + 1 - PIECE, boxes[..., 0]], 2).clamp(0, SIDE - PIECE).sort(2).values
    corners = ends[..., 0] + (torch.rand(ends.shape[:2]) * (ends[..., 1] - ends[..., 0] + 1)).long()
    return torch.stack(
        [image[:, y : y + PIECE, x : x + PIECE] for image, (y, x) in zip(pixels, corners.tolist(), strict=True)]
    )


def turned(pixels: Tensor) -> Tensor:
    """Images mirrored and turned at random, in eight groups: a shape is the same shape, and few images become many."""
    groups = []
    for group in pixels.chunk(8):
        group = group.flip([side for side in (-2, -1) if random.random() < 0.5])
        groups.append(group.transpose(-2, -1) if random.random() < 0.5 else group)
    return torch.cat(groups)


# Asking ---------------------------------------------------------------------------------------------------------------


def learn_to_ask(assembly: Assembly, pixels: Tensor, images: Sequence[Image], records: Sequence[Record]) -> None:
    """Train the language model on what is seen: about all words, answered yes and no, equally often; later in the negative too."""
    model: Any = assembly.model.eval()
    with torch.no_grad():
        seen = dict(zip(images, features(model, pixels), strict=True))
    pools: dict[tuple[bool, str, str], list[Record]] = {}
    for record in records:
        word = next(word for word in (*COLOURS, *SHAPES) if word in record.question)
        pools.setdefault((negated(record), word, record.turns[-1].text), []).append(record)
    encoded: dict[tuple[str, str], Encoded] = {}
    for record in records:  # the text of an encoded record depends on nothing else
        key = record.question, record.turns[-1].text
        encoded[key] = encoded.get(key) or replace(assembly.processor.encode(record), pixels={})
    kinds = sorted(pools)

    def loss_of(step: int) -> Tensor:
        plain = kinds[: len(kinds) // 2]
        chosen = [
            random.choice(pools[random.choice(plain if step < ASKING_STEPS * PLAIN_SHARE else kinds)])
            for _ in range(BATCH)
        ]
        texts = [encoded[record.question, record.turns[-1].text] for record in chosen]
        batch = collate(texts, pad_id=assembly.processor.pad_id)
        known = WithFeatures(model, [seen[record.images[0]] for record in chosen])
        return summed_loss(known, batch) / sum(text.num_label_tokens for text in texts)

    optimize("asking", [*model.model.text_model.parameters()], ASKING_RATE, ASKING_STEPS, loss_of)


def features(model: Any, pixels: Tensor) -> list[Any]:
    """What the image encoder says of each image, as the model takes it."""
    counts = torch.full((BATCH,), IMAGE_TOKENS)
    return [
        each
        for some in pixels.split(BATCH)
        for each in model.encode_images({"pixel_values": some[:, None], "image_tokens": counts[: len(some)]})
    ]


class WithFeatures:
    """A model whose image encoder has already looked."""

    def __init__(self, model: Any, features: Any) -> None:
        self.model, self.features, self.logits = model, features, model.logits

    def __call__(self, batch: Batch) -> Tensor:
        """The final hidden states."""
        return self.model(batch, features=self.features)  # type: ignore[no-any-return]


# Both -----------------------------------------------------------------------------------------------------------------


def optimize(
    stage: str, parameters: Sequence[Parameter], rate: float, steps: int, loss_of: Callable[[int], Tensor]
) -> None:
    """AdamW with a warm-up and a linear end, and a line every hundred steps."""
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.95), weight_decay=0.01)
    begun = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100, (steps - step) / (steps / 2))
        loss = loss_of(step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99 or step == steps - 1:
            seconds = time.process_time() - begun
            print(f"{stage}: step {step + 1}/{steps}  loss {loss.item():.4f}  {seconds:.0f} s of CPU time", flush=True)


def word_id(assembly: Assembly, word: str) -> int:
    """The token that a word is, after a space."""
    (id,) = assembly.processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    return int(id)


def negated(record: Record) -> bool:
    """Whether a question asks for what is not in the image."""
    return " not " in record.question or " no " in record.question


if __name__ == "__main__":
    main()
