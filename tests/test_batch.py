"""Records become a batch without losing what the model is told of tokens and images."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from tiny_vlm import CharProcessor, TinyVlm, question, tiny_assembly

from graftwork.checkpoint.verification import TOKEN_FIELDS, golden_inputs
from graftwork.contracts import IGNORED, Batch, Encoded, Record, batch_of, collate
from graftwork.data.training_data import cut
from graftwork.evaluate.generation import answer, encode_prompt


class KindProcessor(CharProcessor):
    """Tells the model the kind of each token, and when it is collated the place of each."""

    def encode(self, record: Record) -> Encoded:
        encoded = super().encode(record)
        return replace(encoded, token_fields={"kinds": [1 + place for place in encoded.image_token_mask]})

    def complete(self, batch: Batch) -> Batch:
        places = batch.attention_mask.long().cumsum(-1)
        return replace(batch, token_fields={**batch.token_fields, "places": torch.stack([places, -places], 1)})


def encoded(tokens: int, **pixels: torch.Tensor) -> Encoded:
    return Encoded([5] * tokens, [False] * tokens, [IGNORED] * (tokens - 1) + [5], pixels)


def test_a_batch_is_what_lists_padded_one_by_one_are() -> None:
    draw, longest = random.Random(3), 9
    examples = []
    for tokens in (1, longest, 4, 6):
        labels = [draw.choice((IGNORED, draw.randrange(50))) for _ in range(tokens)]
        ids, seen = [draw.randrange(50) for _ in range(tokens)], [draw.random() < 0.5 for _ in range(tokens)]
        examples.append(Encoded(ids, seen, labels, {}, weight=draw.random(), token_fields={"kinds": ids[::-1]}))
    for side in ("right", "left"):

        def padded(row: Any, filler: int) -> list[int]:
            filling = [filler] * (longest - len(row))
            return [*row, *filling] if side == "right" else [*filling, *row]  # noqa: B023

        batch = collate(examples, pad_id=7, side=side)
        labels = [padded(each.labels, IGNORED) for each in examples]
        predicting = [longest * row + at - 1 for row in range(4) for at in range(1, longest) if labels[row][at] >= 0]
        assert batch.input_ids.tolist() == [padded(each.input_ids, 7) for each in examples]
        assert batch.attention_mask.tolist() == [padded([True] * len(each.input_ids), False) for each in examples]
        assert batch.image_token_mask.tolist() == [padded(each.image_token_mask, False) for each in examples]
        assert batch.token_fields["kinds"].tolist() == [padded(each.token_fields["kinds"], 0) for each in examples]
        assert batch.labels.tolist() == labels
        assert batch.label_positions is not None and batch.label_positions.tolist() == predicting
        counts = [sum(label >= 0 for label in row[1:]) for row in labels]
        assert batch.weights == [(each.weight, count) for each, count in zip(examples, counts, strict=True)]
        fields = (batch.input_ids, batch.labels, batch.label_positions, batch.token_fields["kinds"])
        assert {each.dtype for each in fields} == {torch.int64}
        assert batch.attention_mask.dtype == batch.image_token_mask.dtype == torch.bool


def test_what_there_is_for_each_token_is_kept_as_arrays_whatever_it_was_given_as() -> None:
    given = Encoded(
        (5, 6), [True, False], numpy.array([IGNORED, 6], dtype=numpy.int32), {}, token_fields={"kinds": [1, 2]}
    )
    held = (given.input_ids, given.labels, given.token_fields["kinds"])
    assert [each.dtype for each in held] == [numpy.int64] * 3 and given.image_token_mask.dtype == bool
    assert [each.tolist() for each in held] == [[5, 6], [IGNORED, 6], [1, 2]]
    assert given.num_label_tokens == 1 and replace(given, weight=2.0).labels is given.labels


def test_what_is_seen_of_images_is_joined_with_zeros_at_the_ends() -> None:
    small, wide = torch.ones(1, 2, 3), torch.full((2, 1, 5), 2.0)
    joined = collate([encoded(1, eye=small), encoded(1), encoded(1, eye=wide)], pad_id=0).pixels["eye"]
    assert joined.shape == (3, 2, 5)
    assert torch.equal(joined[:1, :2, :3], small) and torch.equal(joined[1:, :1, :5], wide)
    assert joined.sum() == small.sum() + wide.sum()


def test_tensors_of_one_shape_are_joined_as_they_are() -> None:
    grid = torch.tensor([[1, 4, 6]])
    joined = collate([encoded(1, grid=grid), encoded(1, grid=2 * grid)], pad_id=0).pixels["grid"]
    assert joined.tolist() == [[1, 4, 6], [2, 8, 12]]


@pytest.mark.parametrize(("side", "short"), [("right", [2, 1, 0, 0]), ("left", [0, 0, 2, 1])])
def test_token_fields_are_padded_as_the_tokens_are(side: str, short: list[int]) -> None:
    rows = [replace(encoded(2), token_fields={"kinds": [2, 1]}), encoded(4)]
    batch = collate(rows, pad_id=0, side=side).to("cpu")
    assert batch.token_fields["kinds"].tolist() == [short, [0, 0, 0, 0]]


def test_token_fields_are_cut_with_the_tokens() -> None:
    record = replace(encoded(4), labels=[5] * 4, token_fields={"kinds": [1, 2, 3, 4]})
    assert cut(record, 3).token_fields["kinds"].tolist() == [1, 2, 3]


def test_golden_inputs_hold_what_the_model_was_told_of_each_token() -> None:
    processor = KindProcessor()
    record = processor.encode(question("q", "ab", image="a.png"))
    golden = golden_inputs([replace(record, labels=list(record.input_ids))], processor)  # type: ignore[arg-type]
    assert golden[TOKEN_FIELDS + "kinds"].tolist() == [[2, 2, 1, 1]]
    assert golden[TOKEN_FIELDS + "places"].tolist() == [[[1, 2, 3, 4], [-1, -2, -3, -4]]]


def test_a_generated_token_is_of_kind_zero() -> None:
    told: list[dict[str, torch.Tensor]] = []

    class Told(TinyVlm):
        def forward(self, batch: Batch, features: Any = None, cache: Any = None) -> torch.Tensor:
            told.append(batch.token_fields)
            return super().forward(batch, features, cache)

    assembly = tiny_assembly()
    assembly.model, assembly.processor = Told(), KindProcessor()
    prompts = [encode_prompt(assembly, question("q", text), 3) for text in ("ab", "c")]
    answer(assembly, prompts, max_new_tokens=3)
    assert told[0]["kinds"].tolist() == [[1, 1], [0, 1]] and told[0]["places"].shape == (2, 2, 2)
    assert len(told) > 1
    for fields in told[1:]:
        assert fields["kinds"].tolist() == [[0], [0]] and not fields["places"].any()


def test_a_processor_without_a_hook_leaves_the_batch_as_it_is() -> None:
    assert batch_of(CharProcessor(), [encoded(2)], side="left").token_fields == {}
