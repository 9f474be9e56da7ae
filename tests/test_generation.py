"""Answers do not depend on batching, padding, the cache, or the mode in which the model was left."""

from __future__ import annotations

import pytest
import torch
from tiny_vlm import STOP, TinyAssembly, question, tiny_assembly

from graftwork.contracts import Encoded, collate
from graftwork.contracts.device import standing_for
from graftwork.errors import DataError
from graftwork.evaluate.generation import answer, encode_prompt, until_stop
from graftwork_mgm import MgmGemma, MgmSettings

QUESTIONS = [
    question("a", "what is it", image="one.png"),
    question("b", "hm"),
    question("c", "which of the many colours is it", image="two.png"),
    question("d", "is it red", image="one.png"),
]


def answer_alone(assembly: TinyAssembly, prompt: Encoded, most: int) -> tuple[int, ...]:
    """Greedy decoding as it is defined: one prompt, no cache, the whole sequence again for every token."""
    batch = collate([prompt], pad_id=0)
    said: list[int] = []
    while len(said) < most:
        with torch.no_grad():
            token = int(assembly.model.logits(assembly.model(batch)[:, -1]).argmax())
        said.append(token)
        if token == STOP:
            break
        batch.input_ids = torch.cat([batch.input_ids, torch.tensor([[token]])], dim=1)
        batch.attention_mask = torch.ones_like(batch.input_ids, dtype=torch.bool)
        batch.image_token_mask = torch.cat([batch.image_token_mask, torch.tensor([[False]])], dim=1)
    return tuple(said)


@pytest.mark.parametrize("seed", range(6))
def test_a_padded_batch_with_a_cache_says_what_each_prompt_alone_says(seed: int) -> None:
    assembly = tiny_assembly(seed)
    with torch.no_grad():
        assembly.model.head.bias[STOP] += 1.5
    prompts = [encode_prompt(assembly, record, 12) for record in QUESTIONS]
    assembly.model.eval()
    alone = [answer_alone(assembly, prompt, 12) for prompt in prompts]
    answers = answer(assembly, prompts, max_new_tokens=12)
    assert answers.token_ids == tuple(until_stop(ids, frozenset({STOP})) for ids in alone)
    assert answers.tokens == tuple(map(len, alone))
    assert answers.ended == tuple(ids[-1] == STOP for ids in alone)
    assert len(assembly.model.rows) == sum(map(len, alone)) + max(map(len, alone)), (
        "decoding ends with the longest answer"
    )
    assert answers.texts == tuple(map(assembly.processor.decode, answers.token_ids))


def test_some_answers_of_the_test_above_end_early_and_some_do_not() -> None:
    lengths = set()
    for seed in range(6):
        assembly = tiny_assembly(seed)
        with torch.no_grad():
            assembly.model.head.bias[STOP] += 1.5
        lengths.update(answer(assembly, [encode_prompt(assembly, r, 12) for r in QUESTIONS], max_new_tokens=12).tokens)
    assert 12 in lengths
    assert len(lengths) > 2


def test_a_stop_id_in_the_last_token_that_is_allowed_is_an_end() -> None:
    assembly = tiny_assembly(0)
    with torch.no_grad():
        assembly.model.head.bias[STOP] += 1.5
    prompts = [encode_prompt(assembly, record, 12) for record in QUESTIONS]
    free = answer(assembly, prompts, max_new_tokens=12)
    length = next(count for count, ended in zip(free.tokens, free.ended, strict=True) if ended and count > 1)
    place = free.tokens.index(length)
    exact, shorter = (answer(assembly, prompts, max_new_tokens=most) for most in (length, length - 1))
    assert exact.tokens[place] == length and exact.ended[place]
    assert shorter.tokens[place] == length - 1 and not shorter.ended[place]


