"""A process's share of a step, and what is said when a process cannot join others."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_runs import plan_of

from graftwork import processes
from graftwork.build import compose
from graftwork.cli import main
from graftwork.contracts import IGNORED, DictLookup, Encoded, stepper_for
from graftwork.contracts.packing import MicroBatch
from graftwork.errors import CheckpointError, GraftworkError, PlanRefused
from graftwork.evaluate import questions
from graftwork.jobs import launching
from graftwork.train import data_parallel
from graftwork.train.loop import train


def example(tokens: int, images: int = 0) -> Encoded:
    """A record of so many tokens, of which the last is num_label_tokens."""
    pixels = {"eye": torch.zeros(images, 3, 2, 2)} if images else {}
    return Encoded([5] * tokens, [False] * tokens, [IGNORED] * (tokens - 1) + [7], pixels)


def test_alone_a_process_has_everything() -> None:
    assert (processes.rank(), processes.count(), processes.is_first()) == (0, 1, True)
    assert processes.all_gather_object("thing") == ["thing"]
    assert data_parallel.strided_slice([4, 2, 9]) == [4, 2, 9]
    examples = [MicroBatch([example(3, images=4), example(4)]), MicroBatch([example(5)])]
    share = data_parallel.Share(examples, images=2)
    assert data_parallel.tally(share) == data_parallel.Tally(3, 3, 2, 12, 2)


def test_records_are_shared_so_that_each_has_one_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    owned, asked = [], []
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        owned.append(data_parallel.strided_slice([10, 11, 12, 13, 14]))
        asked.append(questions.contiguous_slice("abcde"))
    assert owned == [[10, 13], [11, 14], [12]]
    assert asked == [["a"], ["b", "c"], ["d", "e"]]


def test_in_step_every_micro_batch_has_images_and_none_has_more_labels() -> None:
    mine = [MicroBatch([example(3, images=1)]), MicroBatch([example(4)])]
    filled = data_parallel.pad_micro_batches(mine, data_parallel.Tally(5, 5, 2, 20, 3), example(2, images=1))
    assert [len(micro_batch.examples) for micro_batch in filled] == [1, 2, 1]
    assert all(any(each.pixels for each in micro_batch.examples) for micro_batch in filled)
    assert [sum(each.num_label_tokens for each in micro_batch.examples) for micro_batch in filled] == [1, 1, 0]
    assert [len(micro_batch.examples) for micro_batch in mine] == [1, 1]
    packed = data_parallel.pad_micro_batches(
        [MicroBatch([example(4)] * 3, (2, 1))], data_parallel.Tally(5, 5, 2, 20, 2), example(2, images=1)
    )
    assert [each.rows for each in packed] == [(2, 1, 1), ()]
    without = data_parallel.pad_micro_batches(mine[1:], data_parallel.Tally(5, 5, 2, 20, 2), example(2))
    assert [len(micro_batch.examples) for micro_batch in without] == [1, 1]


def joined(
    monkeypatch: pytest.MonkeyPatch, expected: int | None = None, device: str | None = "cpu", **variables: str
) -> str:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(GraftworkError) as caught, processes.join(device, expected):
        pass
    return str(caught.value)


def test_a_launcher_that_says_too_little_or_something_else_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert joined(monkeypatch, WORLD_SIZE="2", RANK="1", MASTER_ADDR="localhost") == (
        "WORLD_SIZE is 2, and MASTER_PORT is not set; start with --processes or a launcher such as torchrun, or unset "
        "WORLD_SIZE"
    )
    told = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert joined(monkeypatch, 4, **told) == (
        "--processes 4 is asked for, and the launcher started 2; leave the option out"
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    with processes.join():
        assert processes.count() == 1


def test_each_process_needs_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert joined(monkeypatch, device="cuda:0", **told) == (
        "--device cuda:0 is one device, and there are 2 processes; leave it out, or use --device cpu"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert joined(monkeypatch, device=None, **told) == (
        "process 1 has no CUDA device of its own: this machine has 1; start fewer processes, or use --device cpu"
    )


def test_processes_that_would_learn_apart_are_refused(
    base: Path, lookup: DictLookup, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(base, base)
    assembly = compose.build(plan, lookup, device="cpu")
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(PlanRefused) as caught:
        stepper_for(assembly, plan.run_context.train)
    assert str(caught.value) == (
        "2 processes run this plan, and none of its memory strategies brings their gradients together; add one that does to "
        "memory.use (graftwork list memory)"
    )


def test_processes_that_see_different_folders_are_refused(
    base: Path, lookup: DictLookup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "all_gather_object", lambda thing: [thing, "checkpoint-2"])
    with pytest.raises(CheckpointError) as caught:
        train(plan_of(base, tmp_path), lookup, tmp_path / "out", device="cpu")
    assert str(caught.value) == (
        f"the processes do not see the same checkpoints in '{tmp_path / 'out'}' (none, checkpoint-2); name a folder with --out "
        "that all machines share"
    )


def test_an_address_where_nobody_is_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "TIMEOUT", timedelta(seconds=1))
    said = joined(monkeypatch, WORLD_SIZE="2", RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert said.startswith(
        "process 1 of 2 cannot reach the others at 127.0.0.1:1; check the addresses that the launcher gives\n  "
    )


def test_only_lost_connections_count_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("[…/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    assert not processes.is_peer_failure(lost)
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert processes.is_peer_failure(lost)
    assert not processes.is_peer_failure(RuntimeError("shapes differ")) and not processes.is_peer_failure(
        ValueError("gloo")
    )


def test_processes_that_lose_the_others_say_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.0)

    def broken(*arguments: object) -> None:
        raise RuntimeError("gloo: Connection closed by peer")

    monkeypatch.setattr("graftwork.config.runfile.load", broken)
    result = CliRunner().invoke(main, ["train", "run.toml"])
    assert result.exit_code == 1
    assert result.output == "Error: process 0 of 2 lost the others: one of them has ended; look for its message\n"


def test_the_exit_status_is_that_of_the_process_that_failed_first() -> None:
    assert launching.launch([sys.executable, "-c", "pass"], 2) == 0
    program = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)"
    assert launching.launch([sys.executable, "-c", program], 2) == 7
