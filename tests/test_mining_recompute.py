"""Recomputed mining: the same tokens and gradients, without the enlarged maps."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import COMPONENTS, PlanOf
from torch import Tensor

import graftwork_mining_recompute
from graftwork import GraftworkError
from graftwork.build import compose
from graftwork.contracts import Assembly, Batch, DictLookup, Structure, collate, summed_loss
from graftwork_mgm.model import KEY_BIASES
from graftwork_mining_recompute import MiningRecompute, MiningRecomputeSettings

LOOKUP = DictLookup(*COMPONENTS, MiningRecompute)
TRAINED = ["connector", "mining", "vision.high"]


def built(run: PlanOf, memory: Sequence[str], images: int = 1, **changes: Any) -> tuple[Assembly, Batch]:
    """A tiny MGM-Gemma that trains connector, mining and the high tower, and a batch with four images."""
    table = {"use": list(memory), "mining-recompute": {"pictures": images}} if memory else {}
    plan = run({"peft.also_train": TRAINED, "memory": table, **changes}, LOOKUP)
    assembly = compose.build(plan, LOOKUP, device="cpu")
    records = LOOKUP.find("data_source", "shapes").component
    encoded = [assembly.processor.encode(record) for record in records(records.Settings(6)).records()]
    return assembly, collate(encoded, pad_id=assembly.processor.pad_id)


def step(assembly: Assembly, batch: Batch) -> tuple[dict[str, Tensor], int]:
    """The loss and the gradients of a step, and the bytes that autograd kept for them beside the weights."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in assembly.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    assembly.model.train()
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = summed_loss(assembly.model, batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in assembly.trained().items() if name not in KEY_BIASES}
    assert all(gradient is not None for gradient in gradients.values())
    return {"loss": loss.detach(), **gradients}, sum(kept.values())


@pytest.mark.parametrize("images", [1, 3, 100])
def test_the_step_is_the_same_and_less_is_kept_for_it(run: PlanOf, images: int) -> None:
    plain, much = step(*built(run, []))
    recomputed, little = step(*built(run, ["mining-recompute"], images))
    torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)
    enlarged = 4 * (8 + 16 + 32 + 64) * 16 * 16 * 4  # images, widths of the four maps, the finest grid, bytes
    assert much - little > 3 * enlarged


def test_tiles_and_the_view_of_the_whole_are_joined_as_before(run: PlanOf) -> None:
    tiles = {"model.image_grid": 2, "model.image_global": True, "train.max_length": 512}
    plain, _ = step(*built(run, [], **tiles))
    recomputed, _ = step(*built(run, ["mining-recompute"], **tiles))
    torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)


def test_in_evaluation_images_are_joined_some_at_a_time_as_well(run: PlanOf) -> None:
    plain, batch = built(run, [])
    recomputed, _ = built(run, ["mining-recompute"])
    seen: list[int] = []
    inner = recomputed.model.mining.tiles
    recomputed.model.mining.tiles = lambda maps: seen.append(len(maps)) or inner(maps)
    with torch.no_grad():
        torch.testing.assert_close(recomputed.model.eval()(batch), plain.model.eval()(batch), rtol=1e-4, atol=1e-5)
    assert seen == [1] * 4


def test_a_model_without_such_blocks_is_refused() -> None:
    (strategy,) = graftwork_mining_recompute.memory_strategies()
    structure = Structure(torch.nn.Identity(), roles={}, blocks={"language": ()})
    with pytest.raises(GraftworkError) as caught:
        strategy(MiningRecomputeSettings()).prepare(SimpleNamespace(structure=structure))  # type: ignore[arg-type]
    assert str(caught.value) == (
        "'mining-recompute' works on blocks of 'mining', and this model has 'language'; leave it out"
    )
