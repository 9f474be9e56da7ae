"""Any vision-language model of transformers computes in Graftwork what it computes in transformers, and comes out as it went in."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vlm_families import CHATML, FAMILIES, PARTS
from vlm_folders import LANGUAGE, UTTERANCES, VISION, write_family
from vlm_grids import ERNIE
from vlm_trial import LOOKUP, READ, RECORDS, built, labelled, logits_error, run_table, seen, theirs

from graftwork.build import compose
from graftwork.build.outline import KernelRow, outline
from graftwork.config.machine import Machine
from graftwork.config.resolve import resolve
from graftwork.config.runfile import parse_run
from graftwork.contracts import DictLookup, Record, Turn
from graftwork.errors import DataError, WeightsError
from graftwork_hf_vlm import HfVlm, HfVlmSettings
from graftwork_hf_vlm.processor import TOLD
from graftwork_torch_attention import Eager, Sdpa

# Labels ---------------------------------------------------------------------------------------------------------------


def test_answers_that_are_not_to_be_trained_on_have_no_labels(folder_of: Any) -> None:
    assembly = built(folder_of("qwen2_5_vl"))
    for each in RECORDS:
        only_last = replace(each, turns=(each.turns[0], replace(each.turns[1], trained=False), *each.turns[2:]))
        assert labelled(assembly, only_last) == ["no thanks<|im_end|>"]
        assert labelled(assembly, each.without_answer()) == []


def test_a_template_that_never_ends_an_answer_gets_the_token_that_does(folder_of: Any) -> None:
    processor: Any = built(folder_of("llava")).processor
    assert processor.written(RECORDS[0]).text == (
        "<s>USER: <image>\nWhat colour is it? ASSISTANT: yes</s> USER: And now? ASSISTANT: no thanks</s> "
    )
    asked = processor.written(RECORDS[0].without_answer()).text
    assert asked == "<s>USER: <image>\nWhat colour is it? ASSISTANT: yes</s> USER: And now? ASSISTANT:"


THINKING = CHATML.replace(
    PARTS, "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}" + PARTS
).replace("IMAGE", "<|image_pad|>")


def test_a_template_that_rewrites_earlier_answers_trains_the_last_one_alone(folder_of: Any, tmp_path: Path) -> None:
    shutil.copytree(folder_of("qwen2_5_vl"), tmp_path / "thinking")
    (tmp_path / "thinking" / "chat_template.jinja").write_text(THINKING)
    assembly = built(tmp_path / "thinking")
    first, answered, *others = RECORDS[0].turns
    with pytest.raises(DataError, match=r"a record can train the last one only"):
        assembly.processor.encode(RECORDS[0])
    last = replace(RECORDS[0], turns=(first, replace(answered, trained=False), *others))
    assert labelled(assembly, last) == ["<think>\n\n</think>\n\nno thanks<|im_end|>"]


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([("user", "<image>\nWhat <|im_end|>?"), ("assistant", "a")], "has '<|im_end|>' in its text"),
        ([("user", "What?"), ("assistant", "a")], "has 1 images and '<image>' 0 times"),
        ([("user", "<image>"), ("user", "What?")], "user and assistant do not take turns"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_with_its_id(
    turns: list[tuple[str, str]], said: str, folder_of: Any
) -> None:
    processor = built(folder_of("qwen2_5_vl")).processor
    odd = Record("odd", tuple(Turn(role, text) for role, text in turns), (seen("red", 40, 40),))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        processor.encode(odd)
    assert "'odd'" in caught.value.sentence


def test_a_system_turn_that_the_template_loses_is_refused(folder_of: Any, tmp_path: Path) -> None:
    shutil.copytree(folder_of("qwen2_5_vl"), tmp_path / "deaf")
    template = (tmp_path / "deaf" / "chat_template.jinja").read_text()
    deaf = template.replace("in messages %}", "in messages if message['role'] != 'system' %}")
    (tmp_path / "deaf" / "chat_template.jinja").write_text(deaf)
    system = replace(RECORDS[2], turns=(Turn("system", "Be brief."), *RECORDS[2].turns))
    assert "Be brief." in built(folder_of("qwen2_5_vl")).processor.written(system).text  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"chat template leaves out 'Be brief.' of record 'text'"):
        built(tmp_path / "deaf").processor.encode(system)


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_single_parameter_of_the_connector_is_trained(folder_of: Any) -> None:
    table = run_table(folder_of("llava_next")) | {"peft": {"also_train": ["connector"]}}
    assembly = compose.build(resolve(parse_run(table, Path.cwd()), LOOKUP), LOOKUP, device="cpu")
    assert "model.image_newline" in assembly.trained()


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("llava", KernelRow("language", "sdpa", ())),
        (
            "gemma3",
            KernelRow("language", "sdpa", ()),
        ),
    ],
)
def test_a_plan_says_whose_attention_is_computed(name: str, language: KernelRow, folder_of: Any) -> None:
    found = outline(resolve(parse_run(run_table(folder_of(name)), Path.cwd()), LOOKUP), LOOKUP, Machine())
    assert found.kernels == (language, KernelRow("vision", "sdpa", ()))


# Processors and weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smolvlm", "mistral3"])
def test_a_processor_is_read_whose_videos_or_module_ask_for_more(name: str, folder_of: Any) -> None:
    processor: Any = built(folder_of(name)).processor
    assert type(processor.hf).__name__ == FAMILIES[name].processor
    assert processor.length(RECORDS[1]) == len(processor.encode(RECORDS[1]).input_ids)


@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "qwen2_5_vl", "idefics3", "gemma3", "mistral3", "internvl", "got_ocr2"]
)
def test_lengths_measured_together_are_those_of_records_encoded_one_by_one(name: str, folder_of: Any) -> None:
    processor: Any = built(folder_of(name)).processor
    odd = replace(RECORDS[2], turns=RECORDS[2].turns[:1] * 2)
    found = processor.lengths([*RECORDS, odd, *READ])
    assert "do not take turns" in str(found.pop(len(RECORDS)))
    records = [*RECORDS, *READ]
    assert found == [len(processor.encode(each).input_ids) for each in records]
    assert found == [len(processor.tokenizer(processor.spread(each).text, **TOLD)["input_ids"]) for each in records]
    assert processor.lengths([odd]) and processor.lengths([]) == []


@pytest.mark.parametrize("name", ["aya_vision", "hyperclovax_vision_v2"])
def test_logits_are_scaled_as_transformers_does(name: str, folder_of: Any) -> None:
    assert logits_error(built(folder_of(name)), theirs(folder_of(name))) < 1e-5


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of transformers, with numpy 2
def test_experts_that_are_parted_between_text_and_images_are_read_and_written_under_published_names(
    tmp_path: Path,
) -> None:
    assembly = built(write_family(ERNIE, tmp_path / "ernie"))
    assert logits_error(assembly, theirs(tmp_path / "ernie")) < 1e-5
    assembly.architecture.write(assembly, tmp_path / "again")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("ernie", "again"))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert any(re.search(r"experts\.\d+\.gate_proj", name) for name in one)


def test_what_is_the_same_for_all_images_is_kept_whole() -> None:
    from graftwork_hf_vlm.model import apart, together

    table, pixels = torch.rand(3, 4), torch.rand(5, 4)
    given = [table, pixels, (2, [pixels[:2], pixels[2:]])]
    images = apart(given, [2, 3])
    whole = together(images)
    assert whole[0] is table and whole[2][0] == 2 and torch.cat(whole[2][1]).equal(pixels)
    assert together([images[1], images[0], images[0]])[1].equal(torch.cat([pixels[2:], pixels[:2], pixels[:2]]))


IDEFICS2 = replace(
    FAMILIES["idefics3"],
    special=("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"),
    begins="<s>",
    ends=("</s>", "<end_of_utterance>"),
    named={"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"},
    template=UTTERANCES.replace("<|begin_of_text|>", "<s>"),
    config="Idefics2Config",
    table=lambda id: {
        "text_config": {**LANGUAGE, "model_type": "mistral", "vocab_size": 320, "pad_token_id": 0},
        "vision_config": {**VISION, "image_size": 64, "patch_size": 8},
        "perceiver_config": {
            "hidden_size": 64,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
        "image_token_id": id("<image>"),
    },
    processor="Idefics2Processor",
    images="Idefics2ImageProcessor",
    resizing={"size": {"shortest_edge": 32, "longest_edge": 64}},
)


def test_a_processor_that_does_not_say_what_an_image_becomes_is_refused_and_served_by_the_example_in_the_docs(
    tmp_path: Path,
) -> None:
    with pytest.raises(WeightsError, match=r"Idefics2Processor does not say what text an image becomes"):
        built(write_family(IDEFICS2, tmp_path)).processor.encode(READ[1])
    (page,) = (Path(__file__).parents[1] / "docs").glob("models.md")
    example: dict[str, Any] = {}
    exec(page.read_text().split("```python\n")[1].split("```")[0], example)
    lookup = DictLookup(example["Idefics2"], Sdpa, Eager)
    table = run_table(tmp_path)
    table["model"]["use"] = "idefics2"
    assembly = compose.build(resolve(parse_run(table, Path.cwd()), lookup), lookup, device="cpu")
    assembly.model.eval()
    assert logits_error(assembly, theirs(tmp_path), READ) < 1e-5
    assert [tuple(labelled(assembly, each)) for each in READ] == list(IDEFICS2.labels)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "never-heard-of", "auto_map": {"AutoModel": "own.Model"}},
            "code of its own, which is never run",
        ),
        ({"model_type": "llama"}, "'llama' model, which is none that reads images and text"),
        ({"model_type": "mllama"}, "which transformers gives no way to encode images apart"),
        (
            {"model_type": "paligemma", "text_config": {"model_type": "gemma"}},
            "whose language model sees what comes after a token",
        ),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantized by awq in 4 bits"),
    ],
)
def test_a_model_that_cannot_be_had_this_way_is_named(
    changes: dict[str, Any], said: str, folder_of: Any, tmp_path: Path
) -> None:
    config = json.loads((folder_of("llava") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(WeightsError, match=re.escape(said)):
        HfVlm(HfVlmSettings()).configuration(tmp_path)


def test_a_folder_without_a_chat_template_is_named(folder_of: Any, tmp_path: Path) -> None:
    shutil.copytree(folder_of("llava"), tmp_path / "silent")
    (tmp_path / "silent" / "chat_template.jinja").unlink()
    with pytest.raises(WeightsError, match=r"has no chat template, .* put one into 'chat_template.jinja'"):
        built(tmp_path / "silent")
