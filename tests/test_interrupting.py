"""SIGTERM and SIGINT end a run after the step that it is in: saved, with the way on, and nothing lost."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from process_runs import Runs
from test_resume import assert_equal
from tiny_runs import STEPS, Run

from graftwork.checkpoint import manifest
from graftwork.checkpoint.store import checkpoints
from graftwork.cli import main
from graftwork.contracts import CheckpointSaved, DictLookup, Event, RunEnded, RunStarted, RunStopped, StepTaken
from graftwork.errors import RunInterrupted
from graftwork.train.interrupting import Signals
from graftwork.train.log import FILE as LOG
from graftwork.train.loop import Outcome, train


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Python's own handlers, which test runners may have replaced; whatever a test does, they are the same afterwards."""
    own = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    found = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert found == own


def signal_at(kind: type[Event], step: int, *numbers: int, told: list[Event] | None = None) -> Callable[[Event], None]:
    """A listener at which signals come, at an event of a step."""

    def listen(event: Event) -> None:
        if told is not None:
            told.append(event)
        if isinstance(event, kind) and getattr(event, "step", None) == step:
            for number in numbers:
                signal.raise_signal(number)

    return listen


def interrupted(whole: Run, lookup: DictLookup, out: Path, listen: Callable[[Event], None]) -> RunInterrupted:
    with pytest.raises(RunInterrupted) as caught:
        train(whole.plan, lookup, out, resume=True, device="cpu", listen=listen)
    return caught.value


def resumed(whole: Run, lookup: DictLookup, out: Path) -> Outcome:
    return train(whole.plan, lookup, out, resume=True, device="cpu")


def test_a_signal_ends_a_run_after_its_step_and_it_goes_on_as_if_nothing_had_been(
    whole: Run, lookup: DictLookup, tmp_path: Path
) -> None:
    number = signal.SIGINT
    out, told = tmp_path / "out", list[Event]()
    error = interrupted(whole, lookup, out, signal_at(StepTaken, 3, number, told=told))
    assert (
        str(error)
        == f"{number.name} ended the run after step 3 of 6; it is saved as '{out}/checkpoint-3'; go on with --resume"
    )
    assert (error.signal, error.status, error.checkpoint) == (number.name, 128 + number, out / "checkpoint-3")
    assert told[-1] == RunStopped(out, 3, STEPS, number.name, out / "checkpoint-3")
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-3"]
    outcome = resumed(whole, lookup, out)
    assert_equal(out, whole.out)
    assert outcome.verdict == whole.outcome.verdict


def test_a_step_that_is_saved_already_is_not_saved_again(whole: Run, lookup: DictLookup, tmp_path: Path) -> None:
    told: list[Event] = []
    error = interrupted(whole, lookup, tmp_path, signal_at(StepTaken, 2, signal.SIGTERM, told=told))
    assert error.checkpoint == tmp_path / "checkpoint-2"
    assert [type(event) for event in told[-2:]] == [CheckpointSaved, RunStopped]
    assert [event.step for event in told if isinstance(event, CheckpointSaved)] == [2]
    error = interrupted(whole, lookup, tmp_path, signal_at(RunStarted, 2, signal.SIGTERM))
    assert error.checkpoint == tmp_path / "checkpoint-2"
    assert len((tmp_path / LOG).read_text().splitlines()) == 2


def test_a_signal_before_the_first_step_leaves_nothing_to_go_on_from(
    whole: Run, lookup: DictLookup, tmp_path: Path
) -> None:
    told: list[Event] = []
    error = interrupted(whole, lookup, tmp_path, signal_at(RunStarted, 0, signal.SIGTERM, told=told))
    assert str(error) == "SIGTERM ended the run before its first step; nothing was there to save"
    assert told[-1] == RunStopped(tmp_path, 0, STEPS, "SIGTERM", None)
    assert checkpoints(tmp_path) == []


def test_a_signal_after_the_last_step_leaves_only_the_rest_of_the_job(
    whole: Run, lookup: DictLookup, tmp_path: Path
) -> None:
    told: list[Event] = []
    error = interrupted(whole, lookup, tmp_path, signal_at(CheckpointSaved, STEPS, signal.SIGTERM, told=told))
    assert (error.checkpoint, type(told[-1])) == (tmp_path / f"checkpoint-{STEPS}", RunEnded)
    assert_equal(tmp_path, whole.out)


