"""MGM's numbers, against what the published implementation computed on the same weights (see golden/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mgm_folders import GOLDEN, Small, base_with_trained_connector, published, small, with_lora
from torch.nn import functional

from graftwork.batch import IGNORED, Batch, Encoded, collate
from graftwork.records import Picture, Record, Turn

BUILT: dict[str, Callable[[], Small]] = {
    "full_fp32": published,
    "lora": with_lora,
    "lora_off": base_with_trained_connector,
}
KEPT: dict[str, Small] = {}


@pytest.fixture(params=BUILT)
def case(request: pytest.FixtureRequest) -> tuple[str, Small]:
    """A model by the name of its numbers."""
    return request.param, built(request.param)


def built(name: str) -> Small:
    """A model, built once."""
    if name not in KEPT:
        KEPT[name] = BUILT[name]()
    return KEPT[name]


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
    return Record(f"q{i}", (Turn("user", f"<image>\n{text}"),), (Picture(GOLDEN / "images" / image),))


def encoded(model: Small, inputs: Any) -> list[Encoded]:
    """The three golden questions, as the processor encodes them."""
    return [model.processor.encode(question(inputs, i)) for i in range(3)]


def run(model: Small, batch: Batch) -> torch.Tensor:
    """All logits of a batch."""
    with torch.no_grad():
        return model.model.logits(model.model(batch))


def greedy(model: Small, examples: list[Encoded], steps: int) -> list[list[int]]:
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
    """Tokens without a picture."""
    tokens = [int(token) for token in ids]
    return Encoded(tokens, [False] * len(tokens), [IGNORED] * len(tokens), {})


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
@pytest.mark.parametrize("i", range(3))
def test_pixels_equal_the_published_ones(inputs: Any, aspect_ratio: str, i: int) -> None:
    processor = small(GOLDEN / "full", aspect_ratio=aspect_ratio).processor
    pixels = processor.encode(question(inputs, i)).pixels
    kind = "" if aspect_ratio == "pad" else "_square"
    np.testing.assert_allclose(pixels["high"], inputs[f"images_aux{kind}.{i}"], atol=1e-6)
    np.testing.assert_allclose(pixels["low"], inputs[f"images{kind}.{i}"], atol=1e-6)


def test_prompt_tokens_equal_the_published_ones(inputs: Any) -> None:
    model = built("full_fp32")
    for i, example in enumerate(encoded(model, inputs)):
        ids = np.where(example.picture_positions, -200, example.input_ids)
        once = [int(t) for k, t in enumerate(ids) if t != -200 or ids[k - 1] != -200]
        assert once == inputs[f"input_ids.{i}"].ravel().tolist()
        assert sum(example.picture_positions) == 16


def test_picture_tokens_equal_the_published_ones(case: tuple[str, Small], inputs: Any, expected: Any) -> None:
    name, model = case
    golden = "lora" if name == "lora_off" else name
    pixels = collate(encoded(model, inputs), pad_id=0).pixels
    with torch.no_grad():
        tokens = model.model.picture_tokens(model.model.see(pixels))
    for i in range(3):
        np.testing.assert_allclose(tokens[i], expected[f"{golden}.image_tokens.{i}"], rtol=1e-6, atol=1e-5)


def test_logits_equal_the_published_ones(case: tuple[str, Small], inputs: Any, expected: Any) -> None:
    name, model = case
    examples = encoded(model, inputs)
    for i in range(3):
        if f"{name}.logits.{i}" in expected:
            logits = run(model, collate([examples[i]], pad_id=0))[0]
            np.testing.assert_allclose(logits, expected[f"{name}.logits.{i}"], atol=1e-4)


def test_logits_equal_those_of_the_model_that_upstream_merged(inputs: Any, expected: Any) -> None:
    model = built("lora")
    logits = run(model, collate(encoded(model, inputs)[:1], pad_id=0))[0]
    np.testing.assert_allclose(logits, expected["lora_merged.logits.0"], atol=1e-4)


def test_text_alone_gives_the_published_logits(case: tuple[str, Small], expected: Any) -> None:
    name, model = case
    logits = run(model, collate([text_only(expected[f"{name}.textonly.input_ids"])], pad_id=0))[0]
    np.testing.assert_allclose(logits, expected[f"{name}.textonly.logits"], atol=1e-4)


def test_the_loss_of_a_batch_padded_on_the_right_is_the_published_one(
    case: tuple[str, Small], inputs: Any, expected: Any
) -> None:
    name, model = case
    batch = collate(encoded(model, inputs), pad_id=0)
    labels = batch.input_ids.masked_fill(batch.picture_positions | ~batch.attention_mask, IGNORED)
    # The published numbers ignore the first five ids, where a picture was still one id.
    labels[:, :4] = IGNORED
    loss = functional.cross_entropy(run(model, batch)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert float(loss) == pytest.approx(float(expected[f"{name}.batch.loss"]), abs=1e-5)


def test_greedy_answers_of_a_batch_padded_on_the_left_are_the_published_ones(
    case: tuple[str, Small], inputs: Any, expected: Any
) -> None:
    name, model = case
    answers = greedy(model, encoded(model, inputs), 12)
    assert answers == [expected[f"{name}.free_ids.{i}"].tolist() for i in range(3)]


def test_rows_with_and_without_pictures_do_not_disturb_each_other(inputs: Any, expected: Any) -> None:
    model = built("full_fp32")
    examples = encoded(model, inputs)
    mixed = [examples[2], text_only(expected["full_fp32.textonly.input_ids"]), examples[0]]
    for side in ("left", "right"):
        batch = collate(mixed, pad_id=0, side=side)
        logits = run(model, batch)
        for row, example in enumerate(mixed):
            alone = run(model, collate([example], pad_id=0))[0]
            np.testing.assert_allclose(logits[row][batch.attention_mask[row]], alone, atol=1e-4)
