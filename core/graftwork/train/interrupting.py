"""SIGTERM and SIGINT: a run ends after the step that it is in, with all that it has saved."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from graftwork import processes

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_SECONDS = 1.0
"""Who signals a process and then its group, as timeout(1) and launchers do, sends one signal twice: so close, both are one."""


class Signals:
    """While entered, the first SIGTERM or SIGINT is noted in `number`; a second one does what it did before.

    Only the main thread gets signals: in any other nothing is changed.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal that came, or 0."""
        self._came = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._came = number, time.monotonic()
        elif time.monotonic() - self._came > SAME_SECONDS or (processes.count() == 1 and number != self.number):
            self.__exit__()
            signal.raise_signal(number)
