"""Runs on several processes: the same losses, whole checkpoints, and one message when a process dies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from process_runs import Runs, farthest

from graftwork.checkpoint import learning, manifest
from graftwork.checkpoint.store import checkpoints, open_checkpoint
from graftwork.evaluate.evaluation import evaluate
from graftwork.evaluate.scores import ADAPTER, BASE
from graftwork.jobs.evaluate import hashes_of

ZERO = 'memory.use=["zero"]'
OFFLOAD = ["memory.zero.offload_optimizer=true"]
PARAMETERS = ["memory.zero.offload_parameters=true"]
ENGINES = {
    "fsdp": ['memory.use=["fsdp"]'],
    "fsdp and checkpointing": ['memory.use=["checkpointing", "fsdp"]'],
    "zero 1": [ZERO, "memory.zero.stage=1"],
    "zero 2": [ZERO, "memory.zero.stage=2"],
    "zero 3": [ZERO, "memory.zero.stage=3"],
    "zero 2 with offload": [ZERO, "memory.zero.stage=2", *OFFLOAD],
    "zero 3 with offload": [ZERO, "memory.zero.stage=3", *OFFLOAD, *PARAMETERS],
}
RESUMED_ON = dict(zip(ENGINES, (3, 1, 1, 3, 3, 3, 1), strict=True))
"""How many processes go on with a run of two."""


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A folder with a run file, and in `one` its run on a single process."""
    made = Runs(tmp_path_factory.mktemp("runs"), base)
    made.train_here("one")
    return made


def needs_deepspeed(engine: str) -> None:
    """Skip what DeepSpeed does where it is not installed."""
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")


def check_training(runs: Runs, name: str, changes: Sequence[str]) -> None:
    """Train on two processes, and compare with one."""
    said = runs.train(name, 2, changes)
    assert said.count("healthy: ") == 1 and said.count("reopens as saved: ") == 1
    assert farthest(runs.log("one"), runs.log(name)) < 1e-4
    assert farthest(runs.log("one"), runs.log(name), "gradient_norm") < 1e-4
    there, alone = (checkpoints(runs.folder / out)[-1] for out in (name, "one"))
    read = manifest.read(there)
    assert read.tensors == manifest.read(alone).tensors and read.counts == manifest.read(alone).counts
    assert read.data == manifest.read(alone).data and read.data["bad_in_all"] == 1
    maps = [learning.read(folder) for folder in (there, alone)]
    (found, expected) = ({m.name: m for m in each.modules} for each in maps if each)
    assert found.keys() == expected.keys() and {module.status for module in found.values()} == {"learned"}
    for module in found.values():
        assert module.first == pytest.approx(expected[module.name].first, rel=1e-2)
        assert module.moved == pytest.approx(expected[module.name].moved, rel=0.05)
    opened = open_checkpoint(there, runs.catalog, device="cpu")
    wanted = open_checkpoint(alone, runs.catalog, device="cpu").assembly.trained()
    for tensor, parameter in opened.assembly.trained().items():
        # On average: where a gradient is nothing but rounding, AdamW makes a whole step of it.
        assert float((parameter - wanted[tensor]).detach().abs().mean()) < 1e-4


def check_answers(runs: Runs, out: Path, checkpoint: Path, per_group: int, asked: int) -> None:
    """Compare what two processes wrote into `out` with what one answers, and go on with it in one."""
    opened = open_checkpoint(checkpoint, runs.catalog, device="cpu")
    component = runs.catalog.find("evaluator", "easy-vqa").component
    questions = component(component.Settings(per_group=per_group))
    options: dict[str, Any] = {"variants": (BASE, ADAPTER), "hashes": hashes_of(opened)}
    alone = evaluate(opened.assembly, questions, out=out / "alone", limit=asked, **options)
    assert alone.to_json()["rows"] == json.loads((out / "scores.json").read_text())["rows"]
    assert answers(out) == {one.record.id: one.answers for one in alone.answered}
    said: list[str] = []
    evaluate(opened.assembly, questions, out=out, limit=asked + 3, say=said.append, **options)
    assert said == [f"'{out / 'answers.jsonl'}' holds {asked} answers already; they are not asked for again"]
    assert len(answers(out)) == min(asked + 3, 3 * per_group)


def answers(out: Path) -> dict[str, Any]:
    """The answers in a folder by question, of which none is there twice."""
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    found = {line["id"]: line["answers"] for line in lines if "id" in line}
    assert len(found) == sum("id" in line for line in lines)
    return found


