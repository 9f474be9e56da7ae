"""The processes that run one command together: their ranks, and how they exchange data.

A process runs alone unless it joins others, by `join`, as a launcher's environment variables say. A function that every
process of a group has to call is marked as collective.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from graftwork.errors import GraftworkError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: longer than the first one takes to write and verify a checkpoint."""
ROUND_SECONDS = 5.0
"""How often processes that wait for the first one hear from it."""
GRACE_SECONDS = 15.0
"""How long a process that fails waits for its launcher to end it before it prints its error; on a busy machine the first one takes
seconds to fail as well."""
WATCH_SECONDS = 1.0
"""How often a process looks whether the one that it ends with is there."""


def _group() -> Any:
    """`torch.distributed` if this process belongs to a group. Where torch was never imported, there is none."""
    torch: Any = sys.modules.get("torch")
    grouped = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed if grouped else None


def rank() -> int:
    """Which process this is, counted from 0."""
    group = _group()
    return int(group.get_rank()) if group else 0


def count() -> int:
    """How many processes there are."""
    group = _group()
    return int(group.get_world_size()) if group else 1


def on_this_machine() -> int:
    """How many processes there are on this machine, as launchers say; 1 where none does."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def is_first() -> bool:
    """Whether this is the process that prints, logs and writes."""
    return rank() == 0


def all_gather_object(value: T) -> list[T]:
    """The value of each process, by rank, on all of them. Collective; a value is pickled, so it should be small."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    _group().all_gather_object(found, value)
    return found


def first_alone(work: Callable[[], T]) -> T | None:
    """What the first process gets by work that may take hours; None on the others, which wait for it. Collective.

    What the first one fails with is raised on all: GraftworkError as it is, and on the others anything else as one.
    """
    if count() == 1:
        return work()
    if not is_first():
        while (state := all_gather_object(None)[0]) is None:
            pass  # Each round takes seconds, so that no collective call runs into its time limit.
        if state:
            raise GraftworkError(*state)
        return None
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while not future.done():
            wait([future], timeout=ROUND_SECONDS)
            if not future.done():
                all_gather_object(None)
    error = future.exception()
    own = (error.sentence, error.details) if isinstance(error, GraftworkError) else (f"process 0 failed: {error!r}", ())
    all_gather_object(own if error else ())
    return future.result()


def launched_distributed() -> bool:
    """Whether a launcher's environment variables say that this process is one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def join(device: str | None = None, expected: int | None = None) -> Iterator[None]:
    """While entered, this process is one of those that a launcher started, if one did; GraftworkError if it cannot be.

    Launchers set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Each process gets the CUDA device of its
    LOCAL_RANK, and its share of the machine's cores. `expected` is the number of processes that was requested.
    """
    if not launched_distributed():
        yield
        return
    import torch

    variables = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    if missing := [name for name, value in variables.items() if not value]:
        raise GraftworkError(
            f"WORLD_SIZE is {variables['WORLD_SIZE']}, and {' and '.join(missing)} is not set; start with --processes or a launcher "
            "such as torchrun, or unset WORLD_SIZE"
        )
    if expected is not None and expected != int(variables["WORLD_SIZE"] or 1):
        raise GraftworkError(
            f"--processes {expected} is asked for, and the launcher started {variables['WORLD_SIZE']}; leave the option out"
        )
    if device and ":" in device:
        raise GraftworkError(
            f"--device {device} is one device, and there are {variables['WORLD_SIZE']} processes; leave it out, or use --device cpu"
        )
    on_cuda = torch.cuda.is_available() and device != "cpu"
    local = int(os.environ.get("LOCAL_RANK") or 0)
    if on_cuda:
        if local >= torch.cuda.device_count():
            raise GraftworkError(
                f"process {variables['RANK']} has no CUDA device of its own: this machine has {torch.cuda.device_count()}; start "
                "fewer processes, or use --device cpu"
            )
        torch.cuda.set_device(local)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // on_this_machine()))
    try:
        torch.distributed.init_process_group(_backend(on_cuda), timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise GraftworkError(
            f"process {variables['RANK']} of {variables['WORLD_SIZE']} cannot reach the others at {variables['MASTER_ADDR']}:"
            f"{variables['MASTER_PORT']}; check the addresses that the launcher gives",
            str(error).splitlines()[:1],
        ) from error
    yield
    # Not in a finally block: after a failure the others may wait in a collective call that never returns.
    torch.distributed.destroy_process_group()


def ensure_group(device: Any) -> None:
    """Make sure that there is a group, of this process alone if it joined none, for engines that need one."""
    import torch

    distributed: Any = torch.distributed
    if not distributed.is_initialized():
        store = distributed.HashStore()
        distributed.init_process_group(_backend(device.type == "cuda"), store=store, rank=0, world_size=1)


def _backend(on_cuda: bool) -> str:
    """The backend: gloo for objects and tensors on a CPU, NCCL for tensors on CUDA devices."""
    return "cpu:gloo,cuda:nccl" if on_cuda else "gloo"


def yield_to_launcher(error: BaseException) -> None:
    """Let a launcher end this process, which failed with `error`, if another process has the better error message.

    Often all processes fail for the same reason, which rank 0 reports; and when one dies, the others only lose contact.
    """
    if not is_first() or is_peer_failure(error):
        time.sleep(GRACE_SECONDS)


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error means only that another process is gone."""
    markers = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return count() > 1 and isinstance(error, RuntimeError) and any(marker in str(error) for marker in markers)


def sum_over_processes(gradients: Iterable[Tensor]) -> None:
    """Replace each gradient by its sum over all processes. Collective."""
    import torch

    distributed: Any = torch.distributed
    for work in [distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()


def cache_folder() -> Path:
    """Where everything is kept: `GRAFTWORK_CACHE`, else `graftwork` in the user's folder for caches; where nothing can be, if there is no user."""
    if named := os.environ.get("GRAFTWORK_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graftwork"
    except RuntimeError:  # as in a container that runs under a number without a name
        return Path(os.devnull) / "graftwork"


def end_with(parent: int) -> None:
    """From now on, end this process soon after the one that started it, whatever both are doing."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="watch", daemon=True).start()
