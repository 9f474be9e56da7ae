"""The rehearsal: what a step needs, without weights and without a CUDA device, against what it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_runs import COMPONENTS, LORA, METHODS, plan_of

from graftwork.config.machine import Machine
from graftwork.contracts import DictLookup, MemoryStrategy, NoSettings, Plan, Requires
from graftwork.contracts.anatomy import positions_of
from graftwork.errors import GraftworkError
from graftwork.memory.rehearsal import Step, rehearsing, watching
from graftwork.memory.timeline import (
    ACTIVATIONS,
    BACKWARD,
    FORWARD,
    FROZEN,
    TEMPORARIES,
    Allocation,
    MemoryTimeline,
    OpEvent,
)
from graftwork_mgm import MgmGemma
from graftwork_torch_attention import Sdpa

CPU = Machine()
LOOKUP = DictLookup(*COMPONENTS)


class Curious(MemoryStrategy[NoSettings]):
    """Looks at a number of the loss"""

    name: ClassVar[str] = "curious"

    def prepare(self, assembly: Any) -> None:
        assembly.cross_entropy = lambda model, hidden, labels: hidden.sum() * float(hidden.sum())


class Choosing(MemoryStrategy[NoSettings]):
    """Takes of the loss what is positive"""

    name: ClassVar[str] = "choosing"

    def prepare(self, assembly: Any) -> None:
        assembly.cross_entropy = lambda model, hidden, labels: hidden[hidden.sum(-1) > 0].sum()


class Counting(MemoryStrategy[NoSettings]):
    """Decides by numbers that no weight enters"""

    name: ClassVar[str] = "counting"
    found: ClassVar[list[tuple[int, ...]]] = []

    def prepare(self, assembly: Any) -> None:
        plain = assembly.cross_entropy

        def counted(model: Any, hidden: Any, labels: Any) -> Any:
            window = torch.arange(3).repeat_interleave(torch.full((3,), 2))
            self.found.append((len(labels), int(window.sum()), int((labels >= 0).sum())))
            return plain(model, hidden, labels)

        assembly.cross_entropy = counted


class Redrawing(MgmGemma):
    """A model whose initial values are drawn again while some are too large"""

    name: ClassVar[str] = "redrawing"

    def build(self, *given: Any) -> Any:
        structure = super().build(*given)
        weight = structure.model.model.mm_projector[0].weight
        while bool((weight.abs() > 9).any()):
            torch.nn.init.normal_(weight)
        return structure


class OnlyOnCards(Sdpa):
    """A fused kernel that needs a CUDA device"""

    name: ClassVar[str] = "only-on-cuda"
    requires = Requires(cuda=(1, 0))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it is not asked on fake tensors")


def rehearsed(plan: Plan, micro_batch: int, *, device: str = "cpu", lookup: DictLookup = LOOKUP, **more: Any) -> Step:
    with rehearsing(plan, lookup, more.pop("machine", CPU), device=device, **more) as watched:
        return watched.take(micro_batch)


def measured(plan: Plan, micro_batch: int, **more: Any) -> Step:
    with watching(plan, LOOKUP, **more) as watched:
        return watched.take(micro_batch)


@pytest.mark.parametrize(
    ("changes", "micro_batch"),
    [
        ({}, 2),
        ({"peft": LORA | {"dropout": 0.1, "also_train": ["connector", "mining"]}, "train.precision": "bf16"}, 4),
        ({"memory.use": ["checkpointing"]}, 2),
        ({"peft": METHODS["full"], "attention.prefer": ["eager"]}, 1),
    ],
)
def test_a_step_takes_what_was_rehearsed(base: Path, tmp_path: Path, changes: dict[str, Any], micro_batch: int) -> None:
    plan = plan_of(base, tmp_path, changes)
    predicted, found = rehearsed(plan, micro_batch).footprint, measured(plan, micro_batch).footprint
    assert predicted.peak == pytest.approx(found.peak, rel=0.01)
    assert predicted.categories == pytest.approx(found.categories, rel=0.01, abs=4096)
    assert (predicted.phase, predicted.module, predicted.operation) == (found.phase, found.module, found.operation)


def test_weights_gradients_and_optimizer_state_are_those_of_pen_and_paper(base: Path, tmp_path: Path) -> None:
    plan = plan_of(base, tmp_path, {"train.precision": "bf16"})
    with rehearsing(plan, LOOKUP, CPU, device="cpu") as watched:
        categories = watched.take(1).footprint.categories
        counts = watched.assembly.adaptation.counts
        buffers = sum(buffer.nbytes for buffer in watched.assembly.model.buffers())
    assert categories["frozen weights"] == 2 * (counts["total"] - counts["trained"]) + buffers
    assert categories["trained weights"] == categories["gradients"] == 4 * counts["trained"]
    tensors = len(watched.stepper.parameters)
    assert categories["optimizer state"] == 8 * counts["trained"] + 4 * tensors  # and a step's number for each


def test_a_first_update_of_zeros_leaves_what_a_whole_step_leaves(base: Path, tmp_path: Path) -> None:
    plan = plan_of(base, tmp_path)
    with rehearsing(plan, LOOKUP, CPU, device="cpu") as watched:
        first, second = watched.take(2), watched.take(2)
    assert first.footprint.categories == second.footprint.categories


def test_memory_grows_evenly_with_the_micro_batch(base: Path, tmp_path: Path) -> None:
    plan = plan_of(base, tmp_path, {"train.batch_size": 16})
    with rehearsing(plan, LOOKUP, CPU, device="cpu") as watched:
        one, two, four = (watched.take(size).footprint.peak for size in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)


def test_recomputing_costs_multiplications_and_saves_activations(base: Path, tmp_path: Path) -> None:
    plain = rehearsed(plan_of(base, tmp_path), 4)
    saving = rehearsed(plan_of(base, tmp_path, {"memory.use": ["checkpointing"]}), 4)
    assert saving.footprint.categories["activations"] < 0.7 * plain.footprint.categories["activations"]
    assert 1.1 < saving.flops / plain.flops < 1.5


def test_the_largest_things_are_named(base: Path, tmp_path: Path) -> None:
    found = rehearsed(plan_of(base, tmp_path), 1).footprint.largest
    assert len(found) == 10
    assert [group.bytes for group in found] == sorted((group.bytes for group in found), reverse=True)
    mlp = next(group for group in found if group.path == "model.layers.*.mlp.up_proj.base_layer.weight")
    assert (mlp.category, mlp.shape, mlp.dtype, mlp.count, mlp.bytes) == (FROZEN, (320, 128), "float32", 4, 655360)


def test_on_a_card_fused_attention_keeps_no_scores_and_plain_attention_does(base: Path, tmp_path: Path) -> None:
    def activations(kernel: str) -> int:
        changes = {"attention.prefer": [kernel], "train.precision": "bf16"}
        step = rehearsed(plan_of(base, tmp_path, changes), 4, device="cuda")
        return step.footprint.categories["activations"]

    scores = 4 * 4 * 4 * 128 * 128 * 2  # layers, records, heads, queries, keys, bytes
    assert activations("eager") - activations("sdpa") > scores


def test_a_kernel_that_needs_a_card_is_counted_as_a_fused_one(base: Path, tmp_path: Path) -> None:
    lookup = DictLookup(*COMPONENTS, OnlyOnCards)
    gpu = Machine(devices=("a CUDA device",), capability=(9, 0), cuda=True)
    steps = [
        rehearsed(
            plan_of(base, tmp_path, {"attention.prefer": prefer}, lookup), 2, device="cuda", lookup=lookup, machine=gpu
        )
        for prefer in (["only-on-cuda", "eager"], ["sdpa"])
    ]
    assert steps[0].footprint.categories == steps[1].footprint.categories


def test_on_a_card_normalisation_is_computed_in_fp32(base: Path, tmp_path: Path) -> None:
    plan = plan_of(base, tmp_path, {"train.precision": "bf16", "peft": {"also_train": ["mining"]}})
    on_card, on_cpu = (rehearsed(plan, 4, device=device).footprint for device in ("cuda", "cpu"))
    assert on_card.categories["activations"] > on_cpu.categories["activations"]


def test_records_are_as_long_as_the_plan_allows_and_all_text_is_labelled(base: Path, tmp_path: Path) -> None:
    step = rehearsed(plan_of(base, tmp_path), 1)
    assert (step.tokens, step.labels) == (128, 112)
    assert rehearsed(plan_of(base, tmp_path), 1, longest=60).tokens == 60
    with pytest.raises(GraftworkError) as caught:
        rehearsed(plan_of(base, tmp_path, {"train.max_length": 20}), 1)
    assert str(caught.value).startswith("train.max_length is 20, and an image with a short question already takes ")


def test_neither_weights_nor_random_numbers_are_touched(base: Path, tmp_path: Path) -> None:
    plan = plan_of(base, tmp_path)
    model_spec = plan.model_spec
    assert model_spec.model.weights
    gone = replace(model_spec.model, weights=replace(model_spec.model.weights, path="/nowhere"))
    before = torch.get_rng_state()
    rehearsed(replace(plan, model_spec=replace(model_spec, model=gone)), 1)
    assert torch.get_rng_state().equal(before)


def test_it_is_rehearsed_as_if_all_weights_were_there_but_those_that_start_fresh(tmp_path: Path) -> None:
    with rehearsing(plan_of(None, tmp_path), LOOKUP, CPU, device="cpu") as watched:
        assembly = watched.assembly
    assert assembly.adaptation.newly_initialised == ("connector", "mining")
    lacking = {
        name.split(".")[1] for name in assembly.state_to_save() if name not in assembly.adaptation.adapter_parameters
    }
    assert lacking == {"mm_projector", *(f"vlm_uni_{part}_projector" for part in ("query", "aux", "val"))}


@pytest.mark.parametrize("strategy", [Curious, Choosing])
def test_code_that_decides_by_a_number_is_named(strategy: Any, base: Path, tmp_path: Path) -> None:
    lookup = DictLookup(*COMPONENTS, strategy)
    with pytest.raises(GraftworkError) as caught:
        rehearsed(plan_of(base, tmp_path, {"memory.use": [strategy.name]}, lookup), 1, lookup=lookup)
    assert str(caught.value) == (
        "the model or a memory strategy reads a number out of a tensor while it computes, which cannot be rehearsed; "
        "let it decide by shapes and settings"
    )


# The timeline -----------------------------------------------------------------------------------------------------------


def timeline(*lives: tuple[int, int, int | None, str], operations: int = 4) -> MemoryTimeline:
    """Allocations given as size, birth, death and category, over operations of which the second half goes backwards."""
    made = MemoryTimeline()
    for number in range(operations):
        forwards = number < operations // 2
        made.op_events.append(
            OpEvent(FORWARD if forwards else BACKWARD, f"block.{number}", "mm", int(not forwards), forwards)
        )
    for size, allocated_at, freed_at, category in lives:
        pass_index = made.op_events[allocated_at].pass_index
        last = None if freed_at is None else made.op_events[min(freed_at, operations - 1)].pass_index
        made.allocations.append(
            Allocation(size, allocated_at, FORWARD, pass_index, "x.0", (size,), "uint8", category, freed_at, last)
        )
    return made


def test_code_may_decide_by_what_no_weight_enters(base: Path, tmp_path: Path) -> None:
    """By grids, counts and masks, as Qwen-VL and Idefics do."""
    Counting.found.clear()
    lookup = DictLookup(*COMPONENTS, Counting)
    plan = plan_of(base, tmp_path, {"memory.use": ["counting"]}, lookup)
    labels = rehearsed(plan, 2, lookup=lookup).labels
    count = 2 * (labels - 1)  # The first token of a row is predicted by none.
    assert Counting.found == [(count, 6, count)]


def test_what_draws_initial_values_may_look_at_them(base: Path, tmp_path: Path) -> None:
    lookup = DictLookup(*COMPONENTS, Redrawing)
    assert rehearsed(plan_of(base, tmp_path, {"model.use": "redrawing"}, lookup), 1, lookup=lookup).footprint.peak > 0


@pytest.mark.parametrize("language", ["text_config", "language_config"])
def test_the_context_is_that_of_the_language_model(language: str) -> None:
    """Of BLIP-2's three parts it is not that of its first."""
    config = {"a_config": {"max_position_embeddings": 512}, language: {"max_position_embeddings": 2048}}
    assert positions_of(config) == 2048
    assert positions_of({"vision_config": {}, "b_config": {"max_position_embeddings": 77}}) == 77


