"""Strategies that shard weights: no process ever holds more than its share and one part, and the model is the same."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from loading_peak import LOOKUP, digests
from safetensors.torch import load_file, save_file
from tiny_runs import LORA, METHODS, plan_of

from graftwork.build import compose
from graftwork.build.sharding import parts_of
from graftwork.contracts import Assembly, within
from graftwork.jobs import launching

TESTS = Path(__file__).parent
STAGE_3: dict[str, Any] = {"memory.zero": {"stage": 3}}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"peft": method, "train.precision": "bf16"} for name, method in METHODS.items() if name != "lora-plus"},
    "connector": {"peft": LORA | {"also_train": ["connector"]}},
    "fresh": {"peft": LORA | {"on": ["language.attention", "connector"]}, "train.precision": "bf16"},
    "nf4": {"memory.use": ["nf4"], "train.precision": "bf16"},
}
"""What is built, by the name of its folder: `fresh` lacks weights for two roles."""


@pytest.fixture(scope="module")
def lacking(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base without a connector."""
    folder = tmp_path_factory.mktemp("lacking") / "base"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("model.safetensors*"))
    fresh = ("model.mm_projector.", "model.vlm_uni_")
    tensors = load_file(base / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith(fresh)}, folder / "model.safetensors")
    return folder


def largest_part(assembly: Assembly) -> int:
    """The bytes of the largest part that is filled at once."""
    left, sizes = dict(assembly.model.named_parameters()), []
    for part in parts_of(assembly):
        names = [name for name in left if not part or within(name, [part])]
        sizes.append(sum(left.pop(name).nbytes for name in names))
    return max(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero"])
def test_two_processes_load_a_share_and_a_part_of_the_same_model(
    engine: str, base: Path, lacking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "zero" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")

    def plan(name: str, more: dict[str, Any]) -> Any:
        return plan_of(lacking if name == "fresh" else base, tmp_path, CASES[name] | more, LOOKUP)

    for name, case in CASES.items():
        use = {"memory.use": [*case.get("memory.use", []), engine]}
        content = json.dumps(plan(name, use | (STAGE_3 if engine == "zero" else {})).to_json())
        (tmp_path / f"{name}.plan").write_text(content, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launching.launch([sys.executable, str(TESTS / "loading_peak.py"), str(tmp_path)], 2) == 0
    for name in CASES:
        assembly = compose.build(plan(name, {}), LOOKUP, device="cpu")
        whole, expected = sum(p.nbytes for p in assembly.model.parameters()), digests(assembly)
        for rank in range(2):
            found = json.loads((tmp_path / f"{name}.{rank}").read_text(encoding="utf-8"))
            assert found["digests"] == expected
            if name not in ("nf4", "pissa"):  # which round or decompose a weight, and that takes more for a moment
                assert found["peak"] <= found["share"] + largest_part(assembly)
            if name == "lora":
                assert found["share"] < 0.6 * whole
