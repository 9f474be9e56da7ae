"""Activation checkpointing: same gradients, fewer tensors kept, and nothing else changed."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import COMPONENTS, PlanOf
from torch import Tensor

import graftwork_checkpointing
from graftwork import GraftworkError
from graftwork.build import compose
from graftwork.contracts import DictLookup, Structure

LOOKUP = DictLookup(*COMPONENTS)
(Checkpointing,) = graftwork_checkpointing.memory_strategies()


def assembly(*, of: tuple[str, ...] = ("language",), checkpointed: bool = True, dropout: float = 0.0) -> Any:
    """A tiny Gemma in training, as the strategy sees it."""
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8}
    config = GemmaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, attention_dropout=dropout)
    model = GemmaForCausalLM._from_config(config, attn_implementation="eager").train()
    blocks = {"language": tuple(f"model.layers.{index}" for index in range(3)), "vision.low": ()}
    built = SimpleNamespace(structure=Structure(model, roles={}, blocks=blocks), model=model)
    if checkpointed:
        Checkpointing(graftwork_checkpointing.CheckpointingSettings(of=of)).prepare(built)
    return built


def gradients_and_kept(model: Any, **options: Any) -> tuple[list[Tensor], int]:
    """The gradients of one step, and how many numbers autograd kept for them."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(20).view(2, 10)
    mask = torch.tensor([[1] * 10, [0] * 4 + [1] * 6])
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, attention_mask=mask, labels=ids, **{"use_cache": False, **options}).loss
    loss.backward()
    return [parameter.grad for parameter in model.parameters()], sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_gradients_are_the_same_and_less_is_kept_for_them(dropout: float) -> None:
    plain, much = gradients_and_kept(assembly(checkpointed=False, dropout=dropout).model)
    checkpointed, little = gradients_and_kept(assembly(dropout=dropout).model)
    torch.testing.assert_close(checkpointed, plain, atol=0.0, rtol=0.0)
    assert little < 0.7 * much


def test_only_the_rows_of_blocks_that_are_asked_for_are_checkpointed() -> None:
    _, much = gradients_and_kept(assembly(checkpointed=False).model)
    _, same = gradients_and_kept(assembly(of=("vision.low",)).model)
    assert same == much


@pytest.mark.parametrize("part", ["low", "high"])
def test_a_tower_that_is_trained_learns_the_same_and_keeps_less(run: PlanOf, part: str) -> None:
    def step(of: list[str]) -> tuple[dict[str, Tensor], int]:
        memory = {"use": ["checkpointing"], "checkpointing": {"of": of}} if of else {}
        built = compose.build(run({"peft.also_train": [f"vision.{part}"], "memory": memory}), LOOKUP, device="cpu")
        torch.manual_seed(0)
        pixels = {name: torch.randn(4, 3, o.pixels.size, o.pixels.size) for name, o in built.outputs.items()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            maps = built.model.train().maps(pixels)[part]
            loss = torch.stack([each.square().mean() for each in maps]).sum()
        loss.backward()
        gradients = {name: p.grad for name, p in built.trained().items() if p.grad is not None}
        assert len(gradients) > 10
        return gradients, sum(kept.values())

    plain, much = step([])
    checkpointed, little = step([f"vision.{part}"])
    torch.testing.assert_close(checkpointed, plain, atol=0.0, rtol=0.0)
    assert little < 0.6 * much


def test_names_and_tensors_stay_and_a_copy_has_its_own_blocks() -> None:
    built = assembly()
    plain = assembly(checkpointed=False).model
    assert [name for name, _ in built.model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(built.model.state_dict()) == list(plain.state_dict())
    copied = copy.deepcopy(built.model)
    copied.model.layers.requires_grad_(False).apply(lambda module: [p.zero_() for p in module.parameters()])
    ids = torch.arange(3)[None]
    assert not torch.equal(copied(ids, use_cache=False).logits, built.model(ids, use_cache=False).logits)


def test_evaluation_with_a_cache_is_left_alone_and_training_with_one_is_refused() -> None:
    model = assembly().model
    ids = torch.ones(1, 3, dtype=torch.int64)
    with torch.no_grad():
        assert model(ids, use_cache=True).past_key_values.get_seq_length() == 3
    assert model.eval()(ids, use_cache=True).past_key_values.get_seq_length() == 3
    with pytest.raises(GraftworkError, match="asked to fill a cache of keys and values"):
        model.train()(ids, use_cache=True)


def test_blocks_that_the_model_does_not_have_are_named() -> None:
    with pytest.raises(GraftworkError) as caught:
        assembly(of=("language", "vision.high"))
    assert str(caught.value) == (
        "'checkpointing' is asked for the blocks of 'vision.high', and this model has 'language', 'vision.low'; "
        "change its setting 'of'"
    )
