"""Checkpoints made of folders that other code wrote."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from foreign_folders import change, edit, run_folder, zoo
from mgm_folders import GOLDEN, LOOKUP, TOWER_FOLDERS
from safetensors.torch import load_file, save_file

from graftwork.checkpoint.merging import export
from graftwork.checkpoint.store import Opened, open_checkpoint
from graftwork.cli import main
from graftwork.errors import AdapterError, CheckpointError, WeightsError
from graftwork.foreign.diagnosis import diagnose
from graftwork.foreign.importing import Imported, import_folder
from graftwork.weights import shapes

BASE = GOLDEN / "base"


def bring_in(folder: Path, out: Path, base: Path | None = BASE, parts: dict[str, Path] | None = None) -> Imported:
    """Import a folder."""
    return import_folder(
        diagnose(folder, LOOKUP, base=base, parts=TOWER_FOLDERS if parts is None else parts), LOOKUP, out
    )


def opened(folder: Path) -> Opened:
    """Open a checkpoint in fp32."""
    return open_checkpoint(folder, LOOKUP, device="cpu", precision="fp32")


def test_the_command_imports_verifies_and_says_what_it_found(tmp_path: Path) -> None:
    zoo(tmp_path)
    run = run_folder(tmp_path)
    said = CliRunner().invoke(main, ["import", str(run), "-o", str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    for line in (
        f"{tmp_path / 'out'} is a checkpoint of '{run}', an adapter run of MGM",
        f": verified against peft {peft.__version__} and transformers {transformers.__version__}\n",
        "on text and images: logits differ by ",
        f"  base       {tmp_path}/model_zoo/LLM/gemma/gemma-2b-it\n",
        "  tensors    44: all that the base lacks or that differs from it",
        "in a fresh process",
        "  adapter    has an effect: it moves the logits by up to ",
        "cannot be verified: its hash was not recorded",
    ):
        assert line in said.output, line
    inspected = CliRunner().invoke(main, ["inspect", str(tmp_path / "out")]).output
    assert re.search(rf"^imported +from {run}, by Graftwork .*; trained there in 240 steps", inspected, re.MULTILINE)
    assert re.search(rf"^import +verified against peft {peft.__version__}", inspected, re.MULTILINE)
    again = CliRunner().invoke(main, ["import", str(run), "-o", str(tmp_path / "out")])
    assert (again.exit_code, again.output) == (1, f"Error: '{tmp_path / 'out'}' exists already; name a new folder\n")


def test_the_command_says_where_there_is_nothing_to_disable(tmp_path: Path) -> None:
    zoo(tmp_path)
    said = CliRunner().invoke(main, ["import", str(run_folder(tmp_path, "stage1")), "-o", str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    assert ": reopens as saved\n" in said.output
    assert "  compared   with itself alone: no library that is known here opens such a folder\n" in said.output
    assert "  adapter    none: all that was trained is new to the base, so there is nothing to disable\n" in said.output
    assert "has an effect" not in said.output


def test_a_number_of_the_base_that_is_not_finite_is_named_with_its_file(tmp_path: Path) -> None:
    base, run = tmp_path / "base", run_folder(tmp_path)
    shutil.copytree(BASE, base)
    name, file = "model.layers.0.mlp.up_proj.weight", base / "model-00002-of-00004.safetensors"
    change(file, lambda each, tensor: tensor / 0 if each == name else tensor)
    with pytest.raises(WeightsError, match=re.escape(f"in '{name}' in '{file}' (")):
        bring_in(run, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def test_a_refused_folder_leaves_nothing(tmp_path: Path) -> None:
    run = run_folder(tmp_path, prefix="/nowhere")
    with pytest.raises(CheckpointError) as caught:
        bring_in(run, tmp_path / "out", None, {})
    assert caught.value.sentence.endswith(
        "what it was trained from was not found: "
        f"graftwork import {run} -o run-graftwork --base DIR --part low=DIR --part high=DIR"
    )
    assert caught.value.details[0] == "base: '/nowhere/LLM/gemma/gemma-2b-it', not found"
    with pytest.raises(
        CheckpointError, match=r"^'.*' is a plain language model, .*, and cannot be imported: nothing was trained"
    ):
        bring_in(BASE, tmp_path / "out", None, {})
    assert not (tmp_path / "out").exists()


def test_what_the_run_recorded_is_in_the_checkpoint(tmp_path: Path) -> None:
    manifest = bring_in(GOLDEN / "lora", tmp_path / "out").manifest
    model_spec = manifest.plan.model_spec
    assert (model_spec.on, model_spec.also_train) == (("language.attention", "language.mlp"), ("connector", "mining"))
    assert model_spec.peft is not None
    assert model_spec.peft.settings["target_modules"] == []
    assert (
        model_spec.peft.settings["rank"],
        model_spec.peft.settings["alpha"],
        model_spec.peft.settings["dropout"],
    ) == (
        16,
        32,
        0.1,
    )
    assert manifest.newly_initialised == ("connector", "mining")
    assert (manifest.step, manifest.health.healthy) == (240, True)
    assert manifest.provenance["imported from"] == str(GOLDEN / "lora")
    assert len(manifest.provenance["imported tensors"]) == 64


def test_an_adapter_of_some_layers_stays_one_of_those(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    change(run / "adapter_model.bin", lambda name, tensor: tensor if "q_proj" in name or "v_proj" in name else None)
    manifest = bring_in(run, tmp_path / "few").manifest
    model_spec = manifest.plan.model_spec
    assert model_spec.on == ("language.attention",)
    assert model_spec.peft is not None
    assert model_spec.peft.settings["target_modules"] == ["q_proj", "v_proj"]
    change(run / "adapter_model.bin", lambda name, tensor: tensor if ".layers.1." in name else None)
    model_spec = bring_in(run, tmp_path / "fewer").manifest.plan.model_spec
    assert model_spec.peft is not None
    assert model_spec.peft.settings["target_modules"] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert opened(tmp_path / "fewer").verification.error == 0.0


def test_an_adapter_in_safetensors_is_the_same(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    tensors = torch.load(run / "adapter_model.bin", weights_only=True)
    save_file(tensors, run / "adapter_model.safetensors")
    both = diagnose(run, LOOKUP, base=BASE, parts=TOWER_FOLDERS)
    assert "it has an adapter_model.bin as well, which peft does not read beside safetensors" in both.inconsistent
    (run / "adapter_model.bin").unlink()
    bring_in(run, tmp_path / "one")
    bring_in(GOLDEN / "lora", tmp_path / "other")
    one, other = (load_file(tmp_path / name / "tensors.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_a_vocabulary_with_added_tokens_fits_its_base(tmp_path: Path) -> None:
    run = run_folder(tmp_path, vocab_size=641, mm_use_im_patch_token=True)
    bring_in(run, tmp_path / "out")
    assert opened(tmp_path / "out").assembly.processor.vocabulary == 640


def test_a_whole_model_on_its_base_is_what_differs_from_it(tmp_path: Path) -> None:
    imported = bring_in(GOLDEN / "merged", tmp_path / "out")
    model_spec = imported.manifest.plan.model_spec
    assert model_spec.also_train == ("language.attention", "language.mlp", "connector", "mining")
    assert imported.stored_parts == ("low",)
    held = {name.split(".")[1] for name in imported.manifest.tensors}
    assert held == {
        "layers",
        "mm_projector",
        "vlm_uni_query_projector",
        "vlm_uni_aux_projector",
        "vlm_uni_val_projector",
        "vision_tower",
    }


def test_a_whole_model_without_a_base_is_held_whole(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "full", prefix="/nowhere")
    parts = {"low": GOLDEN / "clip", "high": GOLDEN / "convnext"}
    manifest = bring_in(run, tmp_path / "out", None, parts).manifest
    assert manifest.plan.model_spec.model.weights is None
    assert "model.embed_tokens.weight" in manifest.tensors
    shutil.rmtree(run)
    checkpoint = opened(tmp_path / "out")
    assert checkpoint.verification.error == 0.0
    assert not checkpoint.assembly.can_disable


def test_a_trained_tower_is_kept_and_called_trained(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "stage1", optimize_vision_tower=True)
    change(
        run / "mm_projector.bin", lambda name, tensor: tensor * 1.5 if "vision_tower.vision_tower" in name else tensor
    )
    manifest = bring_in(run, tmp_path / "out").manifest
    assert manifest.plan.model_spec.also_train == ("connector", "mining", "vision.low")
    name = "model.vision_tower.vision_model.embeddings.class_embedding"
    stored = load_file(tmp_path / "out" / "tensors.safetensors")[name]
    original = torch.load(run / "mm_projector.bin", weights_only=True)
    assert stored.equal(original["model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"].float())


def test_a_tensor_without_a_place_is_an_error(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    torch.save(
        {
            **torch.load(run / "non_lora_trainables.bin", weights_only=True),
            "base_model.model.model.extra": torch.ones(2),
        },
        run / "non_lora_trainables.bin",
    )
    with pytest.raises(CheckpointError) as caught:
        bring_in(run, tmp_path / "out")
    assert caught.value.sentence == (
        f"'{run}' does not fit 'mgm-gemma': 1 of its tensors have no place in the model, 0 are missing; nothing was saved"
    )
    assert caught.value.details == ("no place: base_model.model.model.extra",)


def test_a_missing_tensor_of_the_connector_is_an_error(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    change(run / "non_lora_trainables.bin", lambda name, tensor: None if "vlm_uni_aux_projector.0" in name else tensor)
    with pytest.raises(CheckpointError, match="and lacks mining, which its base does not have either; name the base"):
        bring_in(run, tmp_path / "out")


def test_an_adapter_that_moves_nothing_has_no_effect_and_is_refused(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    change(run / "adapter_model.bin", lambda name, tensor: tensor * 1e-30)
    with pytest.raises(AdapterError, match=r"^the adapter has no effect"):
        bring_in(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", [False, True])
def test_a_peft_folder_works_on_a_whole_model(tmp_path: Path, below: bool) -> None:
    run = run_folder(tmp_path)
    for name in ("config.json", "non_lora_trainables.bin", "trainer_state.json"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoint-240")
    whole = tmp_path / "whole"
    shutil.copytree(GOLDEN / "full", whole)
    for key, part in (("mm_vision_tower", "clip"), ("mm_vision_tower_aux", "convnext")):
        if below:
            shutil.copytree(GOLDEN / part, whole / part)
        edit(whole / "config.json", **{key: part if below else str(GOLDEN / part)})
    edit(run / "adapter_config.json", base_model_name_or_path=str(whole))
    manifest = import_folder(diagnose(run, LOOKUP), LOOKUP, tmp_path / "out").manifest
    assert manifest.plan.model_spec.model.weights is not None
    assert manifest.plan.model_spec.model.weights.path == str(whole)
    assert (manifest.plan.model_spec.also_train, manifest.newly_initialised, len(manifest.tensors)) == ((), (), 28)


# Back to upstream -----------------------------------------------------------------------------------------------------


@pytest.fixture
def towers(tmp_path: Path) -> dict[str, Path]:
    """The towers under names that upstream knows."""
    models = zoo(tmp_path, "clip", "convnext")
    return {"low": models / "OpenAI" / "clip-vit-large", "high": models / "OpenAI" / "openclip-convnext-large-d-320"}


def test_a_whole_folder_for_upstream_comes_back_without_loss(tmp_path: Path, towers: dict[str, Path]) -> None:
    bring_in(GOLDEN / "lora", tmp_path / "lora", BASE, towers)
    certificate = export(opened(tmp_path / "lora"), "mgm", tmp_path / "mgm", LOOKUP)
    assert certificate is not None
    assert (certificate.changed, certificate.new, certificate.precision) == (14, 16, "fp32")
    assert certificate.error < 1e-4
    wanted = shapes(GOLDEN / "merged")
    assert shapes(tmp_path / "mgm") == {name: shape for name, shape in wanted.items() if name != "lm_head.weight"}
    config, upstream = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "mgm", GOLDEN / "merged"))
    unwritten = {"image_grid_pinpoints", "mm_projector_lr", "tokenizer_model_max_length", "transformers_version"}
    assert upstream.keys() - config.keys() == unwritten
    paths = {"_name_or_path", "mm_vision_tower", "mm_vision_tower_aux"}
    assert {k: v for k, v in config.items() if k in upstream and k not in paths and v != upstream[k]} == {}
    assert (config["mm_vision_tower"], config["mm_vision_tower_aux"]) == (str(towers["low"]), str(towers["high"]))
    index = json.loads((tmp_path / "mgm" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == shapes(tmp_path / "mgm").keys()

    imported = import_folder(diagnose(tmp_path / "mgm", LOOKUP), LOOKUP, tmp_path / "back").manifest
    assert imported.plan.model_spec.model.weights is not None
    there, back = opened(tmp_path / "back").assembly, load_file(tmp_path / "mgm" / "model.safetensors")
    for name, tensor in there.state_to_save().items():
        published = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.")
        assert tensor.equal(back[published]), name


def test_merges_of_the_tokenizer_are_written_as_old_versions_read_them(tmp_path: Path, towers: dict[str, Path]) -> None:
    bring_in(GOLDEN / "stage1", tmp_path / "stage1", BASE, towers)
    export(opened(tmp_path / "stage1"), "mgm", tmp_path / "mgm", LOOKUP)
    written = json.loads((tmp_path / "mgm" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    original = json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert written["merges"] == original["merges"]
    assert all(isinstance(merge, str) for merge in written["merges"])
    config = json.loads((tmp_path / "mgm" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (config["tokenizer_class"], config["additional_special_tokens"]) == (
        "GemmaTokenizer",
        ["<start_of_turn>", "<end_of_turn>"],
    )


def test_towers_that_upstream_would_not_know_are_refused(tmp_path: Path, towers: dict[str, Path]) -> None:
    bring_in(GOLDEN / "stage1", tmp_path / "stage1", BASE, {"low": GOLDEN / "clip", "high": towers["high"]})
    with pytest.raises(CheckpointError) as caught:
        export(opened(tmp_path / "stage1"), "mgm", tmp_path / "mgm", LOOKUP)
    assert caught.value.sentence == (
        f"upstream knows a tower by its folder's name, and would not know '{GOLDEN / 'clip'}' as the low part's; give it a name "
        "with openai in it, and name that with --part low=DIR"
    )
    (bare := tmp_path / "openai-bare").mkdir()
    shutil.copy(GOLDEN / "clip" / "config.json", bare)
    run = run_folder(tmp_path, "full", prefix="/nowhere")
    bring_in(run, tmp_path / "whole", None, {"low": bare, "high": towers["high"]})
    with pytest.raises(
        CheckpointError, match=r"^upstream reads the low part's tower from a folder of its own, and this check"
    ):
        export(opened(tmp_path / "whole"), "mgm", tmp_path / "mgm", LOOKUP)
