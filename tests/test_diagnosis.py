"""What is said of folders that other code wrote: what they are, what is wrong with them, what repairs them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from foreign_folders import change, edit, run_folder, zoo
from mgm_folders import GOLDEN, LOOKUP

from graftwork.cli import main
from graftwork.errors import CheckpointError, GraftworkError, WeightsError
from graftwork.foreign.diagnosis import BASE, Diagnosis, diagnose

ADAPTER = "adapter_model.bin"
WHOLE = "non_lora_trainables.bin"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A LoRA run beside a model_zoo with its base and its towers."""
    zoo(tmp_path)
    return run_folder(tmp_path)


def refusal(folder: Path) -> str:
    """Why a folder is refused; there is then no command that imports it."""
    found = diagnose(folder, LOOKUP)
    assert bool(found.refused) == (found.command == "")
    return found.refused


def test_a_lora_run_is_described_with_all_that_belongs_to_it(run: Path, tmp_path: Path) -> None:
    found = diagnose(run, LOOKUP)
    assert (
        found.description == "an adapter run of MGM (MGMGemmaForCausalLM): what was trained, without the language model"
    )
    assert (found.architecture, found.method, found.refused) == ("mgm-gemma", "lora", "")
    assert {what: place.found for what, place in found.places.items()} == {
        BASE: tmp_path / "model_zoo" / "LLM" / "gemma" / "gemma-2b-it",
        "low": tmp_path / "model_zoo" / "OpenAI" / "clip-vit-large",
        "high": tmp_path / "model_zoo" / "OpenAI" / "openclip-convnext-large-d-320",
    }
    assert (found.steps, len(found.losses), found.verdict and found.verdict.healthy) == (240, 240, True)
    assert found.command == f"graftwork import {run} -o run-graftwork"
    assert found.import_plan is not None
    assert dict(found.import_plan.facts)["images"] == "128 pixels for the high part, made square by 'pad'"


def test_what_the_command_prints_is_what_is_known(run: Path) -> None:
    said = CliRunner().invoke(main, ["inspect", str(run)])
    assert said.exit_code == 0, said.output
    for line in (
        f"{run}: an adapter run of MGM",
        "LoRA of rank 16, alpha 32, dropout 0.1, on 14 linear layers",
        "240 steps, loss 6.921 to 2.227",
        "  - the paths that it records lead nowhere from here: base, low part, high part",
        "  - the tokenizer: it is its base's",
        f"  {run}/adapter_model.bin: 28 found: 28 used, 0 equal, 0 refused\n",
        f"  {run}/non_lora_trainables.bin: 16 found: 16 used, 0 equal, 0 refused\n",
        "    - 5 refused, the text encoder of OpenCLIP, which 'openclip-convnext' does not use: positional_embedding, ",
        f"  graftwork import {run} -o run-graftwork\n",
    ):
        assert line in said.output, line
    told = json.loads(CliRunner().invoke(main, ["inspect", str(run), "--json"]).output)
    assert told["model"] == "mgm-gemma"
    assert told["trained_from"]["base"]["found"].endswith("model_zoo/LLM/gemma/gemma-2b-it")
    assert told["healthy"] is True
    account = told["tensors"][str(run / ADAPTER)]
    assert (account["found"], len(account["used"]), account["equal"], account["refused"]) == (28, 28, [], {})
    assert told["losses"] == {"first": 6.9207, "last": 2.2265, "logged": 240}


def test_recorded_paths_of_another_machine_are_found_by_their_last_parts(tmp_path: Path) -> None:
    models = zoo(tmp_path)
    for prefix in ("/home/user/mgm/model_zoo", "../../model_zoo", "C:\\models\\model_zoo"):
        found = diagnose(run_folder(tmp_path, name=prefix.strip("/.").replace("/", "-"), prefix=prefix), LOOKUP)
        assert not found.not_found, prefix
        assert found.places[BASE].found == models / "LLM" / "gemma" / "gemma-2b-it"


def test_a_folder_that_does_not_fit_is_not_taken_for_the_recorded_one(run: Path, tmp_path: Path) -> None:
    base = tmp_path / "model_zoo" / "LLM" / "gemma" / "gemma-2b-it"
    edit(base / "config.json", num_hidden_layers=18)
    place = diagnose(run, LOOKUP).places[BASE]
    assert place.found is None
    assert place.instead == f"'{base}' is not it: its num_hidden_layers is 18, and the folder was trained with 2"
    with pytest.raises(
        WeightsError, match=r"^--base: '.*' is not what '.*' was trained with: its num_hidden_layers is 18"
    ):
        diagnose(run, LOOKUP, base=base)


