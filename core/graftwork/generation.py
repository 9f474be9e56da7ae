"""Answers of a model: greedy decoding of a padded batch with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftwork.batch import Batch, Encoded, collate
from graftwork.errors import DataError
from graftwork.records import Record

if TYPE_CHECKING:
    from graftwork.compose import Assembly


@dataclass(frozen=True)
class Answers:
    """What a model said, one entry for each prompt."""

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    """The generated ids, up to and without the stop id."""
    tokens: tuple[int, ...]
    """How many tokens were generated, the stop id included."""


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
    context = context_length(assembly.plan.identity.model.config or {})
    if context and len(prompt.input_ids) + max_new_tokens > context:
        raise DataError(
            f"the prompt of '{record.id}' has {len(prompt.input_ids)} tokens, and with {max_new_tokens} for the answer that is "
            f"more than the {context} that the model reads; shorten the question"
        )
    return prompt


def context_length(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model reads, as Hugging Face's configurations say it; None when they do not."""
    tables = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    return next((table["max_position_embeddings"] for table in tables if table.get("max_position_embeddings")), None)


def answer(
    assembly: Assembly, prompts: Sequence[Encoded], *, max_new_tokens: int, features: Mapping[str, Any] | None = None
) -> Answers:
    """Answer every prompt greedily, as if each were alone.

    `features` are the towers' outputs for the pictures of all prompts, in order, and save looking at them again.
    """
    import torch

    processor, model, device = assembly.processor, assembly.model, assembly.device
    batch = collate(prompts, pad_id=processor.pad_id, side="left").to(device)
    stop = torch.tensor(sorted(processor.stop_ids), device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    steps = []
    with answering(assembly):
        cache = model.new_cache()
        while True:
            hidden = model(batch, features, cache)
            token = model.logits(hidden[:, -1]).argmax(dim=-1)
            finished = finished | torch.isin(token, stop)
            steps.append(token)
            if len(steps) == max_new_tokens or finished.all():
                break
            mask = torch.cat([batch.attention_mask, torch.ones_like(batch.attention_mask[:, :1])], dim=1)
            nothing = torch.zeros_like(token, dtype=torch.bool)[:, None]
            batch, features = Batch(token[:, None], mask, nothing, token[:, None], {}), None
    rows = torch.stack(steps, dim=1).tolist()
    ids = [until_stop(row, processor.stop_ids) for row in rows]
    return Answers(
        tuple(processor.decode(row) for row in ids),
        tuple(ids),
        tuple(min(len(row) + 1, len(steps)) for row in ids),
    )


def until_stop(ids: Sequence[int], stop_ids: frozenset[int]) -> tuple[int, ...]:
    """The ids before the first stop id."""
    end = next((position for position, token in enumerate(ids) if token in stop_ids), len(ids))
    return tuple(ids[:end])
