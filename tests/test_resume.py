"""Resuming: a run that was interrupted ends, to the last bit, as if it never was."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import (
    CHANGES,
    CONFIGS,
    DROPOUT,
    LORA,
    NEVER_READ,
    STEPS,
    Interrupted,
    PlanOf,
    Run,
    interrupt_at,
    plan_of,
)

from graftwork.checkpoint import manifest
from graftwork.checkpoint.store import GOLDEN_INPUTS, OPTIMIZER, TENSORS, checkpoints, open_checkpoint
from graftwork.checkpoint.writing import UNFINISHED
from graftwork.contracts import CheckpointSaved, DictLookup, Plan, RunEnded, RunStarted, StepTaken
from graftwork.errors import CheckpointError
from graftwork.train.log import FILE as LOG
from graftwork.train.log import Log
from graftwork.train.loop import Outcome, train

STATE = f"{OPTIMIZER}/state.safetensors"


def content(out: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """All that a run ended with but for its times: log, and every tensor of its last checkpoint."""
    lines = [json.loads(line) for line in (out / LOG).read_text(encoding="utf-8").splitlines()]
    last = checkpoints(out)[-1]
    tensors = {
        f"{file} {name}": tensor
        for file in (TENSORS, GOLDEN_INPUTS, STATE)
        for name, tensor in load_file(last / file).items()
    }
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines], tensors


def assert_equal(out: Path, other: Path) -> None:
    """That two runs ended the same, to the last bit."""
    (lines, tensors), (expected, wanted) = content(out), content(other)
    assert lines == expected
    assert tensors.keys() == wanted.keys()
    assert [name for name in wanted if not tensors[name].equal(wanted[name])] == []


def interrupted(plan: Plan, lookup: DictLookup, out: Path, step: int, kind: Any = StepTaken) -> None:
    with pytest.raises(Interrupted):
        train(plan, lookup, out, device="cpu", listen=interrupt_at(kind, step))


def resumed(plan: Plan, lookup: DictLookup, out: Path) -> Outcome:
    return train(plan, lookup, out, resume=True, device="cpu")


def refusal(call: Callable[..., Any], *args: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        call(*args)
    return caught.value


@pytest.mark.parametrize(("kind", "step"), [(StepTaken, 3), (CheckpointSaved, 4), (RunEnded, 6)])
def test_a_resumed_run_ends_as_one_that_was_never_interrupted(
    whole: Run, lookup: DictLookup, tmp_path: Path, kind: Any, step: int
) -> None:
    out = tmp_path / "out"
    interrupted(whole.plan, lookup, out, step, kind)
    outcome = resumed(whole.plan, lookup, out)
    assert_equal(out, whole.out)
    assert outcome.verdict == whole.outcome.verdict
    assert [line["loss"] for line in outcome.log] == [line["loss"] for line in whole.outcome.log]
    assert outcome.checkpoint == out / f"checkpoint-{STEPS}"


def test_a_run_can_be_interrupted_again_and_again(whole: Run, lookup: DictLookup, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for step in (3, 4, 5, 6):
        with pytest.raises(Interrupted):
            train(whole.plan, lookup, out, resume=True, device="cpu", listen=interrupt_at(StepTaken, step))
    resumed(whole.plan, lookup, out)
    assert_equal(out, whole.out)


def test_the_caller_is_told_where_a_resumed_run_goes_on(whole: Run, lookup: DictLookup, tmp_path: Path) -> None:
    interrupted(whole.plan, lookup, tmp_path / "out", 5)
    told: list[Any] = []
    train(whole.plan, lookup, tmp_path / "out", resume=True, device="cpu", listen=told.append)
    assert isinstance(told[0], RunStarted)
    assert (told[0].step, told[0].steps) == (4, STEPS)
    assert [event.step for event in told if isinstance(event, StepTaken)] == [5, 6]


@pytest.mark.parametrize(
    "changes",
    [
        {"peft": LORA | {"init": "pissa"}},
        {"peft": LORA | {"plus_ratio": 4.0, "also_train": ["connector"]}, "train.schedule": "linear"},
        {
            "peft": {"use": "full", "on": ["language.mlp", "vision"]},
            "train.micro_batch_size": 3,
            "train.allow_unreached": NEVER_READ,
        },
        {"peft": {"use": "ia3", "on": ["language"]}, "train.weight_decay": 0.1, "memory": {"use": ["checkpointing"]}},
        {"train.precision": "bf16", "train.group_by_length": False},
        {"train.precision": "fp16", "train.force_precision": True},
        {"data.source": [{"use": "shapes", "broken": [0, 3, 4, 9, 12, 15, 18, 21], "bad": 1}]},
    ],
    ids=["pissa", "lora-plus and connector", "full with towers", "ia3 and checkpointing", "bf16", "fp16", "bad data"],
)
def test_every_kind_of_run_can_be_resumed(
    run: PlanOf, lookup: DictLookup, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plan = run({"train.save_every": 2, "train.epochs": 9.0} | changes)
    ended = train(plan, lookup, tmp_path / "whole", device="cpu")
    interrupted(plan, lookup, tmp_path / "out", 3)
    outcome = resumed(plan, lookup, tmp_path / "out")
    assert_equal(tmp_path / "out", tmp_path / "whole")
    assert outcome.data == ended.data


def test_a_towers_stochastic_depth_goes_on_where_it_was(base: Path, lookup: DictLookup, tmp_path: Path) -> None:
    high = tmp_path / "high"
    high.mkdir()
    config = json.loads((CONFIGS / "high" / "config.json").read_text(encoding="utf-8"))
    (high / "config.json").write_text(json.dumps(config | {"drop_path_rate": 0.5}), encoding="utf-8")
    changes = {
        "model.parts.high": {"use": "openclip-convnext", "config": str(high)},
        "peft": {"use": "full", "on": ["vision.high"]},
        "train.save_every": 1,
    }
    plan = plan_of(base, tmp_path, changes)
    train(plan, lookup, tmp_path / "whole", device="cpu")
    interrupted(plan, lookup, tmp_path / "out", 3)
    resumed(plan, lookup, tmp_path / "out")
    assert_equal(tmp_path / "out", tmp_path / "whole")


def test_a_run_that_ended_is_not_trained_further(whole: Run, lookup: DictLookup, tmp_path: Path) -> None:
    outcome = resumed(whole.plan, lookup, whole.out)
    assert outcome.checkpoint == whole.checkpoint
    assert outcome.verdict == whole.outcome.verdict
    assert len(outcome.log) == STEPS


def test_resuming_what_has_no_checkpoint_starts_anew(whole: Run, lookup: DictLookup, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(whole.plan, lookup, out, 2)
    assert len((out / LOG).read_text().splitlines()) == 1
    assert not checkpoints(out)
    resumed(whole.plan, lookup, out)
    assert_equal(out, whole.out)


def test_a_run_that_died_before_its_first_checkpoint_starts_anew_without_its_log(
    whole: Run, lookup: DictLookup, tmp_path: Path
) -> None:
    interrupted(whole.plan, lookup, tmp_path / "out", 2)
    train(whole.plan, lookup, tmp_path / "out", device="cpu")
    assert_equal(tmp_path / "out", whole.out)


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        (
            {"train.learning_rate": 1.0, "seed": 6},
            [
                "run_context.seed: 5 in the checkpoint, 6 now",
                "run_context.train.learning_rate: 0.01 in the checkpoint, 1.0 now",
            ],
        ),
        ({"peft": DROPOUT | {"rank": 8}}, ["model_spec.peft.settings.rank: 4 in the checkpoint, 8 now"]),
        ({"train.steps": 7}, ["run_context.train.steps: 6 in the checkpoint, 7 now"]),
    ],
)
def test_another_plan_is_refused_with_what_differs(
    whole: Run, base: Path, lookup: DictLookup, tmp_path: Path, changes: dict[str, Any], differing: list[str]
) -> None:
    error = refusal(resumed, plan_of(base, tmp_path, CHANGES | changes), lookup, whole.out)
    assert error.sentence == (
        f"'{whole.out / 'checkpoint-6'}' was trained with another plan, so it cannot be resumed; change it back, or name "
        "another folder with --out"
    )
    assert error.details == tuple(differing)


def test_other_sources_are_other_data(whole: Run, base: Path, lookup: DictLookup, tmp_path: Path) -> None:
    fewer = plan_of(base, tmp_path, CHANGES | {"data.source": [{"use": "shapes", "count": 23}]})
    assert "other data than is read now: 24 records then, 23 now" in refusal(resumed, fewer, lookup, whole.out).sentence


def test_where_things_are_and_which_kernel_computes_may_change(
    base: Path, lookup: DictLookup, tmp_path: Path, whole: Run
) -> None:
    out = tmp_path / "out"
    shutil.copytree(base, tmp_path / "here")
    interrupted(plan_of(tmp_path / "here", tmp_path, CHANGES), lookup, out, 3)
    shutil.move(tmp_path / "here", tmp_path / "there")
    resumed(plan_of(tmp_path / "there", tmp_path, CHANGES | {"evaluate": {"on": ["easy-vqa"]}}), lookup, out)
    assert_equal(out, whole.out)
    interrupted(whole.plan, lookup, tmp_path / "other", 3)
    eager = resumed(plan_of(base, tmp_path, CHANGES | {"attention.prefer": ["eager"]}), lookup, tmp_path / "other")
    assert manifest.read(eager.checkpoint).attention["language"]["ran"].keys() == {"eager"}


def test_another_base_is_refused_even_where_the_old_one_still_is(
    base: Path, lookup: DictLookup, tmp_path: Path, whole: Run
) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(base / "model.safetensors")
    (other / "model.safetensors").unlink()
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, other / "model.safetensors")
    error = refusal(resumed, plan_of(other, tmp_path, CHANGES), lookup, whole.out)
    assert "was trained with another plan" in error.sentence
    (line,) = error.details
    assert line.startswith("model_spec.model.weights: ")


def test_a_checkpoint_without_optimizer_or_with_a_damaged_one_is_refused(
    whole: Run, lookup: DictLookup, tmp_path: Path
) -> None:
    interrupted(whole.plan, lookup, tmp_path / "out", 3)
    state = tmp_path / "out" / "checkpoint-2" / STATE
    damaged = bytearray(state.read_bytes())
    damaged[-1] ^= 1
    state.write_bytes(damaged)
    assert "was changed after it was written" in str(refusal(resumed, whole.plan, lookup, tmp_path / "out"))
    state.unlink()
    assert f"lacks '{STATE}'" in str(refusal(resumed, whole.plan, lookup, tmp_path / "out"))
    folder = tmp_path / "out" / "checkpoint-2"
    read = manifest.read(folder)
    del read.files[STATE]
    manifest.write(read, folder)
    assert "holds no optimizer state to resume from" in str(refusal(resumed, whole.plan, lookup, tmp_path / "out"))


def test_what_a_killed_run_left_unfinished_is_swept_and_nothing_else(
    whole: Run, lookup: DictLookup, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted(whole.plan, lookup, out, 3)
    (out / f"{UNFINISHED}abc").mkdir()
    (out / f"{UNFINISHED}abc" / TENSORS).write_bytes(b"half")
    (out / "notes.txt").write_text("mine")
    resumed(whole.plan, lookup, out)
    left = sorted(path.name for path in out.iterdir())
    assert left == ["checkpoint-2", "checkpoint-4", "checkpoint-6", LOG, "notes.txt"]


def test_a_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / LOG
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in ((1, 2.0), (2, float("nan")), (3, 1.0))]
    file.write_text("\n".join(lines) + '\n{"step": 4, "lo')
    log = Log(tmp_path)
    log.keep(2)
    assert [line["step"] for line in log.lines] == [1, 2]
    assert file.read_text() == "\n".join(lines[:2]) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == [LOG]
    file.unlink()
    nothing = Log(tmp_path)
    nothing.keep(2)
    assert nothing.lines == []


# Killed for real ------------------------------------------------------------------------------------------------------


def killed(plan: Plan, folder: Path, what: str, number: int) -> None:
    """Train a plan into `out`, or go on with it, in a process that is killed at a step, or at a touch of a file."""
    (folder / "plan.json").write_text(json.dumps(plan.to_json()), encoding="utf-8")
    program = Path(__file__).with_name("tiny_runs.py")
    command = [sys.executable, program, folder / "plan.json", folder / "out", what, str(number)]
    done = subprocess.run(command, stderr=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_a_run_that_is_killed_goes_on_as_if_nothing_had_been(whole: Run, lookup: DictLookup, tmp_path: Path) -> None:
    killed(whole.plan, tmp_path, "step", 5)
    assert checkpoints(tmp_path / "out")[-1].name == "checkpoint-4"
    resumed(whole.plan, lookup, tmp_path / "out")
    assert_equal(tmp_path / "out", whole.out)


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_at_random_keeps_every_checkpoint_whole(
    base: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    plan = plan_of(base, tmp_path, {"peft": DROPOUT, "train.steps": 400, "train.save_every": 1, "train.keep": 3})
    out = tmp_path / "out"
    chance = random.Random(os.environ.get("GRAFTWORK_TEST_SEED", "1"))
    opened = 0
    for _ in range(10):
        killed(plan, tmp_path, "touch", chance.randrange(150, 400))
        for folder in checkpoints(out):
            assert open_checkpoint(folder, lookup, device="cpu").verification.error == 0.0
            opened += 1
    assert opened >= 10
