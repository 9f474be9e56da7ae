"""Saving a checkpoint: whole and verified under its name, or not at all, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import Run, plan_of

from graftwork.build import compose
from graftwork.checkpoint import manifest, store, writing
from graftwork.checkpoint.store import GOLDEN_INPUTS, checkpoints, open_checkpoint
from graftwork.checkpoint.writing import UNFINISHED
from graftwork.contracts import DictLookup
from graftwork.errors import AdapterError, CheckpointError

Opening = Callable[..., store.Opened]


@pytest.fixture
def opened(lookup: DictLookup) -> Opening:
    """Opens a checkpoint on the CPU."""
    return lambda folder: open_checkpoint(folder, lookup, device="cpu")


def saved(run: Run, folder: Path, lookup: DictLookup, **changes: Any) -> manifest.Manifest:
    golden = {name: tensor for name, tensor in load_file(run.checkpoint / GOLDEN_INPUTS).items() if name != "logits"}
    facts: dict[str, Any] = {"step": 4, "steps": 4, "golden": golden, "health": run.outcome.verdict, "data": {}}
    return store.save(run.outcome.assembly, folder, lookup, **facts | changes)


def test_what_is_saved_is_what_the_manifest_says(
    trained: Run, lookup: DictLookup, opened: Opening, tmp_path: Path
) -> None:
    written = saved(trained, tmp_path / "deep" / "one", lookup, data={"records": 3})
    read = manifest.read(tmp_path / "deep" / "one")
    assert json.dumps(read.plan.to_json()) == json.dumps(written.plan.to_json())
    assert (read.tensors, read.files, read.data) == (written.tensors, written.files, {"records": 3})
    assert read.counts == trained.outcome.assembly.adaptation.counts
    assert set(read.attention) == {"language", "vision.low"}
    assert read.attention["language"]["ran"].keys() == {"sdpa"}
    assert {"torch", "python", "created", "command"} <= read.provenance.keys()
    assert opened(tmp_path / "deep" / "one").verification.error == 0.0


def test_saving_again_replaces_the_checkpoint_of_that_name(
    trained: Run, lookup: DictLookup, opened: Opening, tmp_path: Path
) -> None:
    saved(trained, tmp_path / "one", lookup)
    saved(trained, tmp_path / "one", lookup, step=3)
    assert opened(tmp_path / "one").manifest.step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_what_cannot_be_rebuilt_is_not_saved(base: Path, lookup: DictLookup, trained: Run, tmp_path: Path) -> None:
    assembly = compose.build(plan_of(base, tmp_path), lookup, device="cpu")
    assembly.model.register_parameter("stray", torch.nn.Parameter(torch.zeros(1)))
    run = replace(trained, outcome=replace(trained.outcome, assembly=assembly))
    with pytest.raises(AdapterError, match="1 are unknown"):
        saved(run, tmp_path / "one", lookup)
    assert list(tmp_path.iterdir()) == []


SAVE = """
import resource, signal, sys
from pathlib import Path
import torch
from tiny_runs import COMPONENTS, die, on_touches
from graftwork.checkpoint import store
from graftwork.errors import CheckpointError
from graftwork.contracts.lookup import DictLookup

torch.set_num_threads(1)
folder, limit, count, fatal = Path(sys.argv[1]), *map(int, sys.argv[2:5])
lookup = DictLookup(*COMPONENTS)
opened = store.open_checkpoint(folder, lookup, device="cpu")
golden = store.read_tensors(folder / store.GOLDEN_INPUTS)
facts = dict(step=4, steps=4, golden=golden, health=opened.manifest.health, data={})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
touches = 0

def touched():
    global touches
    touches += 1
    if touches == fatal:
        die()

try:
    for number in range(count):
        store.save(opened.assembly, folder.with_name(f"checkpoint-{4 + number}"), lookup, **facts)
        if number == 0:  # From then on the first one has been replaced.
            on_touches(folder.parent, touched)
    print(touches)
except CheckpointError as error:
    print(error)
"""


def saving(folder: Path, *, limit: int = 0, count: int = 1, fatal: int = 0) -> subprocess.Popen[str]:
    """A process that saves a checkpoint under its own name and further ones, with a limit on the bytes of a file.

    It is killed when Python touches something of that run for the so many-th time; else it says how often it did.
    """
    command = [sys.executable, "-c", SAVE, str(folder), *map(str, (limit, count, fatal))]
    tests = str(Path(__file__).parent)
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment_with(tests)
    )


def environment_with(folder: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))}


def test_a_full_disk_leaves_the_earlier_checkpoint_as_it_was(trained: Run, opened: Opening, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "checkpoint-4"
    shutil.copytree(trained.checkpoint, folder)
    before = (folder / manifest.FILE).read_bytes()
    said, failed = saving(folder, limit=20_000).communicate()
    assert said.startswith(f"'{folder}' could not be saved: "), failed
    assert said.rstrip().endswith("; earlier checkpoints are untouched")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-4"]
    assert (folder / manifest.FILE).read_bytes() == before
    assert opened(folder).verification.error == 0.0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("File too large (os error 27)")])
def test_whoever_notices_that_the_disk_is_full_it_is_one_sentence(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(CheckpointError) as caught, writing.unfinished(tmp_path / "one") as work:
        (work / "half").write_bytes(b"half")
        raise error
    why = "the disk is full" if isinstance(error, OSError) else "File too large (os error 27)"
    assert str(caught.value) == f"'{tmp_path / 'one'}' could not be saved: {why}; earlier checkpoints are untouched"
    assert list(tmp_path.iterdir()) == []


def test_a_bug_while_saving_stays_a_bug_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing.unfinished(tmp_path / "one"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_process_that_is_killed_while_saving_leaves_only_whole_checkpoints(
    trained: Run, opened: Opening, tmp_path: Path
) -> None:
    folder = tmp_path / "out" / "checkpoint-4"
    shutil.copytree(trained.checkpoint, folder)
    said, failed = saving(folder, count=2).communicate()
    assert said, failed
    (tmp_path / "out" / "checkpoint-5").rename(tmp_path / "checkpoint-5")
    touches, unfinished = int(said), 0
    for number in range(6):
        process = saving(folder, count=2, fatal=1 + number * (touches - 1) // 5)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        unfinished += len(list((tmp_path / "out").glob(f"{UNFINISHED}*")))
        found = checkpoints(tmp_path / "out")
        assert found[0] == folder
        for each in found:
            assert opened(each).verification.error == 0.0
        writing.sweep(tmp_path / "out")
        for each in found[1:]:
            writing.remove(each)
    assert unfinished > 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-4"]
