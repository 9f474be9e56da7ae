"""A folder has one writer, on this machine and on others; what a killed one left behind goes, and what a living one writes stays."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run_table
from tiny_vlm import Quiz, question, tiny_assembly

import graftwork
from graftwork.checkpoint import locking, writing
from graftwork.checkpoint.locking import LOCK, SILENT_SECONDS, WRITER, one_writer
from graftwork.checkpoint.writing import UNFINISHED
from graftwork.contracts import DictLookup
from graftwork.errors import CheckpointError
from graftwork.jobs.evaluate import run_evaluation


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    return caught.value.sentence


def enter(folder: Path, **options: Any) -> None:
    with one_writer(folder, **options):
        assert (folder / WRITER).is_file()


def written_elsewhere(folder: Path, silent: float, host: str = "far-away", process: int = 77) -> Path:
    """The file of a writer that gave its last sign of life so many seconds ago."""
    heartbeat = (datetime.now(UTC) - timedelta(seconds=silent)).isoformat()
    content = {"host": host, "process": process, "start": "2026-01-02T03:04:05+00:00", "heartbeat": heartbeat}
    folder.mkdir(exist_ok=True)
    (folder / WRITER).write_text(json.dumps(content))
    return folder / WRITER


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with one_writer(folder):
        said = json.loads((folder / WRITER).read_text())
        assert (said["host"], said["process"]) == (socket.gethostname(), os.getpid())
        for options in ({}, {"take_over": True}):
            sentence = refusal(lambda options=options: enter(folder, **options))
            assert sentence == (
                f"'{folder}' is being written by process {os.getpid()} on '{socket.gethostname()}', since {said['start']}; wait "
                "until that has ended, or name another folder with --out"
            )
    assert not folder.exists()
    (tmp_path / "notes.txt").touch()
    enter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_written_into_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (file := tmp_path / "out").touch()
    assert refusal(lambda: enter(file)).startswith(f"'{file}' cannot be written into: ")


def killed(script: str, folder: Path) -> None:
    """Run a script in another process until it says that it is ready, and kill it."""
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)


HOLDING = """
import sys, time
from pathlib import Path
from graftwork.checkpoint import locking, writing
folder = Path(sys.argv[1])
with locking.one_writer(folder), writing.hidden(folder) as work:
    (work / "half").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_killed_writer_of_this_machine_is_in_nobodys_way_and_is_cleared_up(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    killed(HOLDING, folder)
    assert (folder / WRITER).is_file() and len(list(folder.glob(f"{UNFINISHED}*"))) == 1
    enter(folder)
    with writing.unfinished(folder / "model") as work:
        assert [path for path in folder.iterdir() if path.is_dir()] == [work]
    assert [*folder.iterdir()] == []


def test_a_copy_of_a_killed_writer_holds_none_of_its_locks(tmp_path: Path) -> None:
    # As of one whose records are prepared by copies of it, which notice seconds later that it is gone; the copy says "ready".
    copied = HOLDING.replace("sys, time", "os, sys, time").replace("time.sleep(600)", "time.sleep(5)\n    os._exit(0)")
    copied = copied.replace("    print(", "    os.fork() and time.sleep(600)\n    print(")
    killed(copied, tmp_path / "out")
    enter(tmp_path / "out")
    writing.sweep(tmp_path / "out")
    assert [*(tmp_path / "out").iterdir()] == []


def test_a_living_writer_of_another_machine_is_refused_whatever_is_asked_for(tmp_path: Path) -> None:
    file = written_elsewhere(tmp_path, silent=SILENT_SECONDS - 60)
    before = file.read_bytes()
    for options in ({}, {"take_over": True}):
        sentence = refusal(lambda options=options: enter(tmp_path, **options))
        assert sentence.startswith(
            f"'{tmp_path}' is being written by process 77 on 'far-away', since 2026-01-02T03:04:05+00:00, which gave a sign of "
            "life 54"
        )
    assert file.read_bytes() == before and not (tmp_path / LOCK).exists()


def test_a_silent_writer_of_another_machine_is_stale_and_the_way_out_is_named(tmp_path: Path) -> None:
    written_elsewhere(tmp_path, silent=3 * 3600)
    assert refusal(lambda: enter(tmp_path)) == (
        f"the lock of '{tmp_path}' is stale: process 77 on 'far-away', since 2026-01-02T03:04:05+00:00, has been silent for 180 "
        "minutes; if it has ended, go on with --take-over"
    )
    enter(tmp_path, take_over=True)
    assert [*tmp_path.iterdir()] == []


def test_whoever_was_taken_over_leaves_the_other_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = threading.Event()
    monkeypatch.setattr(locking, "BEAT_SECONDS", 0.001)
    monkeypatch.setattr(locking, "_beat", lambda file, mine, beat=locking._beat: (beat(file, mine), beats.set()))
    with one_writer(tmp_path):
        other = written_elsewhere(tmp_path, silent=5).read_bytes()
        beats.clear()
        assert beats.wait(60) and (tmp_path / WRITER).read_bytes() == other
    assert (tmp_path / WRITER).read_bytes() == other


def test_a_writer_gives_signs_of_life(tmp_path: Path) -> None:
    with one_writer(tmp_path):
        mine = locking._read(tmp_path / WRITER)
        assert mine
        written_elsewhere(tmp_path, 3600, mine.host, mine.process)
        old = locking._read(tmp_path / WRITER)
        assert old and old.silent > 3000
        locking._beat(tmp_path / WRITER, old)
        found = locking._read(tmp_path / WRITER)
        assert found and found.silent < 3000


def test_where_there_are_no_locks_the_file_speaks_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "fcntl", None)
    said: list[str] = []
    with one_writer(tmp_path, say=said.append):
        assert f"process {os.getpid()} on" in refusal(lambda: enter(tmp_path))
    assert said == [
        f"there are no file locks where '{tmp_path}' is: only '{tmp_path / WRITER}' keeps other commands from writing there"
    ]
    written_elsewhere(tmp_path, 5, socket.gethostname(), process=2**22 + 1)  # no process has so high a number
    enter(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"host": 1}', '{"host": "a", "process": 1, "start": "", "heartbeat": "?"}']
)
def test_a_damaged_file_stops_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / WRITER).write_text(content)
    enter(tmp_path)


