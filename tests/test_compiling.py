"""`train.compile`: blocks are compiled whole, once for all of them and all lengths, compute the same, and are as they were elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import COMPONENTS, DROPOUT, LORA, PlanOf
from vlm_families import write
from vlm_trial import LOOKUP as VLM_LOOKUP
from vlm_trial import lora_plan

from graftwork.build import compose
from graftwork.config.machine import Machine
from graftwork.contracts import Assembly, DictLookup, Lookup, NoSettings, Plan, batch_of, stepper_for
from graftwork.contracts.events import Event, RunStarted, RunWarned
from graftwork.evaluate.generation import answer
from graftwork.memory.budget import search_candidates
from graftwork.train import compiling
from graftwork.train.compiling import compile_blocks, undo
from graftwork.train.loop import Outcome, train
from graftwork_checkpointing import Checkpointing
from graftwork_fsdp import Fsdp
from graftwork_zero import Zero

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
LOOKUP = DictLookup(*COMPONENTS)
CHECKPOINTED = {"memory.use": ["checkpointing"]}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """What is compiled in one test is not in another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def blocks_of(assembly: Assembly) -> list[torch.nn.Module]:
    """The repeated blocks of its language model."""
    return [assembly.model.get_submodule(name) for name in assembly.structure.blocks["language"]]


def losses(assembly: Assembly, lookup: Lookup) -> list[float]:
    """The losses of micro-batches of four lengths, and the norm of their gradients."""
    records = lookup.find("data_source", "shapes").component
    examples = [assembly.processor.encode(record) for record in records(records.Settings(6, long=(1, 4))).records()]
    stepper = stepper_for(assembly, assembly.plan.run_context.train)
    assembly.model.train()
    torch.manual_seed(3)
    cut = [examples[:2], examples[2:4], examples[1:5], examples[2:3]]
    found = [stepper.accumulate(batch_of(assembly.processor, each), 10.0) for each in cut]
    return [*map(float, found), float(stepper.gradient_norm())]


def tried(plan: Plan, lookup: Lookup, backend: Any) -> tuple[list[float], list[float], dict[str, int]]:
    """The losses without and with compiled blocks, and dynamo's statistics; nothing may break."""
    found = []
    for compiled in (False, True):
        assembly = compose.build(plan, lookup, device="cpu")
        names = {*assembly.model.state_dict()}
        losses(assembly, lookup)  # kernels are chosen
        if compiled:
            compile_blocks(blocks_of(assembly), backend)
            assert {*assembly.model.state_dict()} == names
        torch._dynamo.utils.counters.clear()
        found.append(losses(assembly, lookup))
    counted = torch._dynamo.utils.counters
    assert not counted["graph_break"]
    return found[0], found[1], dict(counted["stats"])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"peft": DROPOUT}, id="dropout"),
        pytest.param({"peft": LORA, "train.precision": "bf16", "memory": {"use": ["checkpointing"]}}, id="bf16"),
    ],
)
def test_blocks_share_a_graph_for_all_lengths(run: PlanOf, changes: dict[str, Any]) -> None:
    plain, compiled, counted = tried(run(changes, LOOKUP), LOOKUP, "eager")
    assert plain == compiled
    assert (
        counted["unique_graphs"] <= 4
    )  # a single record, and a first block whose input needs no gradient, have their own


def test_a_vlm_of_transformers_is_compiled_whole(tmp_path: Path) -> None:
    plain, compiled, counted = tried(lora_plan(write("llava", tmp_path / "model")), VLM_LOOKUP, "eager")
    assert plain == compiled
    assert (
        counted["unique_graphs"] <= 4
    )  # a single record, and a first block whose input needs no gradient, have their own


@pytest.mark.slow
@pytest.mark.parametrize("memory", [[], ["checkpointing"]])
def test_inductor_computes_the_same(run: PlanOf, memory: list[str]) -> None:
    plan = run({"peft": LORA, "memory": {"use": memory}}, LOOKUP)
    plain, compiled, _ = tried(plan, LOOKUP, "inductor")
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)


def ran(plan: Plan, out: Path) -> tuple[Outcome, list[str]]:
    """A run, and what it says of compilation when it starts."""
    messages = list[str]()

    def listen(event: Event) -> None:
        if isinstance(event, RunStarted):
            messages.extend(each for each in event.notes if each.startswith("train.compile: "))

    return train(plan, LOOKUP, out, listen=listen, device="cpu"), messages