def test_below_search_only_the_contents_count(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "runs", prefix="/nowhere")
    models = tmp_path / "things"
    for source, name in (("base", "a"), ("clip", "b"), ("convnext", "c"), ("full", "whole")):
        shutil.copytree(GOLDEN / source, models / "deep" / name)
    found = diagnose(run, LOOKUP, search=[models])
    assert {what: place.found.name for what, place in found.places.items() if place.found} == {
        BASE: "a",
        "low": "b",
        "high": "c",
    }
    assert found.command == f"graftwork import {run} -o run-graftwork --search {models}"
    shutil.copytree(models / "deep" / "a", models / "again")
    place = diagnose(run, LOOKUP, search=[models]).places[BASE]
    assert place.found is None
    assert place.instead == f"2 folders could be it: '{models / 'again'}', '{models / 'deep' / 'a'}'"


def test_a_search_below_nothing_is_refused(run: Path) -> None:
    with pytest.raises(WeightsError, match=r"^--search: there is no folder '/nowhere'; correct the path$"):
        diagnose(run, LOOKUP, search=[Path("/nowhere")])


def test_without_its_base_the_command_says_what_to_name(tmp_path: Path) -> None:
    found = diagnose(run_folder(tmp_path, prefix="/nowhere"), LOOKUP)
    assert [place.what for place in found.not_found] == [BASE, "low", "high"]
    assert found.command.endswith("-o run-graftwork --base DIR --part low=DIR --part high=DIR")
    assert found.places[BASE].line() == "'/nowhere/LLM/gemma/gemma-2b-it', not found"


def test_a_part_that_the_model_lacks_is_refused(run: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"^--part: the model in '.*' has no part 'middle'; its parts are low, high$"
    ):
        diagnose(run, LOOKUP, parts={"middle": run})


def test_an_intermediate_save_points_to_the_folder_of_its_run(run: Path) -> None:
    found = diagnose(run / "checkpoint-240", LOOKUP)
    assert found.description.startswith("an intermediate save of a run: LoRA of rank 16")
    assert found.refused == (
        "it lacks the configuration and what the run trained besides its adapter, which are saved only when a run ends; import "
        f"the run's own folder, '{run}'"
    )
    for name in (ADAPTER, "adapter_config.json", WHOLE):
        (run / name).unlink()
    (run / "checkpoint-240" / "global_step240").mkdir()
    assert diagnose(run / "checkpoint-240", LOOKUP).refused == (
        "it lacks the configuration and what the run trained besides its adapter, which are saved only when a run ends; "
        "DeepSpeed's own states lie in it, from which its zero_to_fp32.py gathers all tensors; this run did not end, so there "
        "is nothing to import: resume it with what trained it"
    )


def nothing(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if ".lora_B." in name else tensor


def wild(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("inf")) if name.endswith("layers.0.mlp.up_proj.lora_A.weight") else tensor


def hollow(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(0)


def halved(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    return None if "q_proj.lora_B" in name else tensor


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (nothing, "its adapter is all zero, so it changes nothing: use its base, or train again"),
        (
            wild,
            "1 of its 28 tensors hold numbers that are not finite, such as 'model.layers.0.mlp.up_proj.lora_A.default.weight': "
            "the run overflowed; train again in bf16",
        ),
        (
            hollow,
            "28 of its 28 tensors are empty, such as 'model.layers.0.self_attn.q_proj.lora_A.default.weight': they were saved "
            "under ZeRO-3 without being gathered, and their values are lost; train again",
        ),
        (
            halved,
            "2 of its layers do not have lora_A, lora_B alone, such as 'model.layers.0.self_attn.q_proj'; restore it",
        ),
    ],
)
def test_an_adapter_that_is_worth_nothing_is_refused(
    run: Path, spoil: Callable[[str, torch.Tensor], torch.Tensor | None], reason: str
) -> None:
    change(run / ADAPTER, spoil)
    assert refusal(run) == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 8}, "its matrices have rank 16, and adapter_config.json says 8; restore it"),
        (
            {"kasa_config": {"beta": 1e-4}},
            "its adapter_config.json sets kasa_config, which 'lora' does not have; merge it with peft, and train from that",
        ),
        (
            {"lora_bias": True},
            "its adapter_config.json sets lora_bias, which 'lora' does not have (lora_bias: its updates have biases of their own); "
            "merge it with peft, and train from that",
        ),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "it was started by 'pissa_niter_4', which changed the base's own weights, and it does not hold those; train again",
        ),
    ],
)
def test_an_adapter_of_another_meaning_is_refused(run: Path, changes: dict[str, Any], reason: str) -> None:
    edit(run / "adapter_config.json", **changes)
    assert refusal(run) == reason


