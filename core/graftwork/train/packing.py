"""Packing in a run: whether the model keeps the records of a row apart, and what is saved."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from graftwork import processes
from graftwork.contracts.batch import Encoded
from graftwork.contracts.model import batch_of
from graftwork.contracts.packing import rows_of_step
from graftwork.errors import PlanRefused
from graftwork.train.feeding import Feed

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts.assembly import Assembly

ALLOWED = {"fp32": 1e-4, "bf16": 0.2, "fp16": 0.2}
"""Precision to how far the hidden state of any token of a packed record may lie from its own, relative to its size: kernels differ in
rounding."""
COUNTED = 200
"""How many steps padding is counted over."""


def try_packing(assembly: Assembly, feed: Feed, steps: int) -> tuple[str, ...]:
    """What packing saves a run of so many steps, if it packs; PlanRefused where its model does not keep records apart. Collective."""
    if not feed.settings.packing:
        return ()
    check_packing(assembly, feed.two_different())
    return (padding_message(feed, steps),)


def check_packing(assembly: Assembly, examples: Sequence[Encoded]) -> None:
    """PlanRefused where a record's hidden states depend on another one before it in the row. `examples` are two different records, each of
    which is tried behind the other. Collective where the model is."""
    import torch

    model, processor = assembly.model, assembly.processor
    training = model.training

    def hidden(rows: Sequence[int], these: Sequence[Encoded]) -> Tensor:
        batch = batch_of(processor, these, rows=rows).to(assembly.device)
        found: Tensor = assembly.run_forward(lambda: model(batch))[0].float()
        return found

    errors = []
    model.eval()
    try:
        with torch.no_grad(), assembly.autocast():
            for before, behind in (examples, examples[::-1]):
                by_itself = hidden((1,), [behind])
                packed = hidden((2,), [before, behind])[-len(by_itself) :]
                errors.append(float(((packed - by_itself).norm(dim=1) / by_itself.norm(dim=1)).max()))
    finally:
        model.train(training)
    if not max(errors) <= ALLOWED[assembly.precision]:
        raise PlanRefused(
            f"train.packing puts several records into a row, and '{assembly.architecture.name}' does not keep them apart here: what it "
            f"computes of a token changes by {max(errors):.2g} of its size behind another record; leave train.packing out"
        )


def padding_message(feed: Feed, steps: int) -> str:
    """What packing saves, as a clause: the share of padding among the tokens that the model sees in the first steps, with and without."""
    settings, lengths_of = feed.settings, feed.data.lengths
    real, plain, packed = 0, 0, 0
    for step in range(min(steps, COUNTED)):
        batch = feed.sampler.batch(step)
        for rank in range(processes.count()):
            lengths = [int(lengths_of[index]) for index in batch[rank :: processes.count()]]
            size = settings.micro_batch_size
            alone, together = (
                [sum(lengths[n] for n in row) for row in rows_of_step(lengths, size, limit)]
                for limit in (None, settings.max_length)
            )
            real += sum(lengths)
            plain += padded_size(alone, size)
            packed += padded_size(together, size)
    return f"packing: {1 - real / packed:.1%} of the tokens are padding, and {1 - real / plain:.1%} would be without it"


def padded_size(lengths: Sequence[int], size: int | None) -> int:
    """How many tokens rows of these lengths come to, so many at a time, each padded to the longest beside it."""
    rest, total = iter(lengths), 0
    while rows := list(islice(rest, size)):
        total += max(rows) * len(rows)
    return total
