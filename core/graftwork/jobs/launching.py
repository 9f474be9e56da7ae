"""Starting a command on several processes of this machine, and ending all of them when one ends early."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from graftwork.errors import GraftworkError

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
STOPPED = {128 + number for number in FORWARDED}
"""The exit statuses of processes that ended because they were asked to, all after the same step."""
GRACE_SECONDS = 10.0
"""After a signal all end together, once everything is saved; one that does not waits for another that has ended."""
WATCHED_EVERY = 0.1


def launch(command: Sequence[str], count: int) -> int:
    """Run a command on `count` processes; returns the exit status of the first that failed.

    SIGTERM and SIGINT are passed on, once each, and all processes are waited for; a second signal ends them at once. A
    process that fails by itself has printed why; GraftworkError reports one that a signal ended.
    """
    import torch

    # Whoever picks the port holds it: this process, as torchrun's agent does, by the same variables.
    distributed: Any = torch.distributed
    meeting = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(meeting.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    children: list[subprocess.Popen[bytes]] = []
    with forwarding(children) as came:
        try:
            for number in range(count):
                own = variables | {"RANK": str(number), "LOCAL_RANK": str(number)}
                # In a session of its own Ctrl-C reaches it once: from here.
                children.append(subprocess.Popen(command, env=own, start_new_session=True))
            failed = (0, 128 + came[0]) if came else watch(children, came)
        finally:
            for child in children:
                child.kill()
                child.wait()
    if failed is None:
        return 128 + came[0] if len(came) > 1 else 0
    rank, status = failed
    if status > 0:
        return status
    if came:
        return 128 + came[0]
    why = " (the system does that when main memory runs out)" if status == -signal.SIGKILL else ""
    raise GraftworkError(
        f"process {rank} of {count} was ended by {signal.Signals(-status).name}{why}, so the others were ended too; what was "
        "saved before is intact: give the same command again, with --resume if it trains"
    )


def watch(children: Sequence[subprocess.Popen[bytes]], came: Sequence[int]) -> tuple[int, int] | None:
    """Wait until all have ended, or one has failed; which was the first, and how.

    After a signal, which is in `came`, all are waited for: each of them has something to save or to say.
    """
    first, until = None, math.inf
    while True:
        running = [child for child in children if child.poll() is None]
        first = first or next(
            ((rank, child.returncode) for rank, child in enumerate(children) if child.returncode), None
        )
        if first and not came and first[1] not in STOPPED:
            return first
        if first and until == math.inf:
            until = time.monotonic() + GRACE_SECONDS
        if not running or len(came) > 1 or time.monotonic() > until:
            return first
        time.sleep(WATCHED_EVERY)


@contextmanager
def forwarding(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """While entered, what ends a command goes to the children; yields the list of those that came."""
    came: list[int] = []

    def forward(number: int, frame: object) -> None:
        came.append(number)
        for child in children:
            # A closed terminal ends a run as a cluster does: they sit in sessions of their own, and know no other signals.
            child.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    ignored = [n for n in FORWARDED if n == signal.SIGHUP and signal.getsignal(n) == signal.SIG_IGN]  # as nohup does
    before = {number: signal.signal(number, forward) for number in FORWARDED if number not in ignored}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