def check_kill(runs: Runs, name: str, changes: Sequence[str], rank: int) -> None:
    """Kill a process of a long run after its first checkpoint."""
    out = f"killed {name}"
    launched = runs.start_training(out, 2, [*changes, "train.steps=4000", "train.save_every=3"])
    while not checkpoints(runs.folder / out):
        assert launched.process.poll() is None, launched.output()
    assert launched.kill(rank) < 10
    _, errors = launched.output()
    assert errors == (
        f"Error: process {rank} of 2 was ended by SIGKILL (the system does that when main memory runs out), so the others were "
        "ended too; what was saved before is intact: give the same command again, with --resume if it trains\n"
    )
    assert launched.process.returncode == 1
    assert open_checkpoint(runs.folder / out, runs.catalog, device="cpu").verification.distance > 0.0


def test_ddp_on_two_processes_is_the_run_of_one_and_goes_on_in_one(runs: Runs) -> None:
    check_training(runs, "ddp", ['memory.use=["ddp"]', 'evaluate.on=["easy-vqa"]', "evaluate.easy-vqa.per_group=3"])
    check_answers(runs, runs.folder / "ddp" / "evaluation" / "easy-vqa", checkpoints(runs.folder / "ddp")[-1], 3, 9)
    resumed = runs.resume_here(runs.rewind("ddp", "ddp alone"))
    assert farthest(runs.log("one"), resumed.log) < 1e-4


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_three(runs: Runs) -> None:
    runs.train("ddp one", 1, ['memory.use=["ddp"]'])
    runs.rewind("ddp one", "ddp three")
    runs.train("ddp three", 3, ['memory.use=["ddp"]'], "--resume")
    assert farthest(runs.log("one"), runs.log("ddp three")) < 1e-4


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_one_message_and_whole_checkpoints(runs: Runs) -> None:
    check_kill(runs, "ddp", ['memory.use=["ddp"]'], rank=1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_train_on_two_processes_as_on_one_and_resume_on_another_number(runs: Runs, engine: str) -> None:
    needs_deepspeed(engine)
    check_training(runs, engine, ENGINES[engine])
    runs.rewind(engine, f"{engine} resumed")
    runs.train(f"{engine} resumed", RESUMED_ON[engine], ENGINES[engine], "--resume")
    assert farthest(runs.log("one"), runs.log(f"{engine} resumed")) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero 1", "zero 2", "zero 3", "zero 3 with offload"])
def test_a_killed_process_ends_every_engine(runs: Runs, engine: str) -> None:
    needs_deepspeed(engine)
    check_kill(runs, engine, ENGINES[engine], rank=0)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero 3"])
def test_engines_train_whole_layers_beside_frozen_ones_in_bf16(runs: Runs, engine: str) -> None:
    needs_deepspeed(engine)
    changes = ['peft={use="full", on=["language.attention", "language.mlp"]}', 'train.precision="bf16"']
    runs.train(f"{engine} full one", 1, changes)
    runs.train(f"{engine} full two", 2, [*changes, *ENGINES[engine]])
    assert farthest(runs.log(f"{engine} full one"), runs.log(f"{engine} full two")) < 0.05


@pytest.mark.slow
def test_an_external_launcher_is_joined(runs: Runs) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    launched = runs.start(
        *("train", "run.toml", "--out", "torchrun", "--set", 'memory.use=["ddp"]', "--set", "train.steps=2"),
        launcher=torchrun,
    )
    said, errors = launched.output()
    assert launched.process.returncode == 0, errors
    assert said.count("reopens as saved: ") == 1
    assert farthest(runs.log("one")[:2], runs.log("torchrun")) < 0.5  # the schedule is that of two steps


@pytest.mark.slow
def test_gradients_that_nobody_brings_together_are_refused_once(runs: Runs) -> None:
    launched = runs.start_training("apart", 2, [])
    _, errors = launched.output()
    assert launched.process.returncode == 1
    assert errors == (
        "Error: 2 processes run this plan, and none of its memory strategies brings their gradients together; add one that "
        "does to memory.use (graftwork list memory)\n"
    )


@pytest.mark.slow
def test_processes_share_the_questions_of_an_evaluation(runs: Runs) -> None:
    options = ("compare", "one", "--on", "easy-vqa", "--set", "per_group=7", "--out", "asked", "--batch-size", "4")
    launched = runs.start(*options, "--limit", "9", "--processes", "2", "--device", "cpu", "--json")
    said, errors = launched.output()
    assert launched.process.returncode == 0, errors
    (comparison,) = json.loads(said)
    assert comparison["questions"] == 9
    check_answers(runs, runs.folder / "asked", checkpoints(runs.folder / "one")[-1], 7, 9)
