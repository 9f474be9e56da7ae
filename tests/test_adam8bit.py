"""AdamW in 8 bits: close to AdamW, small, and resumed exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import COMPONENTS, Interrupted, PlanOf, interrupt_at
from torch import Tensor

from graftwork.contracts import CheckpointSaved, DictLookup, TrainSettings
from graftwork.train.loop import train
from graftwork_adam8bit import Adam8bit, Adam8bitSettings

pytest.importorskip("bitsandbytes")

LOOKUP = DictLookup(*COMPONENTS, Adam8bit)
SETTINGS = TrainSettings(learning_rate=0.02, weight_decay=0.01, adam_betas=(0.8, 0.95), adam_epsilon=1e-6)


def trained(kind: str, steps: int, least: int = 1) -> tuple[Tensor, Any]:
    """What some steps of the plain AdamW, or of this one, add to a matrix; and the optimizer's state of it."""
    torch.manual_seed(0)
    weight, inputs = torch.nn.Parameter(torch.randn(64, 96)), torch.randn(32, 96)
    start, groups = weight.detach().clone(), [{"params": [weight], "lr": 0.01}]
    if kind == "plain":
        optimizer: Any = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.01)
    else:
        optimizer = Adam8bit(Adam8bitSettings(least)).optimizer(groups, SETTINGS)
    for _ in range(steps):
        optimizer.zero_grad()
        ((inputs @ weight.T).square().mean() + (inputs @ weight.T).sin().mean()).backward()
        optimizer.step()
    return weight.detach() - start, optimizer.state[weight]


@pytest.mark.parametrize(("steps", "near"), [(1, 1e-3), (20, 0.1)])
def test_it_learns_almost_what_adamw_learns(steps: int, near: float) -> None:
    plain, _ = trained("plain", steps)
    small, _ = trained("8 bits", steps)
    assert (small - plain).norm() < near * plain.norm()


def test_its_moments_take_a_byte_for_a_number_and_small_parameters_keep_theirs() -> None:
    def size(state: Any) -> int:
        return sum(v.nbytes for key, v in state.items() if isinstance(v, Tensor) and not key.startswith("qmap"))

    numbers = 64 * 96
    assert size(trained("plain", 1)[1]) >= 8 * numbers
    assert size(trained("8 bits", 1)[1]) < 2.1 * numbers
    assert size(trained("8 bits", 1, least=numbers + 1)[1]) >= 8 * numbers


def test_a_run_that_is_interrupted_goes_on_exactly(run: PlanOf, tmp_path: Path) -> None:
    from graftwork.checkpoint.store import OPTIMIZER, read_tensors

    changes = {"memory": {"use": ["adam8bit"], "adam8bit": {"least": 1}}, "train.save_every": 2}
    plan = run(changes, LOOKUP)
    whole = train(plan, LOOKUP, tmp_path / "whole", device="cpu")
    with pytest.raises(Interrupted):
        train(plan, LOOKUP, tmp_path / "broken", device="cpu", listen=interrupt_at(CheckpointSaved, 2))
    state = read_tensors(tmp_path / "broken" / "checkpoint-2" / OPTIMIZER / "state.safetensors")
    assert [name for name, tensor in state.items() if tensor.dtype == torch.uint8]
    resumed = train(plan, LOOKUP, tmp_path / "broken", resume=True, device="cpu")
    assert [line["loss"] for line in resumed.log] == [line["loss"] for line in whole.log]
    for name, parameter in whole.assembly.trained().items():
        assert torch.equal(resumed.assembly.trained()[name], parameter), name
