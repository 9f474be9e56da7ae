"""MGM's numbers, against what the published implementation computed on the same weights (see golden/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_table import MEASURED
from mgm_folders import GOLDEN, Small, base_with_trained_connector, imported, published, small, with_lora
from torch.nn import functional

from graftwork.contracts import IGNORED, Assembly, Batch, Encoded, Image, Record, Turn, collate

Built = Small | Assembly
Close = Callable[[str, Any, Any, float], None]
BUILT: dict[str, tuple[str, Callable[[Path], Built]]] = {
    "full": ("full_fp32", lambda _: published()),
    "lora": ("lora", lambda _: with_lora()),
    "lora, off": ("lora_off", lambda _: base_with_trained_connector()),
    "full, imported": ("full_fp32", lambda out: imported("full", out)),
    "merged, imported": ("lora", lambda out: imported("merged", out)),
    "lora, imported": ("lora", lambda out: imported("lora", out)),
    "lora, imported, off": ("lora_off", lambda out: off(imported("lora", out))),
}
"""Model to the name of its published numbers, and how to build it into an empty folder."""
KEPT: dict[str, Built] = {}
LEFT_OFF = ExitStack()


@pytest.fixture(params=BUILT)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Built]:
    """A model, built once, with the name of its published numbers."""
    name, build = BUILT[request.param]
    if request.param not in KEPT:
        KEPT[request.param] = build(tmp_path_factory.mktemp("imported") / "checkpoint")
    return name, KEPT[request.param]


def off(assembly: Assembly) -> Assembly:
    """With its adapter off, for good."""
    LEFT_OFF.enter_context(assembly.disable_adapter())
    return assembly


@pytest.fixture
def close(record_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> Close:
    """Compares with published numbers, and notes how far they are for the table at the end of the tests.

    Where a number is larger than 1, the error is relative to it."""

    def compare(what: str, got: Any, wanted: Any, tolerance: float) -> None:
        wanted = np.asarray(wanted)
        error = float((np.abs(np.asarray(got) - wanted) / np.maximum(1.0, np.abs(wanted))).max())
        model = request.node.callspec.params["case"]
        record_property(MEASURED, [what, model, error, tolerance])
        assert error <= tolerance, f"{what} of {model}: {error:.3g}"

    return compare


@pytest.fixture(scope="module")
def expected() -> Any:
    """The published implementation's numbers."""
    with np.load(GOLDEN / "expected.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def inputs() -> Any:
    """The published implementation's inputs."""
    with np.load(GOLDEN / "inputs.npz") as file:
        return dict(file)


def question(inputs: Any, i: int) -> Record:
    """The i-th question of the golden inputs."""
    text, image = str(inputs[f"question.{i}"]), str(inputs[f"image.{i}"]).rpartition("/")[2]
    return Record(f"q{i}", (Turn("user", f"<image>\n{text}"),), (Image(GOLDEN / "images" / image),))


def encoded(model: Built, inputs: Any) -> list[Encoded]:
    """The three golden questions, as the processor encodes them."""
    return [model.processor.encode(question(inputs, i)) for i in range(3)]


def run(model: Built, batch: Batch) -> torch.Tensor:
    """All logits of a batch."""
    with torch.no_grad():
        return model.model.logits(model.model(batch))


def greedy(model: Built, examples: list[Encoded], steps: int) -> list[list[int]]:
    """Greedy answers to prompts of different lengths, padded on the left and with a cache."""
    batch, cache, chosen = collate(examples, pad_id=0, side="left"), model.model.new_cache(), []
    with torch.no_grad():
        for _ in range(steps):
            token = model.model.logits(model.model(batch, None, cache)[:, -1]).argmax(-1, keepdim=True)
            chosen.append(token)
            mask = torch.cat([batch.attention_mask, torch.ones_like(token, dtype=torch.bool)], dim=1)
            batch = Batch(token, mask, torch.zeros_like(token, dtype=torch.bool), token, {})
    return torch.cat(chosen, dim=1).tolist()


def text_only(ids: Any) -> Encoded:
    """Tokens without an image."""
    tokens = [int(token) for token in ids]
    return Encoded(tokens, [False] * len(tokens), [IGNORED] * len(tokens), {})


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize("i", range(3))
def test_pixels_equal_the_published_ones(inputs: Any, aspect_ratio: str, i: int) -> None:
    processor = small(GOLDEN / "full", aspect_ratio=aspect_ratio).processor
    pixels = processor.images.parts(processor.encode(question(inputs, i)).pixels)
    kind = "" if aspect_ratio == "pad" else "_square"
    np.testing.assert_allclose(pixels["high"], inputs[f"images_aux{kind}.{i}"], atol=1e-6)
    np.testing.assert_allclose(pixels["low"], inputs[f"images{kind}.{i}"], atol=1e-6)


def test_prompt_tokens_equal_the_published_ones(inputs: Any) -> None:
    model = published()
    for i, example in enumerate(encoded(model, inputs)):
        ids = np.where(example.image_token_mask, -200, example.input_ids)
        once = [int(t) for k, t in enumerate(ids) if t != -200 or ids[k - 1] != -200]
        assert once == inputs[f"input_ids.{i}"].ravel().tolist()
        assert sum(example.image_token_mask) == 16


def test_image_tokens_equal_the_published_ones(
    case: tuple[str, Built], inputs: Any, expected: Any, close: Close
) -> None:
    name, model = case
    golden = "lora" if name == "lora_off" else name
    pixels = collate(encoded(model, inputs), pad_id=0).pixels
    with torch.no_grad():
        tokens = model.model.image_tokens(model.model.maps(pixels))
    wanted = np.concatenate([expected[f"{golden}.image_tokens.{i}"].reshape(-1, *tokens.shape[1:]) for i in range(3)])
    close("image tokens", tokens, wanted, 1e-5)


def test_logits_equal_the_published_ones(case: tuple[str, Built], inputs: Any, expected: Any, close: Close) -> None:
    name, model = case
    examples = encoded(model, inputs)
    keys = [key for key in (f"{name}.logits.{i}" for i in range(3)) if key in expected]
    assert keys
    for key in [*keys, *(["lora_merged.logits.0"] if name == "lora" else [])]:
        logits = run(model, collate([examples[int(key[-1])]], pad_id=0))[0]
        close("logits", logits, expected[key], 1e-4)


def test_text_alone_gives_the_published_logits(case: tuple[str, Built], expected: Any, close: Close) -> None:
    name, model = case
    logits = run(model, collate([text_only(expected[f"{name}.textonly.input_ids"])], pad_id=0))[0]
    close("logits of text alone", logits, expected[f"{name}.textonly.logits"].reshape(logits.shape), 1e-4)


def test_the_loss_of_a_batch_padded_on_the_right_is_the_published_one(
    case: tuple[str, Built], inputs: Any, expected: Any, close: Close
) -> None:
    name, model = case
    batch = collate(encoded(model, inputs), pad_id=0)
    labels = batch.input_ids.masked_fill(batch.image_token_mask | ~batch.attention_mask, IGNORED)
    # The published numbers ignore the first five ids, where an image was still one id.
    labels[:, :4] = IGNORED
    loss = functional.cross_entropy(run(model, batch)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close("loss of a batch", loss, expected[f"{name}.batch.loss"], 1e-5)


def test_greedy_answers_of_a_batch_padded_on_the_left_are_the_published_ones(
    case: tuple[str, Built], inputs: Any, expected: Any, close: Close
) -> None:
    name, model = case
    answers = greedy(model, encoded(model, inputs), 12)
    close("ids of greedy answers", answers, [expected[f"{name}.free_ids.{i}"].tolist() for i in range(3)], 0)


def test_rows_with_and_without_images_do_not_disturb_each_other(inputs: Any, expected: Any) -> None:
    model = published()
    examples = encoded(model, inputs)
    mixed = [examples[2], text_only(expected["full_fp32.textonly.input_ids"]), examples[0]]
    for side in ("left", "right"):
        batch = collate(mixed, pad_id=0, side=side)
        logits = run(model, batch)
        for row, example in enumerate(mixed):
            alone = run(model, collate([example], pad_id=0))[0]
            np.testing.assert_allclose(logits[row][batch.attention_mask[row]], alone, atol=1e-4)
