"""What strategies for several processes say that they save, which one process cannot show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import COMPONENTS, plan_of

from graftwork.build import compose
from graftwork.config import settings
from graftwork.config.machine import Machine
from graftwork.contracts import Assembly, DictLookup, NoSettings
from graftwork.memory.budget import rehearse
from graftwork.memory.timeline import CATEGORIES
from graftwork_ddp import Ddp
from graftwork_fsdp import Fsdp
from graftwork_zero import Zero

ALONE = dict(zip(CATEGORIES, (8_000_000, 400_000, 400_000, 800_000, 5_000, 600), strict=True))


@pytest.fixture(scope="module")
def assembly(base: Path, lookup: DictLookup, tmp_path_factory: pytest.TempPathFactory) -> Assembly:
    """A small model with LoRA."""
    return compose.build(plan_of(base, tmp_path_factory.mktemp("plan")), lookup, device="cpu")


def largest_block(assembly: Assembly) -> int:
    """The bytes of the largest block."""
    blocks = [assembly.model.get_submodule(name) for row in assembly.structure.blocks.values() for name in row]
    return max(sum(parameter.nbytes for parameter in block.parameters()) for block in blocks)


def shared(assembly: Assembly, **given: Any) -> set[str]:
    """What a process with ZeRO keeps a quarter of; the rest it keeps whole, or not at all."""
    zero = Zero(settings.parse(Zero.Settings, given, where="zero", folder=Path.cwd()))
    kept = dict(zero.footprint(ALONE, 4, assembly))
    assert kept.keys() == set(CATEGORIES)
    if given.get("stage") == 3 or given.get("config"):
        kept["temporaries"] -= largest_block(assembly)
    assert all(size in (ALONE[name], ALONE[name] / 4, 0) for name, size in kept.items())
    return {f"no {name}" if kept[name] == 0 else name for name in CATEGORIES if kept[name] != ALONE[name]}


def test_zero_shares_out_more_with_every_stage(assembly: Assembly) -> None:
    assert shared(assembly, stage=1) == {"optimizer state"}
    assert shared(assembly) == {"optimizer state", "gradients"}
    assert shared(assembly, stage=3) == {"optimizer state", "gradients", "frozen weights", "trained weights"}


def test_what_zero_keeps_in_main_memory_is_not_on_the_device(assembly: Assembly, tmp_path: Path) -> None:
    assert shared(assembly, offload_optimizer=True) == {"no optimizer state", "gradients"}
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}')
    assert shared(assembly, config=str(tmp_path / "ds.json")) == {
        *("optimizer state", "gradients", "no frozen weights", "no trained weights")
    }


def test_fsdp_shares_out_blocks_and_leaves_the_rest_whole(assembly: Assembly) -> None:
    model = assembly.model
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    alone = ALONE | {
        "frozen weights": frozen,
        "trained weights": trained,
        "gradients": trained,
        "optimizer state": 2 * trained,
    }
    strategy = Fsdp(NoSettings())
    assert strategy.footprint(alone, 1, assembly) == alone
    kept = strategy.footprint(alone, 2, assembly)
    blocks = [model.get_submodule(name) for row in assembly.structure.blocks.values() for name in row]
    inside = {id(p): p for block in blocks for p in block.parameters()}.values()
    assert kept["frozen weights"] == frozen - sum(p.nbytes for p in inside if not p.requires_grad) // 2
    # All of LoRA lies in blocks here.
    assert [kept[name] for name in CATEGORIES[1:4]] == [trained / 2, trained / 2, trained]
    assert kept["temporaries"] == 600 + largest_block(assembly)
    assert kept["activations"] == alone["activations"]


@pytest.mark.parametrize(
    ("memory", "share"),
    [
        ({"use": ["ddp"]}, 1.0),
        *(({"use": ["zero"], "zero": {"stage": stage}}, share) for stage, share in ((1, 1.0), (2, 1.0), (3, 0.5))),
        ({"use": ["fsdp"]}, 0.56),
    ],
)
def test_the_rehearsal_counts_all_weights_on_each_process_but_where_they_are_sharded(
    memory: dict[str, Any], share: float, base: Path, tmp_path: Path
) -> None:
    if memory["use"] == ["zero"]:
        pytest.importorskip("deepspeed")
    lookup = DictLookup(*COMPONENTS, Ddp, Fsdp, Zero)

    def weights(memory: dict[str, Any]) -> int:
        changes = {"memory": memory, "train.precision": "bf16"}
        candidate = rehearse(plan_of(base, tmp_path, changes, lookup), lookup, Machine(), "cpu", None, processes=2)
        categories = candidate.steps[-1].footprint.categories
        return categories["frozen weights"] + categories["trained weights"]

    assert weights(memory) == pytest.approx(share * weights({}), rel=0.01)


def test_ddp_saves_nothing(assembly: Assembly) -> None:
    assert Ddp(NoSettings()).footprint(ALONE, 4, assembly) == ALONE
