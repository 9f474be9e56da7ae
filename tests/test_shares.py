"""A process's share of a step, and what is said when a process cannot join others."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from graftwork import launching, processes, shares
from graftwork.batch import IGNORED, Encoded
from graftwork.cli import main
from graftwork.errors import GraftworkError


def example(tokens: int, pictures: int = 0) -> Encoded:
    """A record of so many tokens, of which the last is labelled."""
    pixels = {"eye": torch.zeros(pictures, 3, 2, 2)} if pictures else {}
    return Encoded([5] * tokens, [False] * tokens, [IGNORED] * (tokens - 1) + [7], pixels)


def test_alone_a_process_has_everything() -> None:
    assert (processes.rank(), processes.count(), processes.is_first()) == (0, 1, True)
    assert processes.gather("thing") == ["thing"]
    assert shares.own([4, 2, 9]) == [4, 2, 9]
    assert shares.tally([[example(3, pictures=2), example(4)], [example(5)]]) == shares.Tally(3, 3, 2, 12, 2)


def test_records_are_shared_so_that_each_has_one_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    owned = []
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        owned.append(shares.own([10, 11, 12, 13, 14]))
    assert owned == [[10, 13], [11, 14], [12]]


def test_in_step_every_micro_batch_has_pictures_and_none_has_more_labels() -> None:
    mine = [[example(3, pictures=1)], [example(4)]]
    filled = shares.in_step(mine, shares.Tally(5, 5, 2, 20, 3), example(2, pictures=1))
    assert [len(micro_batch) for micro_batch in filled] == [1, 2, 1]
    assert all(any(each.pixels for each in micro_batch) for micro_batch in filled)
    assert [sum(each.labelled for each in micro_batch) for micro_batch in filled] == [1, 1, 0]
    assert [len(micro_batch) for micro_batch in mine] == [1, 1]
    without = shares.in_step(mine[1:], shares.Tally(5, 5, 2, 20, 2), example(2))
    assert [len(micro_batch) for micro_batch in without] == [1, 1]


def joined(monkeypatch: pytest.MonkeyPatch, expected: int | None = None, **variables: str) -> str:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(GraftworkError) as caught, processes.join("cpu", expected):
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


def test_an_address_where_nobody_is_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PATIENCE", processes.PATIENCE * 0 + processes.timedelta(seconds=1))
    said = joined(monkeypatch, WORLD_SIZE="2", RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert said.startswith(
        "process 1 of 2 cannot reach the others at 127.0.0.1:1; check the addresses that the launcher gives\n  "
    )


def test_only_lost_connections_count_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("[…/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    assert not processes.is_lost(lost)
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert processes.is_lost(lost)
    assert not processes.is_lost(RuntimeError("shapes differ")) and not processes.is_lost(ValueError("gloo"))


def test_processes_that_lose_the_others_say_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.0)

    def broken(*arguments: object) -> None:
        raise RuntimeError("gloo: Connection closed by peer")

    monkeypatch.setattr("graftwork.runfile.load", broken)
    result = CliRunner().invoke(main, ["train", "run.toml"])
    assert result.exit_code == 1
    assert result.output == "Error: process 0 of 2 lost the others: one of them has ended; look for its message\n"


def test_the_exit_status_is_that_of_the_process_that_failed_first() -> None:
    import sys

    assert launching.launch([sys.executable, "-c", "pass"], 2) == 0
    program = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)"
    assert launching.launch([sys.executable, "-c", program], 2) == 7
