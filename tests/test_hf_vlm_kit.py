"""The kit judges models without tower slots in full: it finds nothing wrong with `hf-vlm`, and planted faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vlm_families import write

from graftwork.conformance import examine
from graftwork.contracts import IGNORED, Record
from graftwork_hf_vlm import HfVlm


class Wrong(HfVlm):
    """A model with a fault; a subclass says which"""

    def build(self, *given: Any) -> Any:
        structure = super().build(*given)
        self.spoil(structure.model)
        return structure

    def spoil(self, model: Any) -> None: ...


class Shifted(Wrong):
    """Its images have the features of the image before"""

    def spoil(self, model: Any) -> None:
        encode = model.encode_images
        model.encode_images = lambda pixels: [*encode(pixels)[-1:], *encode(pixels)[:-1]]


class FromTheLeft(Wrong):
    """It counts the positions of generated tokens from the left, as if an image took as many as it has tokens"""

    def spoil(self, model: Any) -> None:
        positions = model.positions

        def counted(batch: Any, cache: Any, begins: bool) -> torch.Tensor:
            found = positions(batch, cache, begins)
            plain = batch.attention_mask.long().cumsum(-1) - 1
            return found if begins else plain[:, -found.shape[-1] :].expand_as(found)

        model.positions = counted


class Early(HfVlm):
    """Its labels come a token early"""

    def processor(self, *given: Any) -> Any:
        processor: Any = super().processor(*given)
        encode = processor.encode

        def early(record: Record) -> Any:
            encoded = encode(record)
            return replace(encoded, labels=[*encoded.labels[1:], IGNORED])

        processor.encode = early
        return processor


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_the_kit_finds_nothing_wrong(name: str, tmp_path: Path) -> None:
    found = [outcome for outcome in examine(HfVlm, config=write(name, tmp_path)) if outcome.state != "passed"]
    assert [outcome.check for outcome in found] == ["optional parts may be empty"], found


@pytest.mark.parametrize(
    ("faulty", "check"),
    [
        (Shifted, "features can be kept"),
        (FromTheLeft, "a cache changes nothing"),
        (Early, "tokens labels and length agree"),
    ],
)
def test_the_kit_finds_a_fault(faulty: Any, check: str, tmp_path: Path) -> None:
    outcomes = {outcome.check: outcome for outcome in examine(faulty, config=write("qwen2_5_vl", tmp_path))}
    assert outcomes[check].state == "failed"
