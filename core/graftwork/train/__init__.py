"""The training loop: steps, resuming, a process's share, the schedule, the verdict.

`graftwork.train(run)` is `graftwork.jobs.train.train(run)`: Python binds this package where that function belongs, so it is callable.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return import_module("graftwork.jobs.train").train(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage
