"""Models whose batches are made in ways of their own: their records come out as they do alone in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import vlm_trial as trial
from vlm_families import FAMILIES
from vlm_folders import write_family
from vlm_newer import QWEN4

WAYS = {
    "hunyuan_vl": "four positions for each token, one of them the number of the image within its record",
    "cosmos3_edge": "positions that need kinds of tokens, which its processor gives only when asked",
    "minicpmv4_6": "images in a row, one beside another in the last dimension",
    "minicpmv4_7": "positions that need the sizes of the pieces of an image, not of images",
    "qwen4_exp": "layers that choose what they see, and need transformers' masks",
}


@pytest.mark.parametrize("name", WAYS)
def test_a_record_gives_the_same_logits_in_a_mixed_batch_as_alone_in_transformers(name: str, tmp_path: Path) -> None:
    folder = write_family({**FAMILIES, "qwen4_exp": QWEN4}[name], tmp_path)
    assert trial.logits_error(trial.built(folder), trial.theirs(folder)) < 1e-5, WAYS[name]
