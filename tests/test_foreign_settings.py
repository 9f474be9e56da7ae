"""Settings that other code wrote: followed, known to be without effect, at their default, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_folders import edit
from mgm_folders import GOLDEN, config_folder

from graftwork import NoSettings, weights
from graftwork.contracts import refuse_quantized, unknown_settings
from graftwork.errors import WeightsError
from graftwork_convnext import OpenClipConvNext
from graftwork_efficientnet import EfficientNetLite, EfficientNetSettings
from graftwork_hf_vision.clip import Clip, ClipSettings
from graftwork_lora.peft_folders import Reading, plain
from graftwork_mgm import MgmGemma, MgmLlama, MgmSettings
from graftwork_mgm.processor import load_tokenizer

CLIP, CONVNEXT = Clip(ClipSettings()), OpenClipConvNext(NoSettings())
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
GENERATION = {
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "max_length": 20,
    "length_penalty": 1.0,
    "return_dict": True,
    "pruned_heads": {},
    "is_decoder": False,
    "dropout": 0.0,
    "tie_word_embeddings": True,
}


def written(file: Path, content: Any) -> Path:
    """The folder of a JSON file."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return file.parent


def test_only_what_switches_something_on_is_unknown() -> None:
    settings = {"known": 1, "null": None, "off": False, "none": [], "default": 16, "other": 17, "new": 0, "on": True}
    assert unknown_settings(settings, {"known"}, lambda: {"default": 16, "other": 16}) == ["new", "on", "other"]
    assert unknown_settings({"off": False}, (), lambda: {"off": True}) == ["off"]


@pytest.mark.parametrize(
    "more",
    [
        {
            "max_sequence_length": 2048,
            "pretraining_tp": 1,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "use_cache": True,
        },
        {"_attn_implementation_autoset": True, "use_flash_attention_2": True, "mm_patch_merge_type": "flat"},
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
        {
            "_model_name_or_path": "x",
            "unk_token_id": 0,
            **GENERATION,
            "dropout": None,
            "_name_or_path": "x",
            "torch_dtype": "bfloat16",
            "attention_bias": False,
        },
    ],
)
def test_configurations_that_people_have_are_read(tmp_path: Path, more: dict[str, Any]) -> None:
    config = MgmLlama(MgmSettings()).configuration(written(tmp_path / "config.json", {**LLAMA, **more}))
    assert (
        config["language"]["tie_word_embeddings"] is more["tie_word_embeddings"]
        if "tie_word_embeddings" in more
        else True
    )


def test_what_transformers_declares_is_handed_to_its_class(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, "base", use_bidirectional_attention=True)
    config = MgmGemma(MgmSettings()).configuration(folder)
    assert config["language"]["use_bidirectional_attention"] is True


@pytest.mark.parametrize(
    "changes",
    [
        {"final_logit_softcapping": 30.0},
        {"sliding_window": 4096},
        {"hidden_activation": "relu"},
        {"mm_resampler_type": "spatial_pool"},
        {"layer_types": ["full_attention"]},
    ],
)
def test_what_a_language_model_does_not_know_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=next(iter(changes))):
        MgmGemma(MgmSettings()).configuration(config_folder(tmp_path, **changes))


def test_a_whole_clip_of_long_ago_is_read(tmp_path: Path) -> None:
    vision = json.loads((GOLDEN / "clip" / "config.json").read_text()) | GENERATION
    whole = {
        "model_type": "clip",
        "text_config": {"hidden_size": 8},
        "projection_dim": 32,
        "logit_scale_init_value": 2.6592,
    }
    written(tmp_path / "config.json", {**whole, "vision_config": vision, "vision_config_dict": {"patch_size": 14}})
    written(
        tmp_path / "preprocessor_config.json",
        {"size": 56, "crop_size": 56, "feature_extractor_type": "CLIPFeatureExtractor"},
    )
    assert CLIP.configuration(tmp_path) == CLIP.configuration(GOLDEN / "clip")


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"use_registers": 4}),
        ("preprocessor_config.json", {"resample": 2}),
        ("preprocessor_config.json", {"do_center_crop": False}),
        ("preprocessor_config.json", {"crop_size": {"height": 336, "width": 336}}),
        ("preprocessor_config.json", {"gamma_correction": 2.2}),
    ],
)
def test_what_clip_does_not_follow_is_refused_by_name(tmp_path: Path, file: str, changes: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(GOLDEN / "clip", tmp_path / "clip"))
    written(folder / file, json.loads((folder / file).read_text()) | changes)
    with pytest.raises(WeightsError, match=f"{file}.* sets {next(iter(changes))} = "):
        CLIP.configuration(folder)


