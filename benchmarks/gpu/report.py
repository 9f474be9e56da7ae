"""What a check finds, kept in the file of all checks after each case, so that an end in the middle loses nothing."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kept
from subject import clean


class Report:
    """The cases of one check."""

    def __init__(self, file: Path, check: str, limit: float) -> None:
        """`limit` is for how many seconds the check may go on; cases that the file has of it already are not carried out again."""
        self.file, self.check, self.ends = file, check, time.monotonic() + limit
        self.found: dict[str, Any] = kept.read(file)["checks"][check]["found"]

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.ends - time.monotonic()

    def has(self, case: str) -> bool:
        """Whether a case was carried out, now or by an earlier call."""
        return case in self.found and not kept.left_out(self.found[case])

    def keep(self, case: str, value: Any) -> None:
        """Write what was found of a case."""
        self.found[case] = value
        kept.update(self.file, self.check, found=self.found)

    def take(self, case: str, work: Callable[[], Any], *, needs: float = 0.0) -> Any:
        """Carry out a case, keep what it returns, or how it failed, and return the former, else None; it is left out where fewer seconds are left than it
        `needs`. Raises SystemExit where the device answers nothing any more."""
        if self.has(case):
            value = self.found[case]
            return None if isinstance(value, dict) and "error" in value else value
        if self.left < needs:
            self.keep(case, {"left out": f"{self.left:.0f} s were left, and it takes {needs:.0f}"})
            return None
        self.keep(case, kept.UNFINISHED)
        value, began = None, time.monotonic()
        try:
            value = work()
            self.keep(case, value)
        except Exception as error:  # what a device brings up is what is looked for
            lines = traceback.format_exc().strip().splitlines()
            self.keep(case, {"error": f"{type(error).__name__}: {str(error)[:600]}", "trace": lines[-10:]})
        print(
            f"  {case} ({time.monotonic() - began:.1f} s): {json.dumps(self.found[case], default=str)[:400]}",
            flush=True,
        )
        try:
            clean()  # after the error is gone, which holds what its frames had made
        except Exception as error:
            self.keep(f"after {case}", {"error": f"the device answers nothing any more: {str(error)[:200]}"})
            raise SystemExit(1) from None
        return value
