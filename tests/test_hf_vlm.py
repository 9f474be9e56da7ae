"""Any vision-language model of transformers computes in Graftwork what it computes in transformers, and comes out as it went in."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny_runs import Shapes
from vlm_families import CHATML, FAMILIES, PARTS, write

from graftwork.build import compose
from graftwork.build.outline import KernelRow, outline
from graftwork.checkpoint.merging import export, merge
from graftwork.checkpoint.store import open_checkpoint
from graftwork.config.machine import Machine
from graftwork.config.resolve import resolve
from graftwork.config.runfile import parse_run
from graftwork.conformance import specimens
from graftwork.contracts import IGNORED, Assembly, DictLookup, Image, Record, Turn, batch_of
from graftwork.data import load_image
from graftwork.errors import DataError, WeightsError
from graftwork.evaluate.evaluation import image_features
from graftwork.evaluate.generation import answer
from graftwork.memory.rehearsal import rehearsing, watching
from graftwork.train.loop import train
from graftwork_hf_vlm import HfVlm, HfVlmSettings
from graftwork_lora import Lora
from graftwork_torch_attention import Eager, Sdpa

LOOKUP = DictLookup(HfVlm, Sdpa, Eager, Lora, Shapes)
NAMES = tuple(FAMILIES)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def made(name: str) -> Path:
        return write(name, tmp_path_factory.mktemp(name))

    return made


def table_of(folder: Path) -> dict[str, Any]:
    return {
        "model": {"use": "hf-vlm", "weights": str(folder)},
        "attention": {"prefer": ["sdpa"]},
        "train": {"precision": "fp32"},
    }


def built(folder: Path) -> Assembly:
    assembly = compose.build(resolve(parse_run(table_of(folder), Path.cwd()), LOOKUP), LOOKUP, device="cpu")
    assembly.model.eval()
    return assembly


def theirs(folder: Path) -> Any:
    model, found = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(found.values()), found
    return model.eval()


def record(name: str, asked: str, *images: Image, answers: tuple[str, ...] = ("yes", "no thanks")) -> Record:
    turns = (
        Turn("user", asked),
        Turn("assistant", answers[0]),
        Turn("user", "And now?"),
        Turn("assistant", answers[1]),
    )
    return Record(name, turns, images)


def seen(colour: str, *size: int) -> Image:
    return specimens.image(colour, (size[0], size[1]))


RECORDS = (
    record("one", "<image>\nWhat colour is it?", seen("red", 64, 64)),
    record("wide and tall", "<image><image>\nAre they the same?", seen("blue", 150, 70), seen("lime", 60, 130)),
    record("text", "Say yes."),
    record(
        "three",
        "Are <image> and <image> as <image>?",
        seen("red", 40, 32),
        seen("teal", 120, 120),
        seen("pink", 99, 64),
    ),
)


def inputs(assembly: Assembly, record: Record) -> Any:
    """What transformers' own processor makes of what the template writes."""
    processor: Any = assembly.processor
    images = [[load_image(image) for image in record.images]] if record.images else None
    text = processor.written(record).text
    return processor.hf(text=[text], images=images, return_tensors="pt", add_special_tokens=False)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_answers_of_a_mixed_batch_are_those_of_transformers(name: str, folder_of: Any) -> None:
    assembly, model = built(folder_of(name)), theirs(folder_of(name))
    encoded = [assembly.processor.encode(each) for each in RECORDS]
    assert [assembly.processor.length(each) for each in RECORDS] == [len(each.input_ids) for each in encoded]
    with torch.no_grad():
        hidden = assembly.model(batch_of(assembly.processor, encoded))
        for row, each in enumerate(RECORDS):
            wanted = model(**inputs(assembly, each)).logits[0]
            found = assembly.model.logits(hidden[row, : len(wanted)])
            assert (found - wanted).abs().max() < 1e-5, each.id
    prompts = [(each, assembly.processor.encode(each.without_answer())) for each in (*RECORDS, RECORDS[0])]
    only = [prompt for _, prompt in prompts]
    answers = answer(assembly, only, max_new_tokens=8, features=image_features(assembly, prompts))
    assert answers == answer(assembly, only, max_new_tokens=8)
    for (each, _), ids in zip(prompts, answers.token_ids, strict=True):
        given = inputs(assembly, each.without_answer())
        made = model.generate(**given, max_new_tokens=8, do_sample=False)[0, given["input_ids"].shape[1] :].tolist()
        end = next((place for place, token in enumerate(made) if token in assembly.processor.stop_ids), len(made))
        assert list(ids) == made[:end], each.id