def test_the_peak_is_where_most_is_alive_and_deaths_come_after_their_moment() -> None:
    found = timeline((10, 0, None, FROZEN), (5, 1, 3, ""), (7, 2, 3, ""), (1, 3, None, "")).footprint(0)
    assert (found.peak, found.module, found.phase) == (22, "block.2", BACKWARD)
    assert {name: size for name, size in found.categories.items() if size} == {
        FROZEN: 10,
        ACTIVATIONS: 5,
        TEMPORARIES: 7,
    }
    assert [sum(sizes.values()) for _, sizes in found.timeline] == [10, 15, 22, 11]


def test_what_dies_before_the_way_back_is_a_temporary() -> None:
    assert timeline((5, 0, 1, "")).footprint(0).categories[TEMPORARIES] == 5


def test_sizes_are_rounded_as_an_allocator_does() -> None:
    assert timeline((10, 0, None, FROZEN), (513, 0, None, FROZEN)).footprint(0, block_bytes=512).peak == 512 + 1024


def test_only_what_is_alive_in_the_steps_own_time_counts() -> None:
    found = timeline((100, 0, 1, FROZEN), (10, 0, None, FROZEN), operations=6).footprint(2)
    assert (found.peak, len(found.timeline)) == (10, 4)


def test_equal_allocations_of_several_blocks_form_one_group() -> None:
    made = timeline((10, 0, None, FROZEN), (10, 0, None, FROZEN))
    made.allocations[1].path = "x.1"
    (group,) = made.footprint(0).largest
    assert (group.path, group.count, group.bytes) == ("x.*", 2, 20)