def test_a_run_trains_compiled_and_measures_and_answers_uncompiled(
    run: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def called(*args: Any) -> Any:
            calls.append(torch.is_grad_enabled())
            return graph(*args)

        return called

    monkeypatch.setattr(compiling, "BACKEND", counting)
    changes = {"peft": DROPOUT, "train.steps": 2}
    plain, nothing = ran(run(changes, LOOKUP), tmp_path / "plain")
    compiled, (said,) = ran(run({**changes, "train.compile": True}, LOOKUP), tmp_path / "compiled")
    assert not nothing and said.startswith("train.compile: 4 blocks of the language model are compiled for training,")
    assert [line["loss"] for line in compiled.log] == [line["loss"] for line in plain.log]
    assert calls and all(calls)
    before = len(calls)
    records = LOOKUP.find("data_source", "shapes").component
    (one,) = records(records.Settings(1)).records()
    answer(compiled.assembly, [compiled.assembly.processor.encode(one.without_answer())], max_new_tokens=2)
    assert len(calls) == before


def broken(graph: Any, inputs: Any) -> Any:
    raise OSError("no compiler is installed\nand more")


def test_where_no_compiler_works_the_run_says_so_and_goes_on(
    run: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", broken)
    changes = {"peft": DROPOUT, "train.steps": 1}
    plain, _ = ran(run(changes, LOOKUP), tmp_path / "plain")
    found, (said,) = ran(run({**changes, "train.compile": True}, LOOKUP), tmp_path / "out")
    assert said == "train.compile: nothing is compiled, as the compiler failed (OSError: no compiler is installed)"
    assert found.log[0]["loss"] == plain.log[0]["loss"]
    assert not any(hasattr(block, "uncompiled_forward") for block in blocks_of(found.assembly))


def test_where_a_compiler_fails_later_the_run_says_so_once_and_goes_on(
    run: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, said = list[torch.fx.GraphModule](), list[str]()

    def working(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        if said:
            raise OSError("No space left on device")
        graphs.append(graph)
        return graph

    def listen(event: Event) -> None:
        if isinstance(event, RunStarted):
            said.extend(each for each in event.notes if each.startswith("train.compile: "))
            torch._dynamo.reset()  # as shapes that it has not seen do
        elif isinstance(event, RunWarned):
            said.append(event.sentence)

    monkeypatch.setattr(compiling, "BACKEND", working)
    changes = {"peft": DROPOUT, "train.steps": 2}
    plain, _ = ran(run(changes, LOOKUP), tmp_path / "plain")
    plan = run({**changes, "train.compile": True}, LOOKUP)
    found = train(plan, LOOKUP, tmp_path / "out", listen=listen, device="cpu")
    assert graphs and [line["loss"] for line in found.log] == [line["loss"] for line in plain.log]
    assert said[1:] == [
        "train.compile: the compiler failed (OSError: No space left on device); blocks that it fails for go on uncompiled"
    ]
    assert not any(hasattr(block, "uncompiled_forward") for block in blocks_of(found.assembly))


def test_blocks_that_break_the_graph_are_left_as_they_are(
    run: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reading(Checkpointing):
        """Reads a number within each block"""

        name = "reading"

        def prepare(self, assembly: Assembly) -> None:
            for block in blocks_of(assembly):
                block.register_forward_pre_hook(lambda *_: None)
                forward = block.forward
                block.forward = lambda hidden, *a, _f=forward, **k: _f(hidden * float(hidden.sum() > 0), *a, **k)

    monkeypatch.setattr(compiling, "BACKEND", "eager")
    lookup = DictLookup(*COMPONENTS, Reading)
    messages = list[str]()
    plan = run({"train.steps": 1, "train.compile": True, "memory": {"use": ["reading"]}}, lookup)
    train(plan, lookup, tmp_path / "out", listen=lambda e: messages.extend(getattr(e, "notes", ())), device="cpu")
    assert any("nothing is compiled, as a block cannot be compiled whole (" in each for each in messages)


def test_undone_blocks_are_the_same_as_before(run: PlanOf) -> None:
    assembly = compose.build(run({"memory": {"use": ["checkpointing"]}}, LOOKUP), LOOKUP, device="cpu")
    before = [block.forward for block in blocks_of(assembly)]
    compile_blocks(blocks_of(assembly), "eager")
    undo(blocks_of(assembly))
    assert [block.forward for block in blocks_of(assembly)] == before


@pytest.mark.parametrize("strategy", [Zero, Fsdp])
def test_engines_that_act_within_blocks_refuse_it(run: PlanOf, strategy: Any) -> None:
    plan = run({"train.compile": True})
    why = [*strategy((strategy.Settings or NoSettings)()).validate(plan)]
    assert any("leave train.compile out" in each for each in why)
    assert not [*strategy(strategy.Settings()).validate(run({}))]


def test_a_rehearsal_says_that_it_is_of_uncompiled_blocks(run: PlanOf) -> None:
    said = [
        search_candidates(run({"train.compile": compiled}), LOOKUP, Machine(), device="cpu", budget=None).why
        for compiled in (False, True)
    ]
    assert said[1].removeprefix(said[0]) == "; of blocks that are not compiled, as train.compile is not rehearsed"
