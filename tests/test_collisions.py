"""Two memory strategies that replace the same thing are refused, whoever wrote them, and others combine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import COMPONENTS, plan_of

from graftwork.build import compose
from graftwork.contracts import Assembly, DictLookup, MemoryStrategy, NoSettings, TrainSettings, cross_entropy
from graftwork.errors import PlanRefused
from graftwork_adam8bit import Adam8bit
from graftwork_chunked_loss import ChunkedLoss
from graftwork_ddp import Ddp
from graftwork_fsdp import Fsdp
from graftwork_zero import Zero


class OwnAdam(MemoryStrategy[NoSettings]):
    """An optimizer of its own"""

    name = "own-adam"

    def optimizer(self, groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups)


class OwnAdamToo(OwnAdam):
    """What it inherits counts as its own"""

    name = "own-adam-too"


class OwnLoss(MemoryStrategy[NoSettings]):
    """A loss of its own"""

    name = "own-loss"

    def loss(self, assembly: Assembly) -> Callable[..., torch.Tensor]:
        return lambda *inputs: cross_entropy(*inputs)


class PutsALoss(MemoryStrategy[NoSettings]):
    """A loss that nobody sees before the model is built"""

    name = "puts-a-loss"

    def prepare(self, assembly: Assembly) -> None:
        assembly.cross_entropy = lambda *inputs: cross_entropy(*inputs)


class KeepsWeights(MemoryStrategy[NoSettings]):
    """Weights in a way of its own"""

    name = "keeps-weights"

    def full_params(self, parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()


OWN = (OwnAdam, OwnAdamToo, OwnLoss, PutsALoss, KeepsWeights)
LOOKUP = DictLookup(*COMPONENTS, Adam8bit, ChunkedLoss, Ddp, Fsdp, Zero, *OWN)


def reasons(base: Path, memory: dict[str, Any]) -> tuple[str, ...]:
    """Why the plan with these strategies is refused, but for packages that are not installed; nothing if it is not."""
    try:
        plan_of(base, base, {"memory": memory}, LOOKUP)
    except PlanRefused as error:
        return tuple(reason for reason in error.details if " needs " not in reason)
    return ()


@pytest.mark.parametrize(
    ("first", "second", "do"),
    [
        ("adam8bit", "own-adam", "bring the optimizer"),
        ("own-adam", "own-adam-too", "bring the optimizer"),
        ("own-loss", "chunked-loss", "compute the loss"),
        ("ddp", "zero", "take the steps of a run"),
        ("fsdp", "zero", "take the steps of a run"),
        ("keeps-weights", "fsdp", "keep weights in a way of their own"),
    ],
)
def test_two_that_replace_the_same_thing_are_refused_with_both_names(
    base: Path, first: str, second: str, do: str
) -> None:
    said = f"memory: '{first}' and '{second}' both {do}; keep one of them, and remove the other from memory"
    assert reasons(base, {"use": [first, second]}) == (said,)
    assert reasons(base, {"try": [[first], [second]]}) == ()
    assert reasons(base, {"try": [[first], [first, second]]}) == (said,)


def test_three_are_named_all(base: Path) -> None:
    assert reasons(base, {"use": ["own-adam", "adam8bit", "own-adam-too"]}) == (
        "memory: 'own-adam' and 'adam8bit' and 'own-adam-too' all bring the optimizer; keep one of them, and remove the others "
        "from memory",
    )


def test_those_that_replace_different_things_combine(base: Path) -> None:
    assert reasons(base, {"use": ["checkpointing", "own-adam", "chunked-loss", "ddp", "keeps-weights"]}) == ()


@pytest.mark.parametrize("use", [["chunked-loss", "puts-a-loss"], ["puts-a-loss", "own-loss"]])
def test_a_loss_that_is_put_in_the_place_of_another_while_building_is_refused(base: Path, use: list[str]) -> None:
    with pytest.raises(PlanRefused) as caught:
        compose.build(plan_of(base, base, {"memory": {"use": use}}, LOOKUP), LOOKUP, device="cpu")
    assert str(caught.value) == f"'{use[0]}' and '{use[1]}' both compute the loss; remove one of them from memory"
    alone = plan_of(base, base, {"memory": {"use": ["puts-a-loss"]}}, LOOKUP)
    assert compose.build(alone, LOOKUP, device="cpu").cross_entropy is not cross_entropy
