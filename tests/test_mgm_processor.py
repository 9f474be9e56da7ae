"""MGM's prompt and labels against the published ones, and what does not fit them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from mgm_folders import GOLDEN, small
from PIL import Image as PILImage

from graftwork.conformance.processor import differing
from graftwork.contracts import IGNORED, Encoded, Image, Record, Turn
from graftwork.errors import DataError, WeightsError
from graftwork_mgm.pixels import normalised
from graftwork_mgm.processor import MgmProcessor, load_tokenizer

IMAGE = Image(GOLDEN / "images" / "0000.png")
PREPROCESSED = json.loads((GOLDEN / "preprocess.json").read_text())
CUT = 256
"""The length at which the published labels were cut."""


@pytest.fixture(scope="module")
def processor() -> MgmProcessor:
    """The small model's processor."""
    return small(GOLDEN / "full").processor


def record(*texts: str, images: int = 0) -> Record:
    """A conversation that the user begins."""
    turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))  # type: ignore[arg-type]
    return Record("r", turns, (IMAGE,) * images)


def folded(example: Encoded) -> tuple[list[int], list[int]]:
    """Ids and labels with every image's 16 tokens as one -200, as upstream has them before it looks at images."""
    ids, labels = [], []
    for position, (token, label) in enumerate(zip(example.input_ids, example.labels, strict=True)):
        place = example.image_token_mask[position]
        if not place or not example.image_token_mask[position - 1]:
            ids.append(-200 if place else token)
            labels.append(label)
    return ids, labels


def test_pixels_are_scaled_shifted_and_divided_each_by_itself(processor: MgmProcessor) -> None:
    size, pixels = 24, (processor.images.high or processor.images.low).pixels
    noise = numpy.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=numpy.uint8)
    mean, std = (numpy.array(values, dtype=numpy.float32) for values in (pixels.mean, pixels.std))
    expected = torch.from_numpy((noise.astype(numpy.float32) / 255 - mean) / std).permute(2, 0, 1)[None]
    square = processor.images.square(PILImage.fromarray(noise), pixels, size)
    assert square.dtype == torch.uint8
    found = normalised(square, pixels)
    assert found.equal(expected) and found.is_contiguous()


@pytest.mark.parametrize("golden", PREPROCESSED, ids=[golden["id"] for golden in PREPROCESSED])
def test_ids_and_labels_equal_the_published_ones(processor: MgmProcessor, golden: dict[str, Any]) -> None:
    roles = {"human": "user", "gpt": "assistant"}
    turns = tuple(Turn(roles[turn["from"]], turn["value"]) for turn in golden["conversations"])  # type: ignore[arg-type]
    example = processor.encode(Record(golden["id"], turns, (IMAGE,) if golden["image"] else ()))
    ids, labels = folded(example)
    assert ids[:CUT] == golden["input_ids"]
    assert labels[:CUT] == golden["labels"]


def test_prompts_equal_the_published_ones(processor: MgmProcessor) -> None:
    conversations = [record("<image>\nQ1", images=1), record("<image>\nQ1", "A1", "Q2", images=1)]
    for prompt, conversation in zip(json.loads((GOLDEN / "prompts.json").read_text()), conversations, strict=True):
        before, after = prompt.split("<image>")
        tokenizer = processor.tokenizer
        example = processor.encode(conversation)
        wanted = [*tokenizer(before)["input_ids"], -200, *tokenizer(after, add_special_tokens=False)["input_ids"]]
        assert folded(example)[0] == wanted
        assert example.num_label_tokens == 0
        assert processor.length(conversation) == len(example.input_ids) == len(wanted) + 15


def test_every_answer_is_labelled_with_its_end_and_nothing_else(processor: MgmProcessor) -> None:
    example = processor.encode(record("Name two colors.", "Red and blue.", "And?", "No."))
    num_label_tokens = [label for label in example.labels if label != IGNORED]
    assert processor.tokenizer.decode(num_label_tokens) == "Red and blue.<end_of_turn>\n<eos>No.<end_of_turn>\n<eos>"
    assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))


def test_a_training_example_begins_with_its_prompt(processor: MgmProcessor) -> None:
    conversation = record("<image>\nWhat shape?", "a circle", images=1)
    prompt = processor.encode(conversation.without_answer())
    example = processor.encode(conversation)
    assert [*example.input_ids[: len(prompt.input_ids)]] == [*prompt.input_ids]
    assert set(example.labels[: len(prompt.input_ids)]) == {IGNORED}


def test_decoding_drops_special_tokens_and_space(processor: MgmProcessor) -> None:
    ids = processor.tokenizer("A red circle.<end_of_turn>\n<eos>", add_special_tokens=False)["input_ids"]
    assert processor.decode(ids) == "A red circle."
    assert processor.stop_ids == {1} and processor.pad_id == 0 and processor.vocabulary == 640


