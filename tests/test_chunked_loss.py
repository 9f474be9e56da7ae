"""The chunked loss: the plain loss and its gradients, whatever the head is, with few logits at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import COMPONENTS, PlanOf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graftwork_chunked_loss
from graftwork.contracts import Choice, DictLookup, ModelSpec, Plan, RunContext, TrainSettings, cross_entropy
from graftwork.train.loop import train
from graftwork_chunked_loss import ChunkedLoss, ChunkedLossSettings

VOCABULARY, WIDTH, LABELS = 1000, 16, 21


class Model(nn.Module):
    """Embeddings, something between, and a head that can be the embeddings."""

    def __init__(self, *, tied: bool = False, capped: bool = False) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=not tied)
        self.capped = capped
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.embedding(ids)).tanh()

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        return 3.0 * torch.tanh(logits / 3.0) if self.capped else logits


def loss_of(size: int) -> Any:
    """What the strategy puts in the place of the plain loss."""
    return ChunkedLoss(ChunkedLossSettings(labels=size)).loss(SimpleNamespace())  # type: ignore[arg-type]


def step(loss: Any, *, dtype: torch.dtype = torch.float32, frozen: str = "", **options: Any) -> dict[str, Tensor]:
    """The loss of a step and the gradients of everything that is trained."""
    torch.manual_seed(0)
    model = Model(**options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and name.startswith(frozen)))
    ids, labels = torch.arange(LABELS) * 7 % VOCABULARY, torch.arange(LABELS) * 13 % VOCABULARY
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        total = loss(model, model(ids), labels) / 5
    total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": total.detach(), **gradients}


@pytest.mark.parametrize("size", [1, 4, LABELS, 1000])
@pytest.mark.parametrize("options", [{}, {"frozen": "head"}, {"tied": True}, {"capped": True}], ids=str)
def test_the_loss_and_every_gradient_are_those_of_the_plain_loss(size: int, options: dict[str, Any]) -> None:
    plain, chunked = step(cross_entropy, **options), step(loss_of(size), **options)
    torch.testing.assert_close(chunked, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"frozen": "head"}, {"tied": True}, {}], ids=str)
def test_in_bf16_the_gradients_are_as_near_to_those_in_fp32_as_the_plain_ones(options: dict[str, Any]) -> None:
    exact = step(cross_entropy, **options)
    plain, chunked = (step(loss, dtype=torch.bfloat16, **options) for loss in (cross_entropy, loss_of(4)))
    for name, value in exact.items():
        assert chunked[name].dtype == plain[name].dtype
        assert (chunked[name] - value).norm() <= 2.0 * (plain[name] - value).norm() + 1e-6, name


def test_a_head_with_an_adapter_learns_as_it_does_with_the_plain_loss() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    def adapted(loss: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
        model = inject_adapter_in_model(config, Model())
        loss(model, model(torch.arange(LABELS)), torch.arange(LABELS)).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, chunked = adapted(cross_entropy), adapted(loss_of(4))
    assert [name for name in plain if "lora" in name]
    torch.testing.assert_close(chunked, plain, rtol=1e-4, atol=1e-5)


def test_without_gradients_and_without_labels_it_is_the_plain_loss_too() -> None:
    model, hidden, labels = Model(), torch.randn(LABELS, WIDTH), torch.arange(LABELS)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(4)(model, hidden, labels), cross_entropy(model, hidden, labels))
    nothing = loss_of(4)(model, hidden[:0].requires_grad_(), labels[:0])
    nothing.backward()
    assert nothing == 0.0


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, Tensor):
                self.numbers = max(self.numbers, made.numel())
        return result


def test_no_more_logits_than_asked_for_are_ever_there() -> None:
    with Largest() as plain:
        step(cross_entropy, frozen="head")
    with Largest() as chunked:
        step(loss_of(4), frozen="head")
    assert plain.numbers == LABELS * VOCABULARY
    assert chunked.numbers == max(4 * VOCABULARY, WIDTH * VOCABULARY)  # the embeddings' gradient


def test_a_run_with_it_takes_the_steps_of_a_run_without(run: PlanOf, tmp_path: Any) -> None:
    lookup = DictLookup(*COMPONENTS, ChunkedLoss)
    also = {"peft.also_train": ["connector", "language.embeddings"]}
    plain = train(run(also), lookup, tmp_path / "plain", device="cpu")
    memory = {"memory": {"use": ["chunked-loss"], "chunked-loss": {"labels": 3}}}
    chunked = train(run(also | memory, lookup), lookup, tmp_path / "chunked", device="cpu")
    wanted, losses = ([line["loss"] for line in outcome.log] for outcome in (plain, chunked))
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert losses[0] != losses[-1]


def test_fp16_is_refused_with_the_reason() -> None:
    settings = RunContext(train=TrainSettings(precision="fp16"))
    plan = Plan(ModelSpec(Choice("model", "none", "none", "none", "0")), settings)
    (strategy,) = graftwork_chunked_loss.memory_strategies()
    assert [*strategy(ChunkedLossSettings()).validate(plan)] == [
        "its gradients exist before fp16's loss scaling could keep them from vanishing; use bf16 or fp32"
    ]
