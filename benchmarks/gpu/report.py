"""What a check finds, kept in a file after each case, so that an end in the middle loses nothing."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from subject import clean


class Report:
    """The cases of one check."""

    def __init__(self, file: Path, limit: float) -> None:
        """`limit` is for how many seconds the check may go on."""
        self.file, self.ends = file, time.monotonic() + limit
        self.found: dict[str, Any] = {}

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.ends - time.monotonic()

    def take(self, case: str, work: Callable[[], Any], *, needs: float = 0.0) -> Any:
        """Carry out a case, and keep what it returns, or how it failed; it is left out where fewer seconds are left than it `needs`."""
        value = None
        if self.left < needs:
            self.found[case] = {"left out": f"{self.left:.0f} s were left, and it takes {needs:.0f}"}
        else:
            began = time.monotonic()
            try:
                self.found[case] = value = work()
            except Exception as error:  # what a device brings up is what is looked for
                lines = traceback.format_exc().strip().splitlines()
                self.found[case] = {"error": f"{type(error).__name__}: {str(error)[:600]}", "trace": lines[-10:]}
            clean()  # after the error is gone, which holds what its frames had made
            print(f"  {case} ({time.monotonic() - began:.1f} s): {json.dumps(self.found[case])[:400]}", flush=True)
        self.file.write_text(json.dumps(self.found, indent=1))
        return value
