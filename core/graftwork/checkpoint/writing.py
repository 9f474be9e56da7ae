"""Folders that appear whole or not at all: written under a hidden name, and renamed when they are complete."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from graftwork.checkpoint import locking
from graftwork.errors import CheckpointError, GraftworkError

UNFINISHED = ".unfinished-"


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` to write into; it is gone afterwards unless it was renamed.

    What a killed command has left beside `folder` goes first.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        with hidden(folder.parent) as work:
            yield work
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise CheckpointError(f"'{folder}' could not be saved: {why}; earlier checkpoints are untouched") from error
    except Exception as error:
        # Libraries in Rust report a full disk in classes of their own (safetensors) or in none (tokenizers).
        if isinstance(error, GraftworkError) or "(os error " not in str(error):
            raise
        raise CheckpointError(f"'{folder}' could not be saved: {error}; earlier checkpoints are untouched") from error


@contextmanager
def hidden(parent: Path) -> Iterator[Path]:
    """A new hidden folder in `parent`, removed afterwards unless it was renamed.

    Its lock, or where there are none its name, which holds the machine's, and its time keep the `sweep` of others away.
    """
    work, descriptor = _make_owned(parent)
    try:
        with locking.beating(lambda: os.utime(work)):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _make_owned(parent: Path) -> tuple[Path, int | None]:
    while True:
        work = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{socket.gethostname()}-", dir=parent))
        with suppress(BlockingIOError, FileNotFoundError):  # Another's sweep was faster than the lock.
            descriptor = locking.lock(work)
            if work.is_dir():
                return work, descriptor
            if descriptor is not None:
                os.close(descriptor)


def sweep(parent: Path) -> None:
    """Remove the hidden folders that killed commands have left in `parent`; none of a process that lives, here or on
    another machine."""
    for left in parent.glob(f"{UNFINISHED}*"):
        try:
            descriptor = locking.lock(left)
        except OSError:
            continue  # Its writer lives; or it is gone, or somebody else's.
        host = left.name.removeprefix(UNFINISHED).rpartition("-")[0]
        with suppress(OSError):
            if (descriptor is not None and host in ("", socket.gethostname())) or locking.is_silent(left):
                shutil.rmtree(left, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


UMASK = os.umask(0)
"""What new files are kept from; asked for once, as the only way to ask changes it for all threads."""
os.umask(UMASK)


def put_in_place(work: Path, folder: Path) -> None:
    """Sync a finished folder to the disk and rename it to its final name; one that has the name makes way first."""
    for path in [*sorted(work.rglob("*"), reverse=True), work]:
        # Temporary folders, and what some libraries write, are private at first; a checkpoint is as public as any file.
        path.chmod((0o777 if path.is_dir() else 0o666) & ~UMASK)
        _sync(path)
    if folder.exists():
        with hidden(folder.parent) as old:
            folder.rename(old / folder.name)
            try:
                work.rename(folder)
            except BaseException:
                (old / folder.name).rename(folder)
                raise
    else:
        work.rename(folder)
    _sync(folder.parent)


def remove(folder: Path) -> None:
    """Remove a checkpoint so that, whenever the process is killed, it has its name and all its files, or no name."""
    with hidden(folder.parent) as old:
        folder.rename(old / folder.name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(file: Path, text: str) -> None:
    """Write a file of text whole or not at all."""
    work = file.with_name(f".{file.name}.unfinished")
    work.write_text(text, encoding="utf-8")
    work.replace(file)
