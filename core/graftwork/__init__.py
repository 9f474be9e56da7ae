"""Graftwork: train adapters onto vision-language models; the checkpoints always open.

The functions and classes of `graftwork.jobs` do what the commands do; they are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graftwork.contracts.component import SUPPORTED, Component, NoSettings, Requires, Support, unsupported
from graftwork.contracts.hookspecs import hookimpl
from graftwork.contracts.records import BadRecord, Image, Record, Turn
from graftwork.contracts.setting import setting
from graftwork.errors import GraftworkError

if TYPE_CHECKING:
    from graftwork.jobs.checkpoint import Checkpoint, open
    from graftwork.jobs.data_card import write_data_card
    from graftwork.jobs.data_check import check_data
    from graftwork.jobs.data_sets import DataSet, export_data, import_data, process_data
    from graftwork.jobs.data_value import value_data
    from graftwork.jobs.demo import demo
    from graftwork.jobs.history import record_history
    from graftwork.jobs.importing import import_folder, inspect
    from graftwork.jobs.planning import plan
    from graftwork.jobs.run import Run, load_run
    from graftwork.jobs.synthesis import synthesize_data
    from graftwork.jobs.train import train

__version__ = "0.1.0"

JOBS = {
    "Checkpoint": "checkpoint",
    "DataSet": "data_sets",
    "Run": "run",
    "check_data": "data_check",
    "demo": "demo",
    "export_data": "data_sets",
    "import_data": "data_sets",
    "import_folder": "importing",
    "inspect": "importing",
    "load_run": "run",
    "open": "checkpoint",
    "plan": "planning",
    "process_data": "data_sets",
    "record_history": "history",
    "synthesize_data": "synthesis",
    "train": "train",
    "value_data": "data_value",
    "write_data_card": "data_card",
}
"""Name to the module of `graftwork.jobs` that has it."""

__all__ = [
    "SUPPORTED",
    "BadRecord",
    "Checkpoint",
    "Component",
    "DataSet",
    "GraftworkError",
    "Image",
    "NoSettings",
    "Record",
    "Requires",
    "Run",
    "Support",
    "Turn",
    "check_data",
    "demo",
    "export_data",
    "hookimpl",
    "import_data",
    "import_folder",
    "inspect",
    "load_run",
    "open",
    "plan",
    "process_data",
    "record_history",
    "setting",
    "synthesize_data",
    "train",
    "unsupported",
    "value_data",
    "write_data_card",
]


def __getattr__(name: str) -> Any:
    if name not in JOBS:
        raise AttributeError(f"module 'graftwork' has no attribute '{name}'")
    return getattr(import_module(f"graftwork.jobs.{JOBS[name]}"), name)
