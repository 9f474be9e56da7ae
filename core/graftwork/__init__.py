"""Graftwork: train adapters onto vision-language models; the checkpoints always open."""

from graftwork.component import SUPPORTED, Component, NoSettings, Requires, Support, setting, unsupported
from graftwork.errors import GraftworkError
from graftwork.hookspecs import hookimpl
from graftwork.records import BadRecord, Picture, Record, Turn

__version__ = "0.1.0"

__all__ = [
    "SUPPORTED",
    "BadRecord",
    "Component",
    "GraftworkError",
    "NoSettings",
    "Picture",
    "Record",
    "Requires",
    "Support",
    "Turn",
    "hookimpl",
    "setting",
    "unsupported",
]