@pytest.mark.parametrize(
    ("turns", "images", "sentence"),
    [
        ((), 0, "in record 'r' user and assistant do not take turns; correct the record or leave it out"),
        (("<image>\nQ", "A"), 0, "record 'r' has 0 images and 1 turns with '<image>'; make them agree"),
        (("Q", "A"), 1, "record 'r' has 1 images and 0 turns with '<image>'; make them agree"),
        (("Q<eos>", "A"), 0, "record 'r' has '<eos>' in its text, which would end a turn; remove it"),
        (
            ("Q", "A<end_of_turn>"),
            0,
            "record 'r' has '<end_of_turn>' in its text, which would end a turn; remove it",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_refused(
    processor: MgmProcessor, turns: tuple[str, ...], images: int, sentence: str
) -> None:
    with pytest.raises(DataError) as refused:
        processor.encode(record(*turns, images=images))
    assert str(refused.value) == sentence


def test_two_turns_of_one_side_are_refused(processor: MgmProcessor) -> None:
    with pytest.raises(DataError, match="'r' user and assistant do not take turns"):
        processor.length(Record("r", (Turn("user", "a"), Turn("user", "b"))))


def test_a_saved_processor_reads_back_the_same(processor: MgmProcessor, tmp_path: Path) -> None:
    processor.save(tmp_path)
    again = small(GOLDEN / "full", tokenizer=tmp_path).processor
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pkl"))
    for golden in PREPROCESSED[:4]:
        text = golden["conversations"][0]["value"].replace("<image>", "")
        conversation = record(text, "Grüße 😀\n\n ok")
        assert not differing(again.encode(conversation), processor.encode(conversation))


def test_a_sentencepiece_model_alone_is_the_same_tokenizer(processor: MgmProcessor, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((GOLDEN / "base" / name).read_bytes())
    conversation = record("Grüße 😀\n\n Name two colors.", "Red  and blue.")
    again = small(GOLDEN / "full", tokenizer=tmp_path).processor
    assert not differing(again.encode(conversation), processor.encode(conversation))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds no tokenizer.json or tokenizer.model; copy the model's tokenizer"):
        load_tokenizer(tmp_path, "GemmaTokenizer")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = GOLDEN / "full"
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 600}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="the tokenizer has 640 tokens, the model 600; use the model's own"):
        small(tmp_path, tokenizer=folder)


def test_padding_puts_the_image_in_the_middle_of_the_mean_colour(processor: MgmProcessor) -> None:
    of_low = processor.images.low.pixels
    pixels = normalised(processor.images.square(PILImage.new("RGB", (64, 32), "white"), of_low, 64), of_low)
    mean, std = (torch.tensor(values)[:, None] for values in ((122, 116, 104), processor.images.low.pixels.std))
    grey = (mean / 255 - torch.tensor(processor.images.low.pixels.mean)[:, None]) / std
    torch.testing.assert_close(pixels[0, :, 0], grey.expand(3, 64), atol=1e-5, rtol=0)
    assert pixels[0, :, 32].min() > 1.9


def test_an_image_too_narrow_to_be_made_square_is_refused(processor: MgmProcessor) -> None:
    with pytest.raises(DataError, match="40000 x 10 pixels is too narrow to be made square; cut it"):
        processor.images.square(PILImage.new("RGB", (40_000, 10)), processor.images.low.pixels, 128)


def test_tiles_cut_the_image_row_by_row_behind_the_whole(tmp_path: Path) -> None:
    processor = small(GOLDEN / "full", image_grid=2, image_global=True, image_size_aux=256).processor
    pixels = processor.images.parts(processor.encode(record("<image>\nQ", images=1)).pixels)
    mosaic = torch.nn.functional.interpolate(pixels["high"], size=(112, 112), mode="bilinear")
    whole = torch.nn.functional.interpolate(mosaic, size=(56, 56), mode="bilinear")
    top, bottom = mosaic[..., :56, :], mosaic[..., 56:, :]
    torch.testing.assert_close(
        pixels["low"], torch.cat([whole, top[..., :56], top[..., 56:], bottom[..., :56], bottom[..., 56:]])
    )
    assert sum(processor.encode(record("<image>\nQ", images=1)).image_token_mask) == 5 * 16


def test_without_a_high_part_the_image_is_made_at_the_low_size(tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "base" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = small(tmp_path, high=False, tokenizer=GOLDEN / "base").processor
    pixels = processor.encode(record("<image>\nQ", images=1)).pixels
    assert {part: tuple(tensor.shape) for part, tensor in pixels.items()} == {"low": (1, 3, 56, 56)}
