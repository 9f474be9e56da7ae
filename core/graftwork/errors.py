"""The errors that a person can fix: what was expected, what was found and what to do, in one sentence."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from pathlib import Path


class GraftworkError(Exception):
    """A failure that is not a bug of Graftwork; the command line shows it without a traceback.

    `details` are further facts, one per line, shown indented under the sentence.
    """

    def __init__(self, sentence: str, details: Iterable[str] = ()) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.details = tuple(details)

    def __str__(self) -> str:
        return "\n".join([self.sentence, *(f"  {line}" for line in self.details)])


class RunFileError(GraftworkError):
    """A run file, or a table of settings, that cannot be read; the details hold every mistake with its path."""


class ComponentNotFound(GraftworkError):
    """A component that was requested by name and is not installed, or whose name is not unique."""


class PlanRefused(GraftworkError):
    """A run that cannot work; the details hold every reason."""


class WeightsError(GraftworkError):
    """Weights that are missing, damaged, not the recorded ones, or that do not fit the model."""


class DataError(GraftworkError):
    """A record, image or data set that cannot be used."""


class NoImage(DataError):
    """There is no such image file; a record that names it may be right once there is."""

    def __init__(self, path: Path, hint: str) -> None:
        super().__init__(f"there is no image '{path}'; {hint}")
        self.path = path


class CoordinatesRefused(DataError):
    """Boxes or points that would lie elsewhere in the images that a model gets; a setting of the whole data set is to be mended."""


class NothingLeft(DataError):
    """No record is left of those that were read."""


class NoRoom(DataError):
    """Records cannot be written where they are to be kept."""


class CheckpointError(GraftworkError):
    """A checkpoint that cannot be written, opened or verified."""


class AdapterError(CheckpointError):
    """An adapter whose tensors do not all match, or that changes nothing."""


class RunInterrupted(GraftworkError):
    """A run that a signal ended after a step; `checkpoint` holds all of it, or is None where nothing was there to save."""

    def __init__(self, number: int, step: int, steps: int, checkpoint: Path | None, why: str = "") -> None:
        self.signal, self.checkpoint = signal.Signals(number).name, checkpoint
        self.status = 128 + number
        """The exit status of a command that it ends, by convention."""
        when = f"after step {step:,} of {steps:,}" if step else "before its first step"
        what = f"it is saved as '{checkpoint}'; go on with --resume" if checkpoint else "nothing was there to save"
        super().__init__(f"{self.signal} ended the run {when}; {what}" + f" ({why})" * bool(why))


class UnhealthyRun(GraftworkError):
    """A training run that ended, and whose result no one should use."""
