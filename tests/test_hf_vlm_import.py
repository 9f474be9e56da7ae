"""Adapters that plain peft made on a vision-language model of transformers are imported, verified against both, and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_hf_vlm_exports import LOOKUP, far, logits_of, theirs

from graftwork.checkpoint.merging import merge
from graftwork.checkpoint.store import Opened, open_checkpoint
from graftwork.errors import WeightsError
from graftwork.foreign.comparing import compare
from graftwork.foreign.diagnosis import diagnose
from graftwork.foreign.importing import import_folder

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers 5


def adapted(base: Path, out: Path, **settings: Any) -> Path:
    """What plain peft saves of an adapter on a base, with random values; it names its base."""
    torch.manual_seed(0)
    model = theirs(base)
    model.config._name_or_path = model.name_or_path = str(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    wrapped.save_pretrained(out)
    return out


def imported(folder: Path, out: Path, **options: Any) -> Opened:
    import_folder(diagnose(folder, LOOKUP, **options), LOOKUP, out)
    return open_checkpoint(out, LOOKUP, device="cpu", precision="fp32")


SLOW = pytest.mark.slow
EVERYWHERE = {"target_modules": ["q_proj", "v_proj"]}
CASES = [
    pytest.param("llava_next", EVERYWHERE, id="llava_next"),
    pytest.param(
        "qwen2_5_vl",
        {"target_modules": r".*language_model.*(q_proj|down_proj)", "modules_to_save": ["merger"]},
        id="qwen2_5_vl",
    ),
    pytest.param("gemma3", {"target_modules": "all-linear"}, id="gemma3", marks=SLOW),
    pytest.param("idefics3", EVERYWHERE | {"use_dora": True}, id="idefics3", marks=SLOW),
    pytest.param("llava", EVERYWHERE | {"trainable_token_indices": [7, 8]}, id="llava", marks=SLOW),
    pytest.param(
        "gemma3",
        EVERYWHERE | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        id="gemma3 tied",
        marks=SLOW,
    ),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_an_adapter_of_plain_peft_is_imported_and_agrees_with_it(
    name: str, settings: dict[str, Any], folder_of: Any, tmp_path: Path
) -> None:
    folder = adapted(folder_of(name), tmp_path / "theirs", **settings)
    opened = imported(folder, tmp_path / "ours")
    found = compare(opened, folder, LOOKUP)
    assert [agreement.inputs for agreement in found.agreements] == ["text and images"] * 2, found.not_compared
    given, ours = logits_of(opened)
    plain = peft.PeftModel.from_pretrained(theirs(folder_of(name)), folder).eval()
    assert far(theirs(folder_of(name)), given, ours) > 1e-2
    assert far(plain, given, ours) < 1e-5
    merge(opened, tmp_path / "merged", LOOKUP)
    assert far(theirs(tmp_path / "merged"), given, ours) < 1e-5


LANGUAGE = ("base_model.model.model.language_model.", "base_model.model.language_model.model.")
TOWER = ("base_model.model.model.vision_tower.", "base_model.model.vision_tower.vision_model.")
OLD = {
    "llava": (LANGUAGE, TOWER),
    "llava_next": (LANGUAGE, TOWER),
    "gemma3": (LANGUAGE, TOWER),
    "qwen2_5_vl": (
        ("base_model.model.model.language_model.", "base_model.model.model."),
        ("base_model.model.model.visual.", "base_model.model.visual."),
    ),
}
"""What transformers 5 calls modules, and what versions before 4.52 called them."""


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl", *(pytest.param(name, marks=SLOW) for name in OLD if name != "qwen2_5_vl")]
)
def test_an_adapter_under_the_names_of_an_older_transformers_is_the_same(
    name: str, folder_of: Any, tmp_path: Path
) -> None:
    linear = {"target_modules": ["q_proj", "v_proj", "qkv"]}
    folder = adapted(folder_of(name), tmp_path / "theirs", **linear)
    wanted = logits_of(imported(folder, tmp_path / "ours"))[1]
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {}
    for key, tensor in tensors.items():
        begin, new = next((pair for pair in OLD[name] if key.startswith(pair[0])), ("", ""))
        renamed[new + key.removeprefix(begin)] = tensor
    assert renamed.keys().isdisjoint(tensors)
    save_file(renamed, folder / "adapter_model.safetensors")
    opened = imported(folder, tmp_path / "old")
    assert logits_of(opened)[1].equal(wanted)
    found = compare(opened, folder, LOOKUP)
    if name == "qwen2_5_vl":  # peft itself does not know the old names
        assert "it has a place for none of its tensors" in found.not_compared[0]
    else:
        assert len(found.agreements) == 2


def test_a_base_that_is_named_by_a_relative_path_is_found_beside_the_adapter(
    folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapted(folder_of("qwen2_5_vl"), tmp_path / "runs" / "theirs", **EVERYWHERE)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "models/vlm"}))
    found = diagnose(folder, LOOKUP)
    assert (
        found.description == "an adapter alone: LoRA of rank 4, alpha 8, dropout 0, on 4 linear layers (q_proj, v_proj)"
    )
    assert found.command.endswith("--base DIR")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "vlm").symlink_to(folder_of("qwen2_5_vl"))
    monkeypatch.chdir("/")
    assert imported(folder, tmp_path / "ours").verification.distance > 1e-2


def test_a_whole_model_that_was_trained_elsewhere_is_imported_with_its_base(folder_of: Any, tmp_path: Path) -> None:
    base = folder_of("gemma3")
    model = theirs(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name and "language" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(tmp_path / "theirs")
    for file in base.iterdir():
        if not (tmp_path / "theirs" / file.name).exists():
            shutil.copyfile(file, tmp_path / "theirs" / file.name)
    found = diagnose(tmp_path / "theirs", LOOKUP, base=base)
    assert found.description == "a whole 'gemma3' model of transformers, in 1 file"
    opened = imported(tmp_path / "theirs", tmp_path / "ours", base=base)
    assert opened.assembly.plan.model_spec.also_train == ("language.mlp",)
    (agreement,) = compare(opened, tmp_path / "theirs", LOOKUP).agreements
    assert agreement.readers == (f"transformers {transformers.__version__}",)
    given, ours = logits_of(opened)
    assert far(model, given, ours) < 1e-5
    with pytest.raises(
        WeightsError, match=r"^--base: .*: its model_type is llava, and the folder was trained with gemma3$"
    ):
        diagnose(tmp_path / "theirs", LOOKUP, base=folder_of("llava"))


def test_a_folder_of_a_model_that_cannot_be_trained_here_says_why(folder_of: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("llava"), tmp_path / "theirs"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    assert "quantized by awq, and only whole ones can be read" in diagnose(folder, LOOKUP).refused
    on_it = adapted(folder_of("llava"), tmp_path / "adapter", **EVERYWHERE)
    refused = diagnose(on_it, LOOKUP, base=folder).refused
    assert refused.startswith(f"its base '{folder}' cannot be used: ") and "quantized by awq, and only whole" in refused
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    assert diagnose(folder, LOOKUP).architecture == ""