def test_a_sweep_spares_what_lives_here_and_elsewhere(tmp_path: Path) -> None:
    def left(name: str, silent: float = 0) -> Path:
        folder = tmp_path / f"{UNFINISHED}{name}"
        folder.mkdir()
        (folder / "half").write_bytes(b"half")
        then = datetime.now().timestamp() - silent
        os.utime(folder, (then, then))
        return folder

    here = socket.gethostname()
    gone = [left("a1b2c3d4"), left(f"{here}-a1b2c3d4"), left("far-away-a1b2c3d4", SILENT_SECONDS + 60)]
    with writing.hidden(tmp_path) as living:
        spared = [living, left("far-away-e5f6a7b8", SILENT_SECONDS - 60)]
        writing.sweep(tmp_path)
        assert {*tmp_path.iterdir()} == {*spared}
        assert not any(folder.exists() for folder in gone)


def test_a_sweep_without_locks_goes_by_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "fcntl", None)
    with writing.hidden(tmp_path) as living:
        writing.sweep(tmp_path)
        assert living.is_dir()
        os.utime(living, (0, 0))
        writing.sweep(tmp_path)
        assert not living.exists()


def test_a_folder_that_cannot_be_replaced_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "whole").touch()

    def failing(self: Path, target: Path, rename: Callable[[Path, Path], Path] = Path.rename) -> Path:
        if (self, target) == (work, model):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    with writing.hidden(tmp_path) as work, pytest.raises(OSError, match="No space"):
        monkeypatch.setattr(Path, "rename", failing)
        writing.put_in_place(work, model)
    assert [*tmp_path.iterdir()] == [model] and (model / "whole").is_file()


def test_a_run_and_an_evaluation_are_refused_where_another_writes(
    base: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    with one_writer(tmp_path / "out"):
        assert "is being written by" in refusal(
            lambda: graftwork.train(run_table(base), tmp_path / "out", device="cpu", lookup=lookup)
        )
    with one_writer(tmp_path / "answers"):
        quiz, assembly = Quiz(question("one", "what is x")), tiny_assembly()
        assert "is being written by" in refusal(
            lambda: run_evaluation(assembly, quiz, tmp_path / "answers", ("adapter",), {})  # type: ignore[arg-type]
        )