@pytest.mark.parametrize("place", [(), ("model_cfg",), ("model_cfg", "vision_cfg"), ("preprocess_cfg",)])
def test_what_the_convnext_does_not_follow_is_refused_by_name(tmp_path: Path, place: tuple[str, ...]) -> None:
    folder = Path(shutil.copytree(GOLDEN / "convnext", tmp_path / "convnext"))
    content = json.loads((folder / "open_clip_config.json").read_text())
    table = content
    for key in place:
        table = table[key]
    table["attentional_pool"] = "map"
    written(folder / "open_clip_config.json", content)
    with pytest.raises(WeightsError, match=r"open_clip_config\.json.* sets attentional_pool = 'map'"):
        CONVNEXT.configuration(folder)


def test_towers_that_were_written_and_those_of_transformers_are_told_apart(tmp_path: Path) -> None:
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "patch_size": 4}
    folder = written(
        tmp_path / "config.json", {**sizes, "model_type": "convnext", "hidden_act": "gelu", "num_channels": 3}
    )
    assert CONVNEXT.configuration(folder)["hidden_sizes"] == [8, 16]
    edit(folder / "config.json", hidden_act="relu")
    with pytest.raises(WeightsError, match="sets hidden_act = 'relu'"):
        CONVNEXT.configuration(folder)
    with pytest.raises(WeightsError, match="'efficientnet-lite' does not know"):
        EfficientNetLite(EfficientNetSettings()).configuration(folder)


