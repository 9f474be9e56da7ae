"""One writer at a time: a lock of the operating system, and a heartbeat that is seen where such a lock is not."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graftwork import processes
from graftwork.errors import CheckpointError

fcntl: Any
try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None

LOCK, WRITER = ".lock", "writer.json"
BEAT_SECONDS = 30.0
SILENT_SECONDS = 600.0
"""Whoever gave no sign of life for so long is taken for dead: twenty heartbeats."""


@dataclass(frozen=True)
class Writer:
    """Who writes into a folder, as `writer.json` says; times are in UTC, in ISO 8601."""

    host: str
    process: int
    start: str
    heartbeat: str

    def __str__(self) -> str:
        return f"process {self.process} on '{self.host}', since {self.start}"

    @property
    def silent(self) -> float:
        """The seconds since its last sign of life, whichever of two machines' clocks is ahead."""
        return abs((datetime.now(UTC) - datetime.fromisoformat(self.heartbeat)).total_seconds())

    def is_same(self, other: Writer | None) -> bool:
        """Whether both are one process."""
        return other is not None and replace(other, heartbeat=self.heartbeat) == self


@contextmanager
def one_writer(
    folder: Path, *, take_over: bool = False, say: Callable[[str], None] = lambda sentence: None
) -> Iterator[None]:
    """While entered, no other command writes into `folder`; CheckpointError, which names the other, if one does already.

    A lock of the operating system reaches all processes of a machine, and ends with its process. Where a folder is shared
    by machines, `writer.json` tells those of the others: one that was silent for ten minutes is stale, and `take_over`
    goes on in spite of it. `say` gets a sentence where there are no locks. Collective: the first process is the writer.
    """
    with ExitStack() as held:
        refusal = None
        if processes.is_first():
            try:
                held.enter_context(_writing(folder, take_over, say))
            except CheckpointError as error:
                refusal = error
            except OSError as error:
                refusal = CheckpointError(f"'{folder}' cannot be written into: {error}; name another folder with --out")
        (refusal, *_) = processes.all_gather_object(refusal)
        if refusal:
            raise refusal
        yield


@contextmanager
def _writing(folder: Path, take_over: bool, say: Callable[[str], None]) -> Iterator[None]:
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock, file = folder / LOCK, folder / WRITER
    try:
        descriptor = _lock_file(lock)
    except BlockingIOError:
        raise CheckpointError(
            f"'{folder}' is being written by {_read(file) or 'another process'}; wait until that has ended, or name another "
            "folder with --out"
        ) from None
    try:
        if why := _refusal(folder, _read(file), take_over, locks=descriptor is not None):
            raise CheckpointError(why)
        if descriptor is None:
            say(f"there are no file locks where '{folder}' is: only '{file}' keeps other commands from writing there")
        now = _now()
        mine = Writer(socket.gethostname(), os.getpid(), now, now)
        _write(file, mine)
        try:
            with beating(lambda: _beat(file, mine)):
                yield
        finally:
            if mine.is_same(_read(file)):
                file.unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            lock.unlink(missing_ok=True)  # While it is held: whoever waits for it sees that it is another file now.
        if descriptor is not None:
            os.close(descriptor)
        if is_new:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def _refusal(folder: Path, found: Writer | None, take_over: bool, *, locks: bool) -> str:
    """Why a folder whose lock is free may not be written into; empty where it may."""
    if found is None:
        return ""
    is_here = found.host == socket.gethostname()
    if is_here and (locks or not _is_running(found.process)):
        return ""  # The system has told that it is gone.
    if found.silent < SILENT_SECONDS:
        return (
            f"'{folder}' is being written by {found}, which gave a sign of life {found.silent:.0f} seconds ago; wait until it "
            f"has ended, or name another folder with --out (if it was killed, its lock is stale in {SILENT_SECONDS / 60:.0f} "
            "minutes)"
        )
    if take_over:
        return ""
    return (
        f"the lock of '{folder}' is stale: {found}, has been silent for {found.silent / 60:,.0f} minutes; if it has ended, go "
        "on with --take-over"
    )


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _beat(file: Path, mine: Writer) -> None:
    if mine.is_same(_read(file)):  # else it was taken over, or removed
        _write(file, replace(mine, heartbeat=_now()))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(file: Path, writer: Writer) -> None:
    work = file.with_name(f".{file.name}.unfinished")
    work.write_text(json.dumps(asdict(writer), indent=1) + "\n", encoding="utf-8")
    work.replace(file)


def _read(file: Path) -> Writer | None:
    """Who a file says writes; None where there is none, or it says nothing that can be understood."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        host, process, start, heartbeat = (content[name] for name in ("host", "process", "start", "heartbeat"))
        if datetime.fromisoformat(heartbeat).tzinfo is None:
            heartbeat += "+00:00"
        return Writer(str(host), int(process), str(start), heartbeat)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lock_file(file: Path) -> int | None:
    """As `lock`, on a file that is made for it and that its owner removes."""
    while True:
        descriptor = lock(file, os.O_RDWR | os.O_CREAT)
        if descriptor is None:
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        os.close(descriptor)  # Its owner removed it meanwhile.


def lock(path: Path, flags: int = os.O_RDONLY) -> int | None:
    """A descriptor that holds the lock of a file or folder until it is closed; None where there are no such locks.

    BlockingIOError where another has it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _locked[descriptor] = os.fstat(descriptor)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # Network file systems may know none, or none of folders.
        os.close(descriptor)
        return None
    return descriptor


_locked: dict[int, os.stat_result] = {}
"""The files of descriptors that hold a lock, or did."""


def _let_go() -> None:
    """Close the locks in a copy of this process, such as prepares records: it would hold them until it ends, which may be later."""
    for descriptor, file in _locked.items():
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), file):
                os.close(descriptor)
    _locked.clear()


if fcntl:
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def beating(beat: Callable[[], None]) -> Iterator[None]:
    """While entered, `beat` is called every half minute by a thread; its OSErrors are not told."""
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(BEAT_SECONDS):
            with suppress(OSError):
                beat()

    thread = threading.Thread(target=go_on, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def is_silent(folder: Path) -> bool:
    """Whether nobody has touched a folder for so long that its writer is taken for dead."""
    return abs(time.time() - folder.stat().st_mtime) >= SILENT_SECONDS
