"""Graftwork: train adapters onto vision-language models; the checkpoints always open."""

from graftwork.contracts.component import SUPPORTED, Component, NoSettings, Requires, Support, unsupported
from graftwork.contracts.hookspecs import hookimpl
from graftwork.contracts.records import BadRecord, Image, Record, Turn
from graftwork.contracts.setting import setting
from graftwork.errors import GraftworkError

__version__ = "0.1.0"

__all__ = [
    "SUPPORTED",
    "BadRecord",
    "Component",
    "GraftworkError",
    "Image",
    "NoSettings",
    "Record",
    "Requires",
    "Support",
    "Turn",
    "hookimpl",
    "setting",
    "unsupported",
]