def test_a_tokenizer_with_an_unknown_setting_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "full" / name, tmp_path)
    load_tokenizer(tmp_path, "GemmaTokenizer").save_pretrained(tmp_path / "again")
    load_tokenizer(tmp_path / "again", "GemmaTokenizer")
    edit(tmp_path / "tokenizer_config.json", byte_fallback_mode="strict")
    with pytest.raises(WeightsError, match=r"tokenizer_config\.json' sets byte_fallback_mode = 'strict'"):
        load_tokenizer(tmp_path, "GemmaTokenizer")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized by bitsandbytes in 4 bits"),
        ({"quant_method": "gptq", "bits": 3}, "quantized by gptq in 3 bits"),
        ({"load_in_8bit": True}, "quantized by a method that it does not name in 8 bits"),
    ],
)
def test_quantized_weights_are_called_so(tmp_path: Path, how: dict[str, Any], said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        refuse_quantized(tmp_path, {"quantization_config": how})
    for reader, source in ((MgmGemma(MgmSettings()), "full"), (CLIP, "clip")):
        with pytest.raises(WeightsError, match=said):
            reader.configuration(config_folder(tmp_path, source, quantization_config=how))
    with pytest.raises(WeightsError, match=said):
        refuse_quantized(tmp_path, {"text_config": {"quantization_config": how}})
    refuse_quantized(tmp_path, {"quantization_config": None, "text_config": {"quantization_config": None}})


def test_a_pointer_of_git_lfs_is_called_so(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.bin", "config.json", "tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text(LFS)
    reads = [
        lambda: weights.open_file(tmp_path / "model.safetensors"),
        lambda: weights.open_file(tmp_path / "model.bin"),
        lambda: weights.read_json(tmp_path / "config.json"),
        lambda: load_tokenizer(tmp_path, "GemmaTokenizer"),
    ]
    for read in reads:
        with pytest.raises(WeightsError, match=r"is a git-lfs pointer and not the file itself.*git lfs pull"):
            read()


# peft -------------------------------------------------------------------------------------------------------------------

MATRICES = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": lambda: torch.ones(4, 8),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": lambda: torch.ones(8, 4),
}
CONNECTOR = {"base_model.model.model.mm_projector.0.weight": lambda: torch.ones(2, 2)}


def read(more: dict[str, Any] | None = None, **config: Any) -> Reading:
    """An adapter of one layer."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    return Reading(config, {**MATRICES, **(more or {})}, name_of=str)


@pytest.mark.parametrize(
    "config",
    [
        {"kasa_config": {"beta": 1e-4}},
        {"use_bdlora": {"nblocks": 2}},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"use_qalora": True},
        {"layer_replication": [[0, 2]]},
        {"alora_invocation_tokens": [5]},
        {"arrow_config": {"top_k": 3}},
        {"megatron_config": {"a": 1}},
        {"spectral_gain": 0.5},
        {"init_lora_weights": "made_up"},
        {"init_lora_weights": "corda"},
        {"bias": "some"},
        {"rank_pattern": {"q_proj": 8}},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [7]},
    ],
)
def test_a_setting_of_lora_that_is_not_followed_is_refused_by_name(config: dict[str, Any]) -> None:
    (name,) = config
    said = read(**config).refusal()
    assert (
        name in said or (str(config[name]) in said) or (name == "rank_pattern" and "adapter_config.json says 8" in said)
    )


@pytest.mark.parametrize(
    "config",
    [
        {"layers_to_transform": [0], "layers_pattern": "layers", "exclude_modules": ["k_proj"], "bias": "all"},
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "revision": "main", "auto_mapping": None},
        {"rank_pattern": {"k_proj": 8}, "alpha_pattern": {"q_proj": 4}, "use_rslora": True, "eva_config": None},
        {
            "a_new_method": False,
            "its_config": None,
            "its_layers": [],
            "megatron_core": "megatron.core",
            "loftq_config": {},
        },
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "lora_dropout": None},
        {"init_lora_weights": "gaussian", "qalora_group_size": 16, "peft_version": "0.99", "inference_mode": True},
    ],
)
def test_settings_of_lora_that_are_followed_or_off_are_taken(config: dict[str, Any]) -> None:
    assert read(**config).refusal() == ""


def test_what_lies_beside_an_adapter_has_the_names_of_the_model() -> None:
    for name, wanted in (
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.weight", "lm_head.weight"),
        ("module.base_model.model.model.mm_projector.modules_to_save.0.bias", "model.mm_projector.0.bias"),
        ("base_model.model.model.mm_projector.modules_to_save.default.2.bias", "model.mm_projector.2.bias"),
        ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias", "model.layers.0.self_attn.q_proj.bias"),
        ("base_model.model.model.norm.weight", "model.norm.weight"),
    ):
        assert plain(name) == wanted
    found = read(CONNECTOR, modules_to_save=["mm_projector"]).adapter(both=False)
    assert (found.refused, [*found.others], [*found.apart]) == (
        "",
        ["model.mm_projector.0.weight"],
        ["model.mm_projector.0.weight"],
    )
    tied = read(CONNECTOR, modules_to_save=["mm_projector"], ensure_weight_tying=True).adapter(both=False)
    assert not tied.apart
    rows = "base_model.model.{}.token_adapter.trainable_tokens_delta"
    two = {
        rows.format("model.embed_tokens"): lambda: torch.ones(2, 8),
        rows.format("lm_head"): lambda: torch.ones(1, 8),
    }
    found = read(two, trainable_token_indices={"embed_tokens": [3, 4], "lm_head": [9]}).adapter(both=False)
    assert {name: each.indices for name, each in found.rows.items()} == {
        "model.embed_tokens.weight": (3, 4),
        "lm_head.weight": (9,),
    }


def test_a_number_that_is_null_is_the_default_and_one_that_is_0_is_0() -> None:
    said = read(lora_alpha=None, lora_dropout=None).settings({})
    assert (said["alpha"], said["dropout"], read(lora_alpha=0).settings({})["alpha"]) == (8.0, 0.0, 0.0)


def test_a_start_that_changed_the_base_is_refused_for_that_whatever_else_is_set() -> None:
    said = read(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}).refusal()
    assert said.startswith("it was started by 'loftq', which changed the base's own weights")