# Labels ---------------------------------------------------------------------------------------------------------------


def labelled(assembly: Assembly, record: Record) -> list[str]:
    """Each stretch of labels as text, special tokens included."""
    encoded, found = assembly.processor.encode(record), [list[int]()]
    for label in encoded.labels:
        if label != IGNORED:
            found[-1].append(label)
        elif found[-1]:
            found.append([])
    return [assembly.processor.tokenizer.decode(ids) for ids in found if ids]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("llava", [" yes</s>", " no thanks</s>"]),
        ("qwen2_5_vl", ["yes<|im_end|>", "no thanks<|im_end|>"]),
        ("idefics3", [" yes<end_of_utterance>", " no thanks<end_of_utterance>"]),
        ("gemma3", ["yes<end_of_turn>", "no thanks<end_of_turn>"]),
    ],
)
def test_labels_are_the_answers_each_with_the_token_that_ends_it(name: str, labels: list[str], folder_of: Any) -> None:
    assembly = built(folder_of(name))
    for each in RECORDS:
        assert labelled(assembly, each) == labels
        only_last = replace(each, turns=(each.turns[0], replace(each.turns[1], trained=False), *each.turns[2:]))
        assert labelled(assembly, only_last) == labels[1:]
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
    with pytest.raises(DataError, match=r"train on the last one only \(data.train_on = 'last'\)"):
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


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers 5 for it
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "gemma3"])
def test_an_adapter_learns_is_verified_and_comes_out_for_transformers_and_peft(
    name: str, folder_of: Any, tmp_path: Path
) -> None:
    table = table_of(folder_of(name))
    table["peft"] = {"use": "lora", "on": ["language.attention", "vision", "connector"], "rank": 4}
    table["data"] = {"source": [{"use": "shapes", "count": 8}]}
    table["train"] |= {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "max_length": 512}
    plan = resolve(parse_run(table, Path.cwd()), LOOKUP)
    outcome = train(plan, LOOKUP, tmp_path / "out", device="cpu")
    opened = open_checkpoint(tmp_path / "out", LOOKUP, device="cpu", precision="fp32")
    assert opened.verification.error < 1e-5 and opened.verification.distance > 1e-3
    assert all(math.isfinite(line["loss"]) for line in outcome.log)
    assert all(p.grad is None or p.grad.isfinite().all() for p in opened.assembly.model.parameters())

    base, each = theirs(folder_of(name)), RECORDS[1]
    given, batch = (
        inputs(opened.assembly, each),
        batch_of(opened.assembly.processor, [opened.assembly.processor.encode(each)]),
    )
    model = opened.assembly.model
    with torch.no_grad():
        learned = model.logits(model(batch))
        with opened.assembly.disable_adapter():
            assert (model.logits(model(batch)) - base(**given).logits).abs().max() < 1e-5
        assert opened.assembly.changes_image_features

    export(opened, "peft", tmp_path / "peft", LOOKUP)
    plain = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    with torch.no_grad():
        assert (plain(**given).logits - learned).abs().max() < 1e-5
    merge(opened, tmp_path / "merged", LOOKUP)
    with torch.no_grad():
        assert (theirs(tmp_path / "merged")(**given).logits - learned).abs().max() < 1e-5
    kept = {file.name for file in folder_of(name).iterdir()} - {"model.safetensors"}
    for file in kept:
        assert (tmp_path / "merged" / file).read_bytes() == (folder_of(name) / file).read_bytes()


def test_a_single_parameter_of_the_connector_is_trained(folder_of: Any) -> None:
    table = table_of(folder_of("llava_next")) | {"peft": {"also_train": ["connector"]}}
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
    found = outline(resolve(parse_run(table_of(folder_of(name)), Path.cwd()), LOOKUP), LOOKUP, Machine())
    assert found.kernels == (language, KernelRow("vision", "sdpa", ()))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3"])
def test_a_step_takes_what_was_rehearsed(name: str, folder_of: Any) -> None:
    table = table_of(folder_of(name))
    table["peft"] = {"use": "lora", "on": ["language.attention", "vision"], "rank": 4}
    table["train"] |= {"batch_size": 2, "max_length": 256}
    plan = resolve(parse_run(table, Path.cwd()), LOOKUP)
    with rehearsing(plan, LOOKUP, Machine(), device="cpu") as watched:
        predicted = watched.take(2).footprint
    with watching(plan, LOOKUP) as watched:
        found = watched.take(2).footprint
    assert predicted.peak == pytest.approx(found.peak, rel=0.01)


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
