"""MGM on Llama: its numbers against transformers' own, its prompts and labels, and its sizes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from mgm_folders import GOLDEN
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from graftwork.build import compose
from graftwork.build.outline import Outline, outline
from graftwork.config import runfile
from graftwork.config.machine import Machine
from graftwork.config.resolve import resolve
from graftwork.conformance import examine
from graftwork.contracts import (
    IGNORED,
    Assembly,
    Batch,
    DictLookup,
    Encoded,
    Image,
    PixelSettings,
    Plan,
    Record,
    TowerOutput,
    Turn,
    collate,
)
from graftwork.errors import DataError, WeightsError
from graftwork_convnext import OpenClipConvNext
from graftwork_hf_vision.clip import Clip
from graftwork_lora import Lora
from graftwork_mgm import MgmLlama, MgmSettings
from graftwork_mgm.backbones import LLAMA, TEMPLATES
from graftwork_mgm.example import write as write_example
from graftwork_mgm.processor import Images, MgmProcessor, load_tokenizer
from graftwork_torch_attention import Sdpa

LOOKUP = DictLookup(MgmLlama, Clip, OpenClipConvNext, Lora, Sdpa)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE = Image(GOLDEN / "images" / "0000.png")
IMAGES = Images(TowerOutput((8,), ((2, 2),), PixelSettings(16, (0.5,) * 3, (0.5,) * 3)), None, "pad", 1, False)


def llama(folder: Path, *, tied: bool, **more: Any) -> LlamaForCausalLM:
    """transformers' Llama with random weights, in a folder with a tokenizer."""
    write_example(LLAMA, folder)
    torch.manual_seed(3)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "rope_theta": 100_000.0, "rms_norm_eps": 1e-6}
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    heads |= {"tie_word_embeddings": tied, "initializer_range": 0.3, **more}
    config = LlamaConfig(vocab_size=vocabulary, **sizes, **heads)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def plan_of(folder: Path, key: str = "weights", peft: Any = None, **parts: Any) -> Plan:
    """The plan of a run on the model in a folder, with a small tower unless `parts` says otherwise."""
    parts = {"low": {"use": "clip", "weights": str(GOLDEN / "clip")}, "high": {"use": "none"}, **parts}
    table = {"model": {"use": "mgm-llama", key: str(folder), "parts": parts}, "train": {"precision": "fp32"}}
    return resolve(runfile.parse_run(table | ({"peft": peft} if peft else {}), folder), LOOKUP, kernels=["sdpa"])


def build(folder: Path) -> Assembly:
    """The model in a folder, on core's own construction path."""
    assembly = compose.build(plan_of(folder), LOOKUP, device="cpu")
    assembly.model.eval()
    return assembly


def text(ids: list[int]) -> Batch:
    """A batch of one row without an image."""
    return collate([Encoded(ids, [False] * len(ids), [IGNORED] * len(ids), {})], pad_id=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [True, False])
def test_the_logits_of_text_are_those_of_transformers_llama(folder: Path, tied: bool) -> None:
    theirs, assembly = llama(folder, tied=tied), build(folder)
    ids = list(range(5, 45))
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits
        logits = assembly.model.logits(assembly.model(text(ids)))
    assert (logits - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))
    assert wanted.std() > 0.1
    assert ("lm_head.weight" in assembly.model.state_dict()) is not tied
    assert ("language.head" in assembly.structure.roles) is not tied


