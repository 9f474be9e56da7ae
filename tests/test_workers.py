"""Processes that prepare records: the run is the one without them, whatever becomes of records, signals and processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from process_runs import Runs
from test_resume import assert_equal, interrupted
from tiny_runs import CHANGES, PlanOf, Run

from graftwork import processes
from graftwork.build import compose
from graftwork.conformance.processor import differing
from graftwork.contracts import IGNORED, DictLookup, Encoded, Event, StepTaken, batch_of
from graftwork.data.training_data import load_training_data
from graftwork.errors import DataError, GraftworkError, RunInterrupted
from graftwork.train import feeding, preparing
from graftwork.train.feeding import Feed
from graftwork.train.loop import train
from graftwork.train.preparing import LOST, Parcel

WORKERS = {"train.workers": 2}


@pytest.fixture(autouse=True)
def none_is_left() -> Any:
    """No process outlives its run."""
    yield
    assert not multiprocessing.active_children()


def test_a_run_with_workers_is_the_run_without_also_when_it_is_resumed(
    whole: Run, lookup: DictLookup, run: PlanOf, tmp_path: Path
) -> None:
    plan = run(CHANGES | WORKERS)
    train(plan, lookup, tmp_path / "out", device="cpu")
    assert_equal(tmp_path / "out", whole.out)
    interrupted(plan, lookup, tmp_path / "again", 3)
    train(plan, lookup, tmp_path / "again", resume=True, device="cpu")
    assert_equal(tmp_path / "again", whole.out)


@pytest.mark.parametrize("packing", [False, True])
def test_what_cannot_be_used_is_left_out_alike(packing: bool, lookup: DictLookup, run: PlanOf, tmp_path: Path) -> None:
    changes = {"data.source": [{"use": "shapes", "count": 14, "broken": [0, 1, 3, 4], "long": [2, 5]}]}
    changes |= {"train.steps": None, "train.batch_size": 2, "train.epochs": 2, "train.packing": packing}
    outcomes = [
        train(run(changes | {"train.workers": count}), lookup, tmp_path / str(count), device="cpu") for count in (0, 2)
    ]
    assert_equal(tmp_path / "2", tmp_path / "0")
    assert outcomes[0].data["left_out_in_training"] == 4
    assert dict(outcomes[0].data, bad=[*outcomes[0].data["bad"]]) == dict(
        outcomes[1].data, bad=[*outcomes[1].data["bad"]]
    )


def test_strict_data_is_refused_in_the_same_sentence(lookup: DictLookup, run: PlanOf, tmp_path: Path) -> None:
    changes = {"data.source": [{"use": "shapes", "count": 24, "broken": [21]}], "data.strict": True}
    said = []
    for count in (0, 2):
        plan = run(changes | {"train.steps": 6, "train.workers": count})
        with pytest.raises(DataError) as caught:
            train(plan, lookup, tmp_path / str(count), device="cpu")
        said.append(str(caught.value))
    assert said[0] == said[1] and "is not an image" in said[0]


def test_signals_to_all_processes_end_the_run_after_its_step(
    whole: Run, lookup: DictLookup, run: PlanOf, tmp_path: Path
) -> None:
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGINT)}

    def listen(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 3:
            for process in multiprocessing.active_children():
                for number in before:
                    os.kill(process.pid or 0, number)
            signal.raise_signal(signal.SIGTERM)

    plan = run(CHANGES | WORKERS)
    with pytest.raises(RunInterrupted) as caught:
        train(plan, lookup, tmp_path / "out", device="cpu", listen=listen)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert caught.value.checkpoint == tmp_path / "out" / "checkpoint-3"
    train(plan, lookup, tmp_path / "out", resume=True, device="cpu")
    assert_equal(tmp_path / "out", whole.out)


def test_a_killed_worker_is_one_sentence(lookup: DictLookup, run: PlanOf, tmp_path: Path) -> None:
    def listen(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 1:
            for process in multiprocessing.active_children():
                os.kill(process.pid or 0, signal.SIGKILL)

    with pytest.raises(GraftworkError) as caught:
        train(run({"train.steps": 20} | WORKERS), lookup, tmp_path / "out", device="cpu", listen=listen)
    assert str(caught.value) == LOST


def test_only_a_runs_own_workers_end_with_it(lookup: DictLookup, run: PlanOf, tmp_path: Path) -> None:
    others = list[Any]()

    def listen(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 1:
            others.append(multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)))
            others[0].start()

    train(run({"train.steps": 2} | WORKERS), lookup, tmp_path / "out", device="cpu", listen=listen)
    assert multiprocessing.active_children() == others
    others[0].kill()
    others[0].join()


def test_too_many_open_files_are_one_sentence(
    lookup: DictLookup, run: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(feed: Feed, first: int, workers: int, forking: preparing.Forking) -> Any:
        forking.Process(target=print)  # which the system does not start
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(preparing, "parcels", failing)
    with pytest.raises(GraftworkError, match="ulimit -n"):
        train(run({"train.steps": 2} | WORKERS), lookup, tmp_path / "out", device="cpu")


@pytest.mark.parametrize("room", [0, 1 << 40])
def test_a_parcel_gives_back_what_was_packed(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=room)
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda place: usage)
    pixels = {
        "image": torch.randint(0, 255, (2, 3, 5, 5), dtype=torch.uint8),
        "fine": torch.randn(1, 3, 7)[..., ::2],
        "grid": torch.tensor([[1, 4, 6]]),
        "real": torch.tensor([True, False, True]),
        "none": torch.empty(0, 4),
    }
    record = Encoded([1, 2], [True, False], [IGNORED, 2], pixels, weight=0.5)
    text, bad = replace(record, pixels={}), DataError("it is bad")
    parcel = Parcel.of([(7, record), (3, text), (5, bad)], 4)
    assert isinstance(parcel.content, torch.Tensor if room else numpy.ndarray)
    (_, found), (_, plain), (place, error) = parcel.opened()
    assert isinstance(found, Encoded) and isinstance(plain, Encoded)
    assert (place, error, found.weight, plain.pixels) == (5, bad, 0.5, {})
    assert found.pixels.keys() == pixels.keys()
    assert all(
        found.pixels[name].equal(each) and found.pixels[name].dtype == each.dtype for name, each in pixels.items()
    )


@pytest.mark.parametrize(("free", "times"), [(1 << 40, 1), (1 << 16, 3)])
def test_records_that_come_again_are_encoded_once_where_memory_allows(
    free: int, times: int, lookup: DictLookup, run: PlanOf, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "available_memory", lambda: free)
    plan = run({"data.source": [{"use": "shapes", "count": 8, "broken": [3]}], "train.steps": 6})
    assembly = compose.build(plan, lookup, device="cpu")
    asked, encode = list[str](), assembly.processor.encode
    monkeypatch.setattr(assembly.processor, "encode", lambda record: (asked.append(record.id), encode(record))[1])
    feed = Feed(plan.run_context, assembly.processor, load_training_data(plan, lookup, assembly.processor))
    shares = [feed.share(batch) for batch in range(6)]
    assert asked.count("shapes/0") == times and asked.count("shapes/3") == 3
    again = Feed(
        replace(plan.run_context, train=replace(plan.run_context.train, steps=2)), assembly.processor, feed.data
    )
    assert not again.room and not differing(
        again.share(4).micro_batches[0].examples[0], shares[4].micro_batches[0].examples[0]
    )


def test_how_many_there_are_is_what_training_leaves_free(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    found = []
    for cores, local in ((1, 1), (8, 1), (64, 1), (64, 8), (4, 8)):
        monkeypatch.setattr(preparing, "cores", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        assert processes.on_this_machine() == local
        found.append(preparing.workers(None, cuda))
    assert found == [0, 7, 16, 7, 0]
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    assert preparing.workers(None, cuda) == 0
    with pytest.raises(GraftworkError, match="set it to 0"):
        preparing.workers(1, cpu)
    monkeypatch.undo()
    assert preparing.workers(None, cpu) == 0 and preparing.workers(3, cpu) == 3 and preparing.workers(0, cuda) == 0


@pytest.mark.slow
def test_each_of_several_processes_has_workers_and_nothing_else_is_said(base: Path, tmp_path: Path) -> None:
    runs = Runs(tmp_path, base)
    for count, changes in ((1, []), (2, ['memory.use=["ddp"]'])):
        said = [
            runs.train(f"{count}-{workers}", count, [*changes, f"train.workers={workers}"], "--device", "cpu")
            for workers in (0, 2)
        ]
        assert_equal(tmp_path / f"{count}-2", tmp_path / f"{count}-0")
        assert len(said[0].splitlines()) == len(said[1].splitlines())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_beside_a_gpu_batches_are_collated_ahead_in_pinned_memory(
    lookup: DictLookup, run: PlanOf, tmp_path: Path
) -> None:
    plan = run(WORKERS)
    assembly = compose.build(plan, lookup, device="cuda")
    feed = Feed(plan.run_context, assembly.processor, load_training_data(plan, lookup, assembly.processor))
    with preparing.Ahead(feed, assembly.device) as ahead:
        (micro_batch,) = ahead.share(0).result().micro_batches
    batch, wanted = micro_batch.batch, batch_of(assembly.processor, micro_batch.examples)
    assert batch is not None and batch.input_ids.is_pinned() and batch.pixels["high"].is_pinned()
    assert batch.input_ids.equal(wanted.input_ids) and batch.pixels["high"].equal(wanted.pixels["high"])
    logs = [train(run({"train.workers": count}), lookup, tmp_path / str(count), device="cuda").log for count in (0, 2)]
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], rel=1e-5)


def test_a_worker_ends_with_a_killed_run_also_while_it_waits() -> None:
    """Torch's own workers wait for ever for somebody to take what they have."""
    program = (
        "import multiprocessing, os, sys, time\n"
        "from graftwork.train.preparing import alone\n"
        "def work():\n    alone(os.getppid(), 0)\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
        "multiprocessing.get_context('fork').Process(target=work).start()\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        worker = int(run.stdout.readline())
        run.kill()
    until = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()
