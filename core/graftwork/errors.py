"""The errors that a person can fix: what was expected, what was found and what to do, in one sentence."""

from __future__ import annotations

from collections.abc import Iterable


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


class CheckpointError(GraftworkError):
    """A checkpoint that cannot be written, opened or verified."""


class AdapterError(CheckpointError):
    """An adapter whose tensors do not all match, or that changes nothing."""


class UnhealthyRun(GraftworkError):
    """A training run that ended, and whose result no one should use."""
