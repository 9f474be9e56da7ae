"""Logs for TensorBoard in the run's folder `tensorboard`: loss, learning rate, gradients, speed, scores, the verdict.

It has no component: it observes. It needs the package `tensorboard`, which `pip install 'graftwork[tensorboard]'` brings.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork import hookimpl

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from graftwork.contracts import Event

_writers: dict[Path, SummaryWriter] = {}
"""The open writer of each run's folder."""


@hookimpl
def happened(event: Event) -> None:
    """Write what the event says; the files are complete after an evaluation and when the run ends."""
    from graftwork.contracts import Evaluated, RunEnded, RunStopped, StepTaken

    if not isinstance(event, StepTaken | Evaluated | RunEnded | RunStopped) or not _is_installed():
        return
    writer = _writer(event.out)
    match event:
        case StepTaken():
            writer.add_scalar("train/loss", event.loss, event.step)
            writer.add_scalar("train/learning_rate", event.learning_rate, event.step)
            writer.add_scalar("train/gradient_norm", event.gradient_norm, event.step)
            writer.add_scalar("speed/tokens_per_second", event.tokens / event.seconds, event.step)
            writer.add_scalar("speed/images_per_second", event.images / event.seconds, event.step)
            return
        case Evaluated():
            for variant, scores in event.scores.items():
                for name, value in scores.items():
                    writer.add_scalar(f"{event.evaluator}/{name}/{variant}", value)
        case RunEnded():
            verdict = "healthy" if event.healthy else f"{event.failure}: {'; '.join(event.reasons)}"
            writer.add_text("verdict", verdict, event.step)
    _writers.pop(event.out).close()


def _writer(out: Path) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    if out not in _writers:
        _writers[out] = SummaryWriter(str(out / "tensorboard"), flush_secs=10)
    return _writers[out]


@cache
def _is_installed() -> bool:
    """Whether the package is here; says so once when it is not."""
    found = find_spec("tensorboard") is not None
    if not found:
        logging.getLogger(__name__).warning(
            "no TensorBoard logs are written, as the package is missing: pip install 'graftwork[tensorboard]'"
        )
    return found
