"""The shares of the steps to come, prepared while steps are taken: by a thread, or by processes of torch's DataLoader."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import processes
from graftwork.config.machine import cores
from graftwork.contracts.batch import Encoded
from graftwork.contracts.model import batch_of
from graftwork.contracts.packing import MicroBatch
from graftwork.errors import GraftworkError
from graftwork.train.data_parallel import Share
from graftwork.train.feeding import Feed, Found

if TYPE_CHECKING:
    import torch

MAX_WORKERS = 16
"""How many processes prepare records at most, unless a run says otherwise."""
TOGETHER = 4
"""How many records a worker prepares and sends together: few, so that all workers have something to do for the first step."""
PREFETCHED = 2
"""How many times so many records each worker has prepared, or is preparing, beside those that were taken."""
SHARED = "/dev/shm"
"""Where Linux keeps memory that processes share; containers often allow little of it."""
LOST = (
    f"a process that prepares records ended before its time, perhaps as the main memory, or {SHARED}, did not suffice; lower train.workers, or set it to 0, "
    "and go on with --resume"
)
FILES = "each few records that are prepared ahead take an open file, and the system allows no more; raise it (ulimit -n), or set train.workers to 0"


def workers(setting: int | None, device: torch.device) -> int:
    """How many processes prepare the records of this one: what the run says, else the cores that training leaves free. On a CPU that is
    none; beside CUDA devices it is each process's share of the machine, less one for the process itself."""
    can_fork = hasattr(os, "fork") and os.uname().sysname != "Darwin" and not multiprocessing.current_process().daemon
    if setting and not can_fork:
        raise GraftworkError(
            "train.workers: this system, or the process that trains, does not start processes as copies of one; leave it out, or set it to 0"
        )
    if setting is not None or device.type != "cuda" or not can_fork:
        return setting or 0
    return min(MAX_WORKERS, max(0, cores() // processes.on_this_machine() - 1))


class Ahead(ThreadPoolExecutor):
    """The one thread that prepares what the loop asks for, in that order."""

    def __init__(self, feed: Feed, device: torch.device) -> None:
        super().__init__(1, "encoder")
        self.feed, self.device = feed, device
        self.workers = workers(feed.settings.workers, device)
        self.parcels: Iterator[Parcel] | None = None
        self.next_batch = 0
        self.forking = Forking()

    def share(self, batch: int) -> Future[Share]:
        """This process's share of a batch, in micro-batches; batches are asked for one after another."""
        return self.submit(self._share, batch)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[arg-type]
        self.parcels = None  # Its processes end with it,
        for process in self.forking.started:
            if process.is_alive():
                process.kill()  # but for one that waits for a file: it would be waited for in turn.

    def _share(self, batch: int) -> Share:
        share = self.feed.share(batch, self._found(batch) if self.workers else None)
        if self.device.type != "cuda":
            return share
        return replace(share, micro_batches=[self._collated(each) for each in share.micro_batches])

    def _collated(self, micro_batch: MicroBatch) -> MicroBatch:
        """The micro-batch with its batch, in memory from which the device copies by itself."""
        import torch

        with torch.cuda.device(self.device):  # A thread's own would be the first one, also of another process.
            batch = batch_of(self.feed.processor, micro_batch.examples, rows=micro_batch.rows)
            return replace(micro_batch, batch=batch.pin_memory())

    def _found(self, batch: int) -> Iterator[tuple[int, Found]]:
        """What workers made of each of the batch's records."""
        try:
            if self.parcels is None or batch != self.next_batch:
                self.parcels = parcels(self.feed, batch, self.workers, self.forking)
            self.next_batch = batch + 1
            for _ in in_parcels(self.feed.indices(batch)):
                yield from next(self.parcels).opened()
        except (RuntimeError, OSError, EOFError) as error:
            if "open files" in str(error):
                raise GraftworkError(FILES) from None
            # One that ends while it hands something over is found by the connection to it.
            is_lost = isinstance(error, (ConnectionError, EOFError)) or str(error).startswith("DataLoader worker")
            if not is_lost:
                raise
            raise GraftworkError(LOST) from None


def in_parcels(indices: Sequence[int]) -> Iterator[list[int]]:
    """The distinct records of a batch, those that are sent together in a list."""
    distinct = [*dict.fromkeys(indices)]
    return (distinct[start : start + TOGETHER] for start in range(0, len(distinct), TOGETHER))


class Forking(multiprocessing.context.ForkContext):
    """Makes copies of this process, and knows which, also those that the system did not start."""

    def __init__(self) -> None:
        self.started: list[Any] = []

    def Process(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """A process that is not started yet."""
        self.started.append(super().Process(*args, **kwargs))
        return self.started[-1]


def parcels(feed: Feed, first: int, workers: int, forking: Forking) -> Iterator[Parcel]:
    """The records of all batches from the `first` on, as `workers` processes prepare them, in order."""
    import resource

    import torch
    from torch.utils.data import DataLoader

    class Records:
        """A data set of what becomes of each record."""

        def __getitem__(self, index: int) -> tuple[int, Found]:
            return index, feed.made(index)

    in_flight = workers * PREFETCHED * processes.on_this_machine()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with warnings.catch_warnings():
        # Python warns of copies of a process with several threads, and torch of more workers than cores.
        warnings.simplefilter("ignore")
        loader: DataLoader[Any] = DataLoader(
            Records(),  # type: ignore[arg-type]
            batch_sampler=(each for batch in count(first) for each in in_parcels(feed.indices(batch))),
            num_workers=workers,
            prefetch_factor=PREFETCHED,
            collate_fn=lambda found: Parcel.of(found, in_flight),
            worker_init_fn=partial(alone, os.getpid()),
            # Copies of this process, for nothing has to be sent to them. They use no CUDA device.
            multiprocessing_context=forking,
            generator=torch.Generator(),  # It draws a seed, which must not be one of the run's random numbers.
        )
        return iter(loader)


def alone(parent: int, worker: int) -> None:
    """Make a worker independent of what this process was: a signal to all processes is for the first to act on, and no threads go on. It ends with
    its parent, also while it waits for somebody to take what it has."""
    processes.end_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@dataclass(frozen=True)
class Parcel:
    """What became of records, with the contents of all tensors in one: each that is sent takes an open file."""

    found: Sequence[tuple[int, Found]]
    """The pixels of an encoded record are places in `content`."""
    content: Any
    """Bytes `[count]`: a tensor, in shared memory; or an array, which is copied, where there is little of that."""

    @classmethod
    def of(cls, found: Sequence[tuple[int, Found]], in_flight: int) -> Parcel:
        """Pack what is found of records; `in_flight` is how many parcels there may be at a time."""
        import torch

        parts, end, packed = [torch.empty(0, dtype=torch.uint8)], 0, list[tuple[int, Found]]()
        for index, each in found:
            if isinstance(each, Encoded):
                places: dict[str, Any] = {}
                for name, tensor in each.pixels.items():
                    size = tensor.numel() * tensor.element_size()
                    parts += [
                        tensor.contiguous().view(-1).view(torch.uint8),
                        torch.empty(-size % 16, dtype=torch.uint8),
                    ]
                    places[name] = (tensor.dtype, tensor.shape, end, end + size)
                    end += size + -size % 16
                each = replace(each, pixels=places)
            packed.append((index, each))
        content = torch.cat(parts)
        fits = Path(SHARED).is_dir() and 2 * in_flight * len(content) < shutil.disk_usage(SHARED).free
        return cls(packed, content if fits else content.numpy())

    def opened(self) -> Iterator[tuple[int, Found]]:
        """What became of each record."""
        import torch

        content = torch.as_tensor(self.content)
        for index, each in self.found:
            if isinstance(each, Encoded):
                places: Any = each.pixels
                pixels = {
                    name: content[begin:end].view(dtype).view(shape)
                    for name, (dtype, shape, begin, end) in places.items()
                }
                each = replace(each, pixels=pixels)
            yield index, each