def test_scaled_positions_are_those_of_transformers_llama_and_written_as_older_readers_want_them(folder: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0}
    theirs, assembly = llama(folder, tied=False, rope_parameters={"rope_theta": 500.0, **rope}), build(folder)
    ids = list(range(5, 45))
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits
        logits = assembly.model.logits(assembly.model(text(ids)))
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    language = (assembly.plan.model_spec.model.config or {})["language"]
    assert (language["rope_theta"], language["rope_scaling"]) == (500.0, rope)
    assert "rope_parameters" not in language


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_is_an_mgm_folder_that_reads_back_the_same(folder: Path, tmp_path: Path, tied: bool) -> None:
    llama(folder, tied=tied)
    base = build(folder)
    (written := tmp_path / "written").mkdir()
    base.architecture.write(base, written)
    config = json.loads((written / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("mgm", ["MGMLlamaForCausalLM"])
    assert config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(written / "model.safetensors")) is not tied
    again = compose.build(plan_of(written, low={"use": "clip", "config": str(written / "low")}), LOOKUP, device="cpu")
    again.model.eval()
    assert again.adaptation.newly_initialised == ()
    assert again.plan.model_spec.model.config == {**(base.plan.model_spec.model.config or {}), "select_layer": -2}
    batch = collate([base.processor.encode(conversation("<image>\nWhat?", "a cat", images=1))], pad_id=0)
    with torch.no_grad():
        assert torch.equal(again.model.logits(again.model(batch)), base.model.logits(base.model(batch)))


def test_a_copy_of_tied_embeddings_is_left_out_and_another_head_is_refused(folder: Path) -> None:
    llama(folder, tied=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert "lm_head.weight" not in build(folder).model.state_dict()
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(WeightsError) as refused:
        build(folder)
    assert str(refused.value) == (
        "the weights hold 'lm_head.weight' unlike 'model.embed_tokens.weight', and by their configuration these are one "
        "tensor; correct the configuration"
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_it_does_what_a_model_must_with_every_template(template: str) -> None:
    failed = [o for o in examine(MgmLlama, settings={"template": template}) if o.state == "failed"]
    assert not failed


# Prompts ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentencepiece model as Llama's is made: byte pairs, bytes for the rest, a space before a text's first word."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    words = f"{SYSTEM} USER ASSISTANT USER: what colour is this shape? ASSISTANT: red and blue"
    (folder / "text").write_text("\n".join([words] * 20))
    sentencepiece.SentencePieceTrainer.train(
        f"--input={folder / 'text'} --model_prefix={folder / 'tokenizer'} --vocab_size=380 --model_type=bpe "
        "--byte_fallback=true --normalization_rule_name=identity --remove_extra_whitespaces=false "
        "--hard_vocab_limit=false --minloglevel=2"
    )
    return folder / "tokenizer.model"


@pytest.fixture(params=[False, True], ids=["vicuna-1.5", "legacy"])
def tokenizer(request: pytest.FixtureRequest, vocabulary: Path, folder: Path) -> Any:
    """The tokenizer of a folder without tokenizer.json; only a legacy one puts a space behind special tokens too."""
    (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": request.param, "pad_token": "<unk>"}))
    return load_tokenizer(folder, LLAMA.tokenizer)


def conversation(*texts: str, images: int = 0) -> Record:
    """A conversation that the user begins."""
    turns = tuple(Turn(("user", "assistant")[i % 2], said) for i, said in enumerate(texts))  # type: ignore[arg-type]
    return Record("r", turns, (IMAGE,) * images)


def processor(tokenizer: Any, template: str) -> MgmProcessor:
    """A processor of images that take four tokens."""
    return MgmProcessor(tokenizer, TEMPLATES[template], IMAGES, 10_000)


def test_a_vicuna_conversation_is_tokenised_and_labelled_as_a_whole(tokenizer: Any) -> None:
    turns = ["what colour is this shape?", "red  and blue", "this?", "Grüße."]
    whole = f"{SYSTEM} USER: {turns[0]} ASSISTANT: {turns[1]}</s>USER: {turns[2]} ASSISTANT: {turns[3]}</s>"
    tokens = tokenizer(whole, return_offsets_mapping=True)
    answers = [(at := whole.index(f" {answer}</s>"), at + len(f" {answer}</s>")) for answer in (turns[1], turns[3])]
    labels = [
        token if any(start < ends and end > begins for begins, ends in answers) else IGNORED
        for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    ]
    example = processor(tokenizer, "vicuna").encode(conversation(*turns))
    assert ([*example.input_ids], [*example.labels]) == ([1, *tokens["input_ids"]], [IGNORED, *labels])
    pieces = tokenizer.convert_ids_to_tokens([label for label in labels if label != IGNORED])
    assert pieces[0].startswith("▁") and pieces.count("</s>") == 2 and pieces[-1] == "</s>"


def test_pieces_of_a_vicuna_conversation_around_an_image_are_tokenised_by_themselves(tokenizer: Any) -> None:
    example = processor(tokenizer, "vicuna").encode(
        conversation("<image>\nwhat?", "red", "and <image>?", "blue", images=2)
    )
    pieces = [f"{SYSTEM} USER: ", "\nwhat? ASSISTANT: red</s>USER: ", "\nand ? ASSISTANT: blue</s>"]
    first, second, third = (tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces)
    pad = tokenizer.pad_token_id
    assert [*example.input_ids] == [1, *first, *[pad] * 4, *second, *[pad] * 4, *third]
    assert sum(example.image_token_mask) == 8


def test_a_vicuna_prompt_ends_where_the_answer_begins(tokenizer: Any) -> None:
    made = processor(tokenizer, "vicuna")
    prompt = made.encode(conversation("what?", "red", "this?"))
    example = made.encode(conversation("what?", "red", "this?", "blue"))
    asked = f"{SYSTEM} USER: what? ASSISTANT: red</s>USER: this? ASSISTANT:"
    assert [*prompt.input_ids] == [1, *tokenizer(asked)["input_ids"]] == [*example.input_ids[: len(prompt.input_ids)]]
    assert (
        prompt.num_label_tokens == 0
        and example.labels[len(prompt.input_ids)] == example.input_ids[len(prompt.input_ids)]
    )
    assert (made.stop_ids, made.pad_id) == ({2}, 0)


SYSTEM_TURN = Turn("system", "Be brief.")


def with_system(record: Record, turn: Turn = SYSTEM_TURN) -> Record:
    """The record with a system turn in front."""
    return replace(record, turns=(turn, *record.turns))


def test_a_vicuna_conversation_has_its_own_system_prompt_in_place_of_the_usual_one(tokenizer: Any) -> None:
    made, record = processor(tokenizer, "vicuna"), conversation("what?", "red", "this?", "blue")
    example, plain = made.encode(with_system(record)), made.encode(record)
    whole = "Be brief. USER: what? ASSISTANT: red</s>USER: this? ASSISTANT: blue</s>"
    assert [*example.input_ids] == [1, *tokenizer(whole)["input_ids"]]
    labelled = [[label for label in each.labels if label != IGNORED] for each in (example, plain)]
    assert labelled[0] == labelled[1]
    prompt = made.encode(with_system(record).without_answer())
    assert prompt.num_label_tokens == 0 and [*example.input_ids[: len(prompt.input_ids)]] == [*prompt.input_ids]
    for turn, why in [
        (Turn("system", "See <image>"), "record 'r' has '<image>' in its system turn; move it into a question"),
        (Turn("system", "Stop.</s>"), "has '</s>' in its text, which would end a turn; remove it"),
    ]:
        with pytest.raises(DataError, match=re.escape(why)):
            made.encode(with_system(record, turn))
    with pytest.raises(DataError, match="user and assistant do not take turns"):
        made.encode(with_system(with_system(record)))


def test_a_template_without_a_place_for_a_system_turn_refuses_it_by_name(folder: Path) -> None:
    made = processor(bytes_tokenizer(folder), "gemma")
    with pytest.raises(DataError) as caught:
        made.length(with_system(conversation("Q", "A")))
    assert caught.value.sentence == (
        "record 'r' has a system turn, and the template 'gemma' has no place for one; move its text into the first question"
    )


def bytes_tokenizer(folder: Path, **names: str) -> Any:
    """The tokenizer of bytes of the example, whose special tokens get other names."""
    write_example(LLAMA, folder)
    tokenizer = load_tokenizer(folder, LLAMA.tokenizer)
    for name, token in names.items():
        setattr(tokenizer, name, token)
    return tokenizer


def test_a_chatml_conversation_begins_with_no_token_of_its_own(folder: Path) -> None:
    """As of SmolLM2, whose bos_token begins a turn and whose eos_token ends one."""
    tokenizer = bytes_tokenizer(folder, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    made = processor(tokenizer, "chatml")
    example = made.encode(conversation("Q", "A one", "R", "B"))
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    turns = [("user", "Q"), ("assistant", "A one"), ("user", "R"), ("assistant", "B")]
    whole = "\n".join(f"<|im_start|>{role}\n{said}<|im_end|>" for role, said in turns)
    assert [*example.input_ids] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert [*example.input_ids].count(ends) == 4
    begun = made.encode(with_system(conversation("Q", "A one", "R", "B")))
    system = tokenizer("<|im_start|>system\nBe brief.<|im_end|>\n", add_special_tokens=False)["input_ids"]
    assert [*begun.input_ids] == [*system, *example.input_ids]
    assert [*begun.labels] == [*[IGNORED] * len(system), *example.labels]
    assert tokenizer.decode([t for t in example.labels if t != IGNORED]) == "A one<|im_end|>B<|im_end|>"
    assert (made.stop_ids, made.pad_id) == ({ends}, ends)
    assert made.decode(tokenizer(" A one<|im_end|>")["input_ids"]) == "A one"
    with pytest.raises(DataError, match=r"has '<\|im_end\|>' in its text, which would end a turn; remove it"):
        made.encode(conversation("Q<|im_end|>", "A"))


def test_with_another_end_of_sequence_either_token_ends_a_chatml_answer(folder: Path) -> None:
    tokenizer = bytes_tokenizer(folder)
    made = processor(tokenizer, "chatml")
    assert made.stop_ids == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert made.encode(conversation("Q")).input_ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_tokenizer_that_begins_texts_itself_does_so_with_chatml_too(folder: Path) -> None:
    tokenizer = bytes_tokenizer(folder)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    example = processor(tokenizer, "chatml").encode(conversation("Q", "A", "R", "B"))
    assert example.input_ids[0] == bos and [*example.input_ids].count(bos) == 1


def test_a_tokenizer_that_the_template_does_not_fit_is_refused(vocabulary: Path, folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    with pytest.raises(WeightsError) as refused:
        processor(load_tokenizer(folder, LLAMA.tokenizer), "chatml")
    assert str(refused.value) == (
        "the template ends answers with '<|im_end|>', and the tokenizer has no such token; choose the model's template"
    )
    with pytest.raises(WeightsError, match="names no bos_token or no eos_token"):
        processor(bytes_tokenizer(folder, bos_token=None), "vicuna")  # type: ignore[arg-type]


def test_the_template_is_what_the_run_says_or_the_folder_or_that_of_published_models(folder: Path) -> None:
    write_example(LLAMA, folder)

    def chosen(**settings: Any) -> Any:
        return MgmLlama(MgmSettings(**settings)).configuration(folder)["template"]

    assert (chosen(), chosen(template="chatml")) == ("vicuna", "chatml")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"conversation_template": "gemma"}))
    assert (chosen(), chosen(template="chatml")) == ("gemma", "chatml")
    (folder / "config.json").write_text(json.dumps(config | {"conversation_template": "alpaca"}))
    with pytest.raises(WeightsError, match="template 'alpaca' is not known; use 'gemma' or 'vicuna' or 'chatml'"):
        chosen()


# Sizes ------------------------------------------------------------------------------------------------------------------


def full_size(folder: Path, hidden: int, inner: int, layers: int, heads: int) -> Outline:
    """What LoRA on an MGM of published size comes to, from configurations alone."""
    write_example(LLAMA, folder)
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    model = {"model_type": "llama", "vocab_size": 32_000, **sizes, "num_attention_heads": heads}
    (folder / "config.json").write_text(json.dumps(model))
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    for name, content in (
        ("clip/config.json", vision | {"image_size": 336, "patch_size": 14}),
        ("convnext/open_clip_config.json", {"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_large"}}}),
    ):
        (folder / name).parent.mkdir()
        (folder / name).write_text(json.dumps(content))
    parts = {
        "low": {"use": "clip", "config": str(folder / "clip")},
        "high": {"use": "openclip-convnext", "config": str(folder / "convnext")},
    }
    peft = {"use": "lora", "on": ["language.attention", "language.mlp"], "rank": 16, "also_train": ["connector"]}
    return outline(plan_of(folder, "config", peft, **parts), LOOKUP, Machine())


@pytest.mark.parametrize(("hidden", "inner", "layers", "heads"), [(4096, 11008, 32, 32), (5120, 13824, 40, 40)])
def test_the_counts_of_the_7b_and_13b_models_are_those_of_pen_and_paper(
    folder: Path, hidden: int, inner: int, layers: int, heads: int
) -> None:
    found = full_size(folder, hidden, inner, layers, heads)
    rows = {row.role: row for row in found.roles}
    lora = layers * 16 * (4 * (hidden + hidden) + 3 * (hidden + inner))
    adapted = rows["language.attention"].adapted + rows["language.mlp"].adapted
    assert adapted == 7 * layers
    assert rows["language.attention"].trained + rows["language.mlp"].trained == lora
    assert lora == {32: 39_976_960, 40: 62_586_880}[layers]
    connector = 1024 * hidden + hidden + hidden * hidden + hidden
    assert rows["connector"].trained == connector and found.trained == lora + connector
    language = sum(row.parameters for role, row in rows.items() if role.startswith("language."))
    assert language == 2 * 32_000 * hidden + layers * (4 * hidden**2 + 3 * hidden * inner + 2 * hidden) + hidden
