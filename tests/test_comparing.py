"""An import is compared with what peft and transformers make of the same folder, and the words say which of them did."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from foreign_folders import change, edit
from peft_adapters import BASES, LOOKUP, build_base, make
from safetensors.torch import load_file, save_file

from graftwork.checkpoint import manifest
from graftwork.checkpoint.store import Opened, open_checkpoint
from graftwork.errors import CheckpointError
from graftwork.foreign.comparing import compare
from graftwork.foreign.diagnosis import diagnose
from graftwork.foreign.importing import import_folder
from graftwork_lora import Lora

PEFT, TRANSFORMERS = f"peft {peft.__version__}", f"transformers {transformers.__version__}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole MGM folder, whose head is its embeddings."""
    return build_base(BASES["tied"], tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """An adapter that peft made, with DoRA."""
    make("DoRA", BASES["tied"], base, folder := tmp_path_factory.mktemp("made") / "adapter")
    return folder


def bring_in(folder: Path, out: Path, base: Path | None = None, **parts: Path) -> Opened:
    """A checkpoint of a folder, opened."""
    if base:
        parts = {part: base / part for part in ("low", "high")}
    import_folder(diagnose(folder, LOOKUP, base=base, parts=parts), LOOKUP, out, kernels=["sdpa"])
    return open_checkpoint(out, LOOKUP, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, made: Path, base: Path) -> Opened:
    """The checkpoint of that adapter."""
    return bring_in(made, tmp_path_factory.mktemp("imported") / "checkpoint", base)


@pytest.fixture
def copy(tmp_path: Path, made: Path) -> Path:
    """The adapter's folder, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_an_adapter_is_verified_against_peft_on_text_and_images(opened: Opened, made: Path) -> None:
    found = compare(opened, made, LOOKUP)
    assert found.words == f"verified against {PEFT} and {TRANSFORMERS}"
    assert [(each.readers, each.inputs) for each in found.agreements] == [
        ((PEFT, TRANSFORMERS), "text"),
        ((PEFT,), "text and images"),
    ]
    assert all(each.error <= each.tolerance == pytest.approx(1e-4) for each in found.agreements)
    assert found.not_compared == ()


def scaled(name: str, tensor: Any) -> Any:
    return tensor * 1.01 if "layers.1" in name and "lora_B" in name else tensor


@pytest.mark.parametrize(
    "changed",
    [
        lambda folder: edit(folder / "adapter_config.json", lora_alpha=9),
        lambda folder: edit(folder / "adapter_config.json", use_rslora=True),
        lambda folder: edit(folder / "adapter_config.json", alpha_pattern={"v_proj": 9}),
        lambda folder: change(folder / "adapter_model.safetensors", scaled),
    ],
    ids=["alpha", "rslora", "alpha of one layer", "a hundredth of one matrix"],
)
def test_a_checkpoint_that_is_another_model_than_peft_makes_is_refused(
    opened: Opened, copy: Path, changed: Callable[[Path], None]
) -> None:
    changed(copy)
    with pytest.raises(CheckpointError) as caught:
        compare(opened, copy, LOOKUP)
    assert caught.value.sentence.startswith(
        f"'{copy}' opened by {PEFT} and {TRANSFORMERS} is another model than the import: on text, logits of up to "
    )


def test_a_tensor_that_peft_leaves_unread_is_named(opened: Opened, copy: Path) -> None:
    odd = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file({**tensors, odd: torch.ones(4, 32)}, copy / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        compare(opened, copy, LOOKUP)
    assert caught.value.sentence.startswith(
        f"'{copy}' opened by {PEFT}: 1 of its tensors have no place, and 0 are missing;"
    )
    assert caught.value.details == (odd,)


def test_names_that_peft_does_not_know_leave_the_proof_to_the_checkpoint_itself(opened: Opened, copy: Path) -> None:
    file = copy / "adapter_model.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in load_file(file).items()}, file)
    found = compare(opened, copy, LOOKUP)
    assert found.words == "reopens as saved"
    assert found.agreements == ()
    assert found.not_compared[-1].startswith(
        f"{PEFT} cannot open '{copy}': it has a place for none of its tensors, such"
    )


def test_without_peft_the_proof_is_of_the_checkpoint_against_itself(
    opened: Opened, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lora, "open_elsewhere", lambda *_: None)
    found = compare(opened, made, LOOKUP)
    assert (found.words, found.agreements) == ("reopens as saved", ())
    assert found.not_compared == ("with itself alone: no library that is known here opens such a folder",)


def test_an_adapter_that_does_next_to_nothing_is_not_said_to_be_compared(opened: Opened, made: Path) -> None:
    weak = replace(opened, verification=replace(opened.verification, distance=1e-6))
    found = compare(weak, made, LOOKUP)
    assert found.words == "reopens as saved"
    assert found.not_compared[0].startswith("with itself alone: its adapter moves no logit by more than 1e-06")


def test_a_whole_model_is_verified_against_transformers_on_text(tmp_path: Path, base: Path) -> None:
    parts = {part: base / part for part in ("low", "high")}
    whole = bring_in(base, tmp_path / "checkpoint", **parts)
    found = compare(whole, base, LOOKUP)
    assert found.words == f"verified against {TRANSFORMERS}"
    assert [each.inputs for each in found.agreements] == ["text"]
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    edit(copy / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(CheckpointError, match=rf"opened by {TRANSFORMERS} is another model than the import: on text, "):
        compare(whole, copy, LOOKUP)


def test_what_was_found_out_is_recorded_in_the_sealed_manifest(tmp_path: Path, opened: Opened) -> None:
    copy = Path(shutil.copytree(opened.folder, tmp_path / "copy"))
    manifest.record(copy, {"verified": "verified against other 1.0"})
    read = manifest.read(copy)
    assert read.provenance == {**opened.manifest.provenance, "verified": "verified against other 1.0"}
    assert sorted(tmp_path.iterdir()) == [copy]
