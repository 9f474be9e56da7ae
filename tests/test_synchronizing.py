"""Nothing reads a number out of a tensor in a training step or a decoded token: on a GPU the host would wait for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_runs import COMPONENTS, LORA, PlanOf
from torch.utils._python_dispatch import TorchDispatchMode

from graftwork.attention.transformers import _transformers_mask, packing
from graftwork.build import compose
from graftwork.contracts import Assembly, Batch, DictLookup, Encoded, batch_of, stepper_for
from graftwork.evaluate.generation import answer
from graftwork.train.loop import Loop, train

LOOKUP = DictLookup(*COMPONENTS)
READING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
"""What makes the host wait: a number, or how many there are of something."""


class Reads(TorchDispatchMode):
    """Counts what is read while it is entered."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in READING
        return function(*args, **(kwargs or {}))


@pytest.fixture
def assembly(run: PlanOf) -> Assembly:
    """A tiny MGM-Gemma with an adapter, and connector and mining trained."""
    return compose.build(run({"peft": LORA | {"also_train": ["connector", "mining"]}}, LOOKUP), LOOKUP, device="cpu")


@pytest.fixture
def examples(assembly: Assembly) -> list[Encoded]:
    """Records of different lengths, with images and without."""
    records = LOOKUP.find("data_source", "shapes").component
    found = [assembly.processor.encode(record) for record in records(records.Settings(6, long=(1, 4))).records()]
    assert len({len(each.input_ids) for each in found}) > 1
    return found


@pytest.mark.parametrize("form", ["padded", "weighted", "packed"])
def test_a_micro_batch_reads_nothing(assembly: Assembly, examples: list[Encoded], form: str) -> None:
    stepper = stepper_for(assembly, assembly.plan.run_context.train)
    if form == "weighted":
        examples = [replace(each, weight=1.0 + place % 2) for place, each in enumerate(examples)]
    assembly.model.train()
    with Reads() as reads:
        for _ in range(2):
            batch = batch_of(assembly.processor, examples, rows=(2, 3, 1) if form == "packed" else ())
            before = reads.count  # collation is on the host
            stepper.accumulate(batch, 10.0)
            assert reads.count == before
    assert not batch.attention_mask.all()
    assert all(parameter.grad is not None for name, parameter in stepper.parameters.items() if "lora" in name)


def test_neither_does_a_decoded_token(assembly: Assembly, examples: list[Encoded]) -> None:
    batch, model = batch_of(assembly.processor, examples, side="left"), assembly.model.eval()
    with torch.no_grad(), Reads() as reads:
        cache = model.new_cache()
        model(batch, None, cache)
        token = batch.input_ids[:, -1:]
        mask = torch.cat([batch.attention_mask, torch.ones_like(token, dtype=torch.bool)], 1)
        nothing = torch.zeros_like(token, dtype=torch.bool)
        model.logits(model(Batch(token, mask, nothing, token, {}, padding="left"), None, cache))
    assert reads.count == 0


def test_the_loss_is_read_once_a_step(run: PlanOf, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    inner = Loop.take_step

    def counted(self: Loop, micro_batches: Any, *others: Any) -> Any:
        with Reads() as reads:
            line = inner(self, micro_batches, *others)
        counts.append((len(micro_batches), reads.count))
        return line

    monkeypatch.setattr(Loop, "take_step", counted)
    for size in (8, 1):
        train(
            run({"train.steps": 1, "train.batch_size": 8, "train.micro_batch_size": size}),
            LOOKUP,
            tmp_path / str(size),
            device="cpu",
        )
    (one, few), (many, more) = counts
    assert (one, many) == (1, 8)
    assert few == more


@pytest.mark.parametrize(
    ("lengths", "side", "queries"),
    [((3, 3), "right", 3), ((3, 1), "right", 3), ((3, 1), "left", 3), ((3, 3), "left", 1), ((3, 1), "left", 1)],
)
def test_a_batch_that_says_where_its_padding_is_has_the_mask_that_would_be_read(
    assembly: Assembly, lengths: tuple[int, ...], side: str, queries: int
) -> None:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    batch = batch_of(assembly.processor, [Encoded([5] * n, [False] * n, [5] * n, {}) for n in lengths], side=side)
    for function in (causal_mask_function, bidirectional_mask_function):
        masks = []
        for told in (batch, replace(batch, padding=None)):
            with packing(told), Reads() as reads:
                places = {"q_length": queries, "kv_length": 3, "q_offset": 3 - queries, "mask_function": function}
                masks.append(_transformers_mask(**places, attention_mask=told.attention_mask))
            assert (reads.count == 0) == (told.padding is not None)
        assert (masks[0] is None) == (masks[1] is None)


def test_of_another_mask_than_the_batchs_nothing_is_assumed(assembly: Assembly) -> None:
    from transformers.masking_utils import bidirectional_mask_function

    batch = batch_of(assembly.processor, [Encoded([5] * 3, [False] * 3, [5] * 3, {})])
    with packing(batch):
        mask = torch.tensor([[True, False, True]])
        seen = _transformers_mask(
            q_length=3, kv_length=3, mask_function=bidirectional_mask_function, attention_mask=mask
        )
    assert seen is not None and seen.equal(mask)


def test_of_a_batch_that_does_not_say_it_padding_is_found_in_every_decoded_token(
    assembly: Assembly, examples: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly.processor, "stop_ids", frozenset({-1}))
    wanted = answer(assembly, examples, max_new_tokens=6)
    untold = lambda batch: replace(batch, padding=None)  # noqa: E731
    monkeypatch.setattr(assembly.processor, "complete", untold, raising=False)
    paddings = []
    inner = assembly.model.forward

    def seen(batch: Batch, *others: Any) -> Any:
        paddings.append(batch.padding)
        return inner(batch, *others)

    monkeypatch.setattr(assembly.model, "forward", seen)
    assert answer(assembly, examples, max_new_tokens=6) == wanted
    assert paddings == [None] * 6