def test_features_that_are_given_are_not_computed_again() -> None:
    assembly = tiny_assembly()
    prompts = [encode_prompt(assembly, QUESTIONS[0], 4)]
    features = assembly.model.encode_images(prompts[0].pixels)
    looks = assembly.model.seen
    with_features = answer(assembly, prompts, max_new_tokens=4, features=features)
    assert assembly.model.seen == looks
    assert with_features == answer(assembly, prompts, max_new_tokens=4)


def test_decoding_ends_when_every_row_has_stopped() -> None:
    assembly = tiny_assembly()
    with torch.no_grad():
        assembly.model.head.bias[STOP] = 1e3
    answers = answer(assembly, [encode_prompt(assembly, r, 9) for r in QUESTIONS], max_new_tokens=9)
    assert answers.texts == ("",) * 4
    assert answers.tokens == (1,) * 4
    assert len(assembly.model.rows) == 1


@pytest.mark.parametrize("stops_at", [1, 12])
def test_on_cuda_the_host_is_one_token_behind_and_answers_are_the_same(stops_at: int) -> None:
    """So that the device need not wait for it; there is no token more than the longest answer may have."""
    assembly = tiny_assembly(0)
    with torch.no_grad():
        assembly.model.head.bias[STOP] += 1e3 if stops_at == 1 else -1e3
    prompts = [encode_prompt(assembly, record, 12) for record in QUESTIONS]
    here = answer(assembly, prompts, max_new_tokens=12)
    passes = len(assembly.model.rows)
    with standing_for("cuda"):
        assert answer(assembly, prompts, max_new_tokens=12) == here
    assert (passes, len(assembly.model.rows) - passes) == (stops_at, min(stops_at + 1, 12))


def test_dropout_is_off_while_answering_and_each_module_gets_its_mode_back() -> None:
    assembly = tiny_assembly()
    assembly.model.train()
    assembly.model.eye.eval()
    prompts = [encode_prompt(assembly, record, 8) for record in QUESTIONS]
    assert answer(assembly, prompts, max_new_tokens=8) == answer(assembly, prompts, max_new_tokens=8)
    assert assembly.model.dropout.training
    assert not assembly.model.eye.training


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_in_words() -> None:
    sentence = "the prompt of 'a' has 12 tokens, and the model reads 12, so there is no room for an answer; shorten the"
    with pytest.raises(DataError, match=sentence):
        encode_prompt(tiny_assembly(context=12), QUESTIONS[0], 8)


def test_an_answer_ends_where_the_model_reads_no_further_and_the_others_of_the_batch_go_on() -> None:
    whole, narrow = tiny_assembly(context=512), tiny_assembly(context=40)
    narrow.model.places = torch.nn.Embedding.from_pretrained(whole.model.places.weight[:40])
    for assembly in (whole, narrow):
        with torch.no_grad():
            assembly.model.head.bias[STOP] = -1e3
    prompts = [encode_prompt(narrow, record, 32) for record in QUESTIONS]
    rooms = [40 - len(prompt.input_ids) for prompt in prompts]
    assert min(rooms) < 10 < 28 < max(rooms)
    wanted = answer(whole, prompts, max_new_tokens=32)
    got = answer(narrow, prompts, max_new_tokens=32)
    assert got.tokens == tuple(min(left, 32) for left in rooms)
    assert got.token_ids == tuple(ids[:left] for ids, left in zip(wanted.token_ids, rooms, strict=True))


def test_the_context_is_read_from_a_configuration_or_a_table_in_it() -> None:
    read = MgmGemma(MgmSettings()).context_length
    assert read({"max_position_embeddings": 64}) == 64
    assert read({"text_config": {"max_position_embeddings": 32}, "size": 3}) == 32
    assert read({"size": 3}) is None
    rotary = {"rope_type": "yarn", "factor": 4.0}
    assert read({"max_position_embeddings": 64, "rope_scaling": rotary}) == 256
    assert read({"max_position_embeddings": 64, "rope_parameters": {"rope_theta": 1e4}}) == 64
    whole = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8}
    assert read({"max_position_embeddings": 128, "rope_scaling": whole}) == 128
