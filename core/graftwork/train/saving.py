"""Checkpoints written beside training: what they will hold is copied between two steps, and a thread writes it during the next ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from graftwork import processes
from graftwork.checkpoint import store, writing
from graftwork.checkpoint.store import Capture
from graftwork.contracts.events import CheckpointSaved, Event, RunWarned
from graftwork.contracts.lookup import Lookup
from graftwork.errors import GraftworkError


class Saving:
    """Writes one checkpoint at a time, removes the oldest, and tells of each once it has its name.

    Only files are written beside training: what computes, exchanges or tells anything is done by the thread that trains. On leaving, what was
    begun is written to its end.
    """

    def __init__(self, out: Path, keep: int, lookup: Lookup, tell: Callable[[Event], None]) -> None:
        self.out, self.keep, self.lookup, self.tell = out, keep, lookup, tell
        self.step = 0
        """The step whose checkpoint was begun last, or that the run goes on from; 0 where there is none."""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[list[Event]] | None = None
        self._kept_longer = set[Path]()
        """Old checkpoints that cannot be removed."""
        self._rebuilt: object = None
        self._processor: dict[str, bytes] = {}

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._thread.shutdown()
        failure = self._written.exception() if self._written else None
        if isinstance(error, GraftworkError) and failure:
            error.details += (f"besides: {failure}",)
        elif error and failure:
            error.add_note(f"besides: {failure}")

    def begin(self, captured: Capture | None, step: int, folder: Path) -> None:
        """Begin to write the checkpoint `folder` of a step; the one before must have been waited for, so that there are never two copies.
        Raises CheckpointError for what could not be opened. Collective."""
        self.step = step
        self._written = processes.first_alone(lambda: self._begin(captured, step, folder))

    def _begin(self, captured: Capture | None, step: int, folder: Path) -> Future[list[Event]]:
        assert captured, "the first process has it"
        # Once a run: building draws random numbers, which training must not see, and its outcome follows from these alone.
        if (held := (captured.manifest.plan, captured.manifest.tensors)) != self._rebuilt:
            self._processor, self._rebuilt = store.rebuild(captured, folder, self.lookup), held
        return self._thread.submit(self._write, captured, step, folder)

    def _write(self, captured: Capture, step: int, folder: Path) -> list[Event]:
        try:
            store.write(captured, folder, self._processor)
        except GraftworkError:
            raise  # Its sentence names the folder, and so the step.
        except BaseException as error:
            error.add_note(f"while the checkpoint of step {step} was written")
            raise
        return [CheckpointSaved(self.out, step, folder), *self._remove_old()]

    def _remove_old(self) -> Iterator[RunWarned]:
        """Remove what is beyond the checkpoints to keep; one that cannot be removed stays, which is told once."""
        for old in store.checkpoints(self.out)[: -self.keep]:
            try:
                writing.remove(old)
            except OSError as error:
                if old not in self._kept_longer:
                    why = f"'{old}', an old checkpoint, cannot be removed ({error.strerror}); remove it yourself"
                    yield RunWarned(self.out, why)
                self._kept_longer.add(old)

    def poll(self) -> None:
        """Tell of a checkpoint that has got its name meanwhile; raises what it failed with, among several processes once they `wait`. Nothing is
        waited for."""
        if self._written and self._written.done() and (processes.count() == 1 or not self._written.exception()):
            written, self._written = self._written, None
            for event in written.result():
                self.tell(event)

    def wait(self) -> None:
        """Wait until what was begun is written, and tell of it; raises on all processes what it failed with. Collective."""
        written, self._written = self._written, None
        for event in processes.first_alone(lambda: written.result() if written else []) or ():
            self.tell(event)