def test_an_adapter_without_its_files_is_refused(run: Path) -> None:
    (run / "adapter_config.json").unlink()
    assert refusal(run) == (
        "it has no adapter_config.json, which says how the adapter is scaled; copy it from where it was trained"
    )
    shutil.copy(GOLDEN / "lora" / "adapter_config.json", run)
    (run / ADAPTER).unlink()
    assert refusal(run) == (
        "it holds no tensors of an adapter (adapter_model.safetensors or .bin); copy them from where it was trained"
    )


def test_a_connector_that_is_not_finite_is_refused(run: Path) -> None:
    change(run / WHOLE, lambda name, tensor: tensor * float("nan"))
    assert refusal(run).startswith(
        "16 of its 16 tensors hold numbers that are not finite, such as 'model.mm_projector.0.weight'"
    )


def test_a_pickle_that_holds_more_than_tensors_is_refused_unread(run: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"a": Trap()}, run / WHOLE)
    with pytest.raises(WeightsError, match="is refused: it is damaged, or holds more than tensors"):
        diagnose(run, LOOKUP)
    assert not (tmp_path / "sprung").exists()


def test_losses_of_an_overflow_are_no_working_models(run: Path) -> None:
    shutil.rmtree(run / "checkpoint-240")
    lines = [{"loss": loss, "step": step} for step, loss in enumerate([2.96e11, 1.35e8, 6.8e11], 1)]
    edit(run / "trainer_state.json", log_history=lines, global_step=93)
    found = diagnose(run, LOOKUP)
    assert (found.steps, found.verdict and found.verdict.healthy) == (93, False)
    assert (
        "its losses are not those of a working model: the loss starts at 2.96e+11 and ends at 6.8e+11, and a model that knows nothing "
        "has 6.46: the weights, the prompt or the precision are wrong"
    ) in found.inconsistent


def test_losses_are_also_found_in_an_intermediate_save(run: Path) -> None:
    (run / "trainer_state.json").unlink()
    assert diagnose(run, LOOKUP).steps == 240
    shutil.rmtree(run / "checkpoint-240")
    assert diagnose(run, LOOKUP).verdict is None


def test_silence_about_added_tokens_is_noticed(tmp_path: Path) -> None:
    found = diagnose(run_folder(tmp_path, mm_use_im_patch_token=None), LOOKUP)
    assert any(line.startswith("config.json lacks mm_use_im_patch_token") for line in found.inconsistent)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    zoo(tmp_path)
    run = run_folder(tmp_path, "full")
    (run / "model-00002-of-00002.safetensors").unlink()
    assert "lacks the file 'model-00002-of-00002.safetensors'" in refusal(run)


def test_a_configuration_alone_is_nothing(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "stage1")
    (run / "mm_projector.bin").unlink()
    assert refusal(run).startswith("it holds no weights at all, neither an adapter nor non_lora_trainables.bin")


def test_folders_of_other_models_are_named_by_their_type(tmp_path: Path) -> None:
    config = {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = diagnose(tmp_path, LOOKUP)
    assert found.description == "a folder of the model type 'llava_llama' (LlavaLlamaForCausalLM)"
    assert found.refused == (
        "no installed model or method reads it (models: mgm-gemma); name another folder, or install a plugin that reads it"
    )
    (tmp_path / "config.json").unlink()
    assert diagnose(tmp_path, LOOKUP).description == "a folder that no installed model or method knows"


def test_what_is_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^there is no folder '/nowhere'; correct the path$"):
        diagnose(Path("/nowhere"), LOOKUP)


def test_damaged_json_is_an_error_and_no_bug(run: Path) -> None:
    (run / "config.json").write_text("{")
    with pytest.raises(GraftworkError, match="is not readable JSON"):
        diagnose(run, LOOKUP)


def test_a_diagnosis_imports_nothing_from_the_folder(run: Path) -> None:
    (run / "modeling_mgm.py").write_text("raise SystemExit('run')")
    edit(run / "config.json", auto_map={"AutoModel": "modeling_mgm.Model"})
    assert isinstance(diagnose(run, LOOKUP), Diagnosis)
