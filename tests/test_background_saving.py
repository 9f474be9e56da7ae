"""Checkpoints are written while the next steps are taken: nothing of training changes, and nothing is lost."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from process_runs import Runs
from safetensors.torch import load_file
from test_resume import content
from tiny_runs import DROPOUT, PlanOf, Run

from graftwork.checkpoint import manifest, store, writing
from graftwork.checkpoint.store import checkpoints, open_checkpoint
from graftwork.contracts import DictLookup, Event, StepTaken
from graftwork.errors import CheckpointError
from graftwork.train.log import FILE as LOG
from graftwork.train.loop import train

LARGEST = 20_000
"""Bytes: more than a log has, and fewer than a checkpoint's tensors."""


def test_a_run_that_saves_every_step_is_to_the_last_bit_one_that_never_does(
    run: PlanOf, lookup: DictLookup, tmp_path: Path
) -> None:
    threads = set[int]()

    def listen(event: Event) -> None:
        threads.add(threading.get_ident())

    for name, every in (("saving", {"train.save_every": 1, "train.keep": 2}), ("other", {})):
        plan = run({"peft": DROPOUT, "train.steps": 8} | every)
        train(plan, lookup, tmp_path / name, device="cpu", listen=listen)
    assert threads == {threading.get_ident()}
    (lines, tensors), (expected, wanted) = content(tmp_path / "saving"), content(tmp_path / "other")
    assert lines == expected
    assert [name for name in wanted if not tensors[name].equal(wanted[name])] == []


def test_what_is_captured_stays_as_it_was_while_the_model_goes_on(
    trained: Run, lookup: DictLookup, tmp_path: Path
) -> None:
    assembly, folder = trained.outcome.assembly, tmp_path / "one"
    assert assembly is not None
    golden = load_file(trained.checkpoint / store.GOLDEN_INPUTS)
    losses = [(1, 2.0)]
    facts: dict[str, Any] = {"step": 4, "steps": 4, "health": trained.outcome.verdict}
    captured = store.capture(assembly, golden=golden, data={"validation_losses": losses}, **facts)
    assert captured
    files = store.rebuild(captured, folder, lookup)
    kept = {name: parameter.detach().clone() for name, parameter in assembly.trained().items()}
    losses.append((2, 1.0))
    golden["logits"] = golden["logits"] + 1
    with torch.no_grad():
        for parameter in assembly.trained().values():
            parameter.add_(1.0)
        store.write(captured, folder, files)
        for name, parameter in assembly.trained().items():
            parameter.copy_(kept[name])
    assert open_checkpoint(folder, lookup, device="cpu").verification.error == 0.0
    assert manifest.read(folder).data == {"validation_losses": [[1, 2.0]]}


def limiting(event: Event) -> None:
    """Let no file of this process grow larger once two steps are taken."""
    if isinstance(event, StepTaken) and event.step == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_save_that_fails_is_the_error_of_the_run_and_earlier_ones_stay(
    run: PlanOf, lookup: DictLookup, tmp_path: Path
) -> None:
    before, out = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "out"
    plan = run({"train.save_every": 1, "train.steps": 40, "train.keep": 9})
    try:
        with pytest.raises(CheckpointError) as caught:
            train(plan, lookup, out, device="cpu", listen=limiting)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    failed = len(checkpoints(out)) + 1
    assert failed <= 3  # The first may not have been written yet.
    assert caught.value.sentence.startswith(f"'{out / f'checkpoint-{failed}'}' could not be saved: ")
    assert {path.name for path in out.iterdir()} - {each.name for each in checkpoints(out)} == {LOG}
    for folder in checkpoints(out):
        assert open_checkpoint(folder, lookup, device="cpu").verification.error == 0.0


def test_an_old_checkpoint_that_cannot_be_removed_stays_and_that_is_told_once(
    run: PlanOf, lookup: DictLookup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told, remove = tmp_path / "out", list[str](), writing.remove

    def kept(folder: Path) -> None:
        if folder.name == "checkpoint-1":
            raise PermissionError(13, "Permission denied")
        remove(folder)

    monkeypatch.setattr(writing, "remove", kept)
    plan = run({"train.save_every": 1, "train.steps": 5, "train.keep": 1})
    train(plan, lookup, out, device="cpu", listen=lambda event: told.extend(getattr(event, "sentence", "").split("\n")))
    assert [each.name for each in checkpoints(out)] == ["checkpoint-1", "checkpoint-5"]
    assert [each for each in told if each] == [
        f"'{out / 'checkpoint-1'}', an old checkpoint, cannot be removed (Permission denied); remove it yourself"
    ]


LIMITS = """
import test_background_saving
from graftwork import hookimpl

@hookimpl
def happened(event):
    test_background_saving.limiting(event)
"""


@pytest.mark.slow
def test_a_save_that_fails_ends_all_processes_with_its_one_message(base: Path, tmp_path: Path) -> None:
    runs = Runs(tmp_path, base)
    (tmp_path / "limits.py").write_text(LIMITS, encoding="utf-8")
    sets = ["--set", 'memory.use=["ddp"]', "--set", "train.save_every=1", "--set", "train.steps=40"]
    options = ["train", "run.toml", "--out", "out", "--device", "cpu", "--processes", "2"]
    launched = runs.start("--plugin", str(tmp_path / "limits.py"), *options, *sets)
    said, errors = launched.output()
    assert launched.process.returncode == 1, said + errors
    failed = len(checkpoints(tmp_path / "out")) + 1
    assert errors.startswith(f"Error: 'out/checkpoint-{failed}' could not be saved: "), errors
    assert errors.count("could not be saved") == 1
