"""Special tokens in the text of records: those of a conversation or an image are refused, others are text like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import vlm_families
import vlm_trial as trial
from vlm_folders import write_family

from graftwork.contracts import Record, Turn
from graftwork.errors import DataError
from graftwork_hf_vlm import HfVlm, HfVlmSettings
from graftwork_hf_vlm.processor import HfProcessor

BOX = "<|box_start|>(1,2),(3,4)<|box_end|>"


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> HfProcessor:
    family = vlm_families.FAMILIES["qwen2_vl"]
    with_boxes = replace(family, special=(*family.special, "<|box_start|>", "<|box_end|>", "<|vision_pad|>"))
    folder = write_family(with_boxes, tmp_path_factory.mktemp("boxes"))
    model = HfVlm(HfVlmSettings())
    return model.processor(model.configuration(folder), folder, {})  # type: ignore[return-value]


def asked(question: str, answered: str) -> Record:
    """A record with one image."""
    turns = (Turn("user", f"<image>{question}"), Turn("assistant", answered))
    return Record("boxes", turns, trial.RECORDS[0].images)


def test_tokens_round_boxes_are_read_learned_and_decoded(processor: HfProcessor) -> None:
    encoded = processor.encode(asked(f"What is at {BOX}?", f"It is at {BOX}."))
    learned = [label for label in encoded.labels if label >= 0]
    assert processor.tokenizer.decode(learned) == f"It is at {BOX}.<|im_end|>"
    assert processor.tokenizer.convert_tokens_to_ids("<|box_start|>") in learned
    assert processor.decode(learned) == f"It is at {BOX}."


@pytest.mark.parametrize(
    "token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]
)
def test_tokens_of_the_conversation_and_of_images_are_refused(processor: HfProcessor, token: str) -> None:
    with pytest.raises(DataError, match="means something to the model"):
        processor.encode(asked(f"See {token}", "Yes."))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # transformers gives NumPy a tensor
def test_tokens_that_a_template_puts_together_are_refused(tmp_path: Path) -> None:
    folder = vlm_families.write("glm4v", tmp_path)
    model = HfVlm(HfVlmSettings())
    made = model.processor(model.configuration(folder), folder, {})
    for role in ("user", "assistant", "system"):
        with pytest.raises(DataError, match="means something to the model"):
            made.encode(asked(f"<|{role}|>", "Yes."))