def test_a_second_signal_ends_it_at_once(whole: Run, lookup: DictLookup, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(
            whole.plan,
            lookup,
            tmp_path,
            device="cpu",
            listen=signal_at(StepTaken, 1, signal.SIGTERM, signal.SIGINT),
        )
    assert checkpoints(tmp_path) == []


def test_signals_are_noted_by_the_main_thread_alone() -> None:
    def enter() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with Signals():
            assert signal.getsignal(signal.SIGTERM) is before
        passed.append(True)

    passed: list[bool] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert passed


def test_of_two_that_a_launcher_brings_at_once_the_second_is_not_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftwork.processes.count", lambda: 2)
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert signals.number == signal.SIGTERM
        signals._came -= 60
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# By the command line ---------------------------------------------------------------------------------------------------

SENDS = """
import os, signal
from graftwork import hookimpl, processes

@hookimpl
def happened(event):
    if type(event).__name__ == "StepTaken" and event.step == 3 and "GRAFTWORK_TEST_PARENT" in os.environ:
        os.kill(int(os.environ["GRAFTWORK_TEST_PARENT"]) or os.getppid(), signal.SIGTERM)
"""
"""A plugin that sends SIGTERM in step 3: to a process, or where that is 0 to the one that started this one."""


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("runs"), base)
    (made.folder / "sends.py").write_text(SENDS, encoding="utf-8")
    return made


def test_the_command_says_the_line_that_goes_on_and_says_when_there_is_nothing_to_resume(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTWORK_TEST_PARENT", str(os.getpid()))
    monkeypatch.chdir(runs.folder)
    plugins = ["--plugin", "shapes_source.py", "--plugin", "sends.py"]
    arguments = ["train", "run.toml", "--out", "one", "--resume", "--device", "cpu"]
    result = CliRunner().invoke(main, [*plugins, *arguments])
    assert "there is nothing to resume: 'one' holds no checkpoint; the run starts anew" in result.stdout
    assert result.exit_code == 128 + signal.SIGTERM, result.output
    assert result.stderr == (
        "SIGTERM ended the run after step 3 of 6; it is saved as 'one/checkpoint-3'; go on with --resume\n"
        "  graftwork --plugin shapes_source.py --plugin sends.py train run.toml --out one --device cpu --resume\n"
    )
    assert names(runs.folder / "one") == {"checkpoint-3", LOG}


def test_sigterm_outside_the_steps_ends_a_command_that_takes_its_folders_with_it(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, trained: Run, tmp_path: Path
) -> None:
    from graftwork.checkpoint import merging

    def ended(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(merging, "_reopen", ended)
    plugins = ["--plugin", str(runs.folder / "shapes_source.py")]
    result = CliRunner().invoke(main, [*plugins, "merge", str(trained.checkpoint), str(tmp_path / "merged")])
    assert (result.exit_code, result.stderr) == (128 + signal.SIGTERM, "Terminated.\n")
    assert [*tmp_path.iterdir()] == []


def names(out: Path) -> set[str]:
    """What a run has left in its folder, but for what observers wrote."""
    return {path.name for path in out.iterdir()} - {"tensorboard"}


def interrupt_on_two(runs: Runs, out: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Send SIGTERM to the launcher of two processes in their third step; what they leave."""
    monkeypatch.setenv("GRAFTWORK_TEST_PARENT", "0")
    options = ["--plugin", "sends.py", "train", "run.toml", "--out", out, "--device", "cpu"]
    launched = runs.start(*options, "--processes", "2", "--set", 'memory.use=["ddp"]')
    said, errors = launched.output()
    assert launched.process.returncode == 128 + signal.SIGTERM, said + errors
    step = int(checkpoints(runs.folder / out)[-1].name.rpartition("-")[2])
    assert errors.startswith(
        f"SIGTERM ended the run after step {step} of 6; it is saved as '{out}/checkpoint-{step}'; go on"
    )
    assert errors.count("\n") == 2 and errors.endswith("--resume\n") and 3 <= step < 6
    assert names(runs.folder / out) == {LOG, f"checkpoint-{step}", *(["checkpoint-4"] if step > 4 else [])}
    monkeypatch.delenv("GRAFTWORK_TEST_PARENT")
    return runs.folder / out


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    out = interrupt_on_two(runs, "two", monkeypatch)
    assert manifest.read(checkpoints(out)[-1]).steps == 6


@pytest.mark.slow
def test_two_processes_go_on_to_the_last_bit_as_if_nothing_had_been(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ['memory.use=["ddp"]']
    runs.train("undisturbed", 2, changes)
    out = interrupt_on_two(runs, "disturbed", monkeypatch)
    runs.train("disturbed", 2, changes, "--resume")
    assert_equal(out, runs.folder / "undisturbed")
    shutil.rmtree(out)
