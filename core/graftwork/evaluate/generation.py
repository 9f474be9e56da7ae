"""Answers of a model: greedy decoding of a padded batch with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftwork.contracts.batch import Batch, Encoded
from graftwork.contracts.device import device_type
from graftwork.contracts.model import batch_of
from graftwork.contracts.plan import config_of
from graftwork.contracts.records import Record
from graftwork.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts.assembly import Assembly


@dataclass(frozen=True)
class Answers:
    """What a model answered, one entry for each prompt."""

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    """The generated ids, up to and without the stop id."""
    tokens: tuple[int, ...]
    """How many tokens were generated, the stop id included."""
    ended: tuple[bool, ...]
    """Whether it ended by itself: with a stop id, and not at the limit. A stop id as the last token that is allowed is an end."""


@contextmanager
def answering(assembly: Assembly) -> Iterator[None]:
    """While entered, the model computes as for an answer: without dropout or gradients, at the assembly's precision."""
    import torch

    training = [module for module in assembly.model.modules() if module.training]
    assembly.model.eval()
    try:
        with torch.inference_mode(), assembly.autocast():
            yield
    finally:
        for module in training:
            module.training = True


def encode_prompt(assembly: Assembly, record: Record, max_new_tokens: int) -> Encoded:
    """The prompt of a record, its answer left out; DataError when it cannot be encoded or leaves no room for an answer."""
    prompt = assembly.processor.encode(record.without_answer())
    if room(assembly, prompt, max_new_tokens) < 1:
        raise DataError(
            f"the prompt of '{record.id}' has {len(prompt.input_ids)} tokens, and the model reads "
            f"{context_of(assembly)}, so there is no room for an answer; shorten the question"
        )
    return prompt


def room(assembly: Assembly, prompt: Encoded, max_new_tokens: int) -> int:
    """How long the answer to a prompt may get: `max_new_tokens`, or to the end of the model's context."""
    context = context_of(assembly)
    return min(max_new_tokens, context - len(prompt.input_ids)) if context else max_new_tokens


def context_of(assembly: Assembly) -> int | None:
    """How many tokens an assembled model reads; None where nothing limits them."""
    return assembly.architecture.context_length(config_of(assembly.plan.model_spec.model))


def answer(
    assembly: Assembly, prompts: Sequence[Encoded], *, max_new_tokens: int, features: Sequence[Any] | None = None
) -> Answers:
    """Answer every prompt greedily, as if each were alone; no answer is longer than there is `room` for it.

    `features` are those of the images of all prompts, an entry each in order, and save encoding them again.
    """
    import torch

    processor, model, device = assembly.processor, assembly.model, assembly.device
    batch = batch_of(processor, prompts, side="left").to(device)
    stop = torch.tensor(sorted(processor.stop_ids), device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    limits = [room(assembly, prompt, max_new_tokens) for prompt in prompts]
    max_lengths = torch.tensor(limits, device=device)
    steps: list[Tensor] = []
    ended: list[Tensor] = []
    lag = int(device_type(device) == "cuda")
    with answering(assembly):
        cache = model.new_cache()
        while True:
            hidden = model(batch, features, cache)
            token = model.logits(hidden[:, -1]).argmax(dim=-1)
            steps.append(token)
            finished = finished | torch.isin(token, stop) | (max_lengths <= len(steps))
            ended.append(finished.all())
            # Of a device that is one step behind, so that it goes on computing while the host waits for it.
            if len(steps) == max(limits) or (len(ended) > lag and ended[-1 - lag]):
                break
            # A sequence at its limit is not extended: the model has no positions beyond it.
            mask = torch.cat([batch.attention_mask, (max_lengths > len(steps))[:, None]], dim=1)
            nothing = torch.zeros_like(token, dtype=torch.bool)[:, None]
            fields = {name: torch.zeros_like(value[..., -1:]) for name, value in batch.token_fields.items()}
            padding = "left" if min(limits) <= len(steps) else batch.padding
            batch = Batch(token[:, None], mask, nothing, token[:, None], {}, token_fields=fields, padding=padding)
            features = None
    rows = torch.stack(steps, dim=1).tolist()
    ids = [until_stop(row[:limit], processor.stop_ids) for row, limit in zip(rows, limits, strict=True)]
    return Answers(
        tuple(processor.decode(row) for row in ids),
        tuple(ids),
        tuple(min(len(row) + 1, limit) for row, limit in zip(ids, limits, strict=True)),
        tuple(len(row) < limit for row, limit in zip(ids, limits, strict=True)),
    )


def until_stop(ids: Sequence[int], stop_ids: frozenset[int]) -> tuple[int, ...]:
    """The ids before the first stop id."""
    end = next((position for position, token in enumerate(ids) if token in stop_ids), len(ids))
    return tuple(ids[:end])
