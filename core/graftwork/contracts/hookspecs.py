"""The nine hooks: eight that return component classes, one that observes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from graftwork.contracts.data import DataOperator, DataSource
    from graftwork.contracts.events import Event
    from graftwork.contracts.kinds import (
        AttentionKernel,
        Evaluator,
        MemoryStrategy,
        ModelArchitecture,
        PeftMethod,
        VisionTower,
    )

hookspec = pluggy.HookspecMarker("graftwork")
hookimpl = pluggy.HookimplMarker("graftwork")


@hookspec
def model_architectures() -> Iterable[type[ModelArchitecture[Any]]]:  # type: ignore[empty-body]
    """Vision-language models. Called once when the plugin is loaded; must not import torch."""


@hookspec
def vision_towers() -> Iterable[type[VisionTower[Any]]]:  # type: ignore[empty-body]
    """Vision towers. Called once when the plugin is loaded; must not import torch."""


@hookspec
def peft_methods() -> Iterable[type[PeftMethod[Any]]]:  # type: ignore[empty-body]
    """Ways of training few parameters. Called once when the plugin is loaded; must not import torch."""


@hookspec
def memory_strategies() -> Iterable[type[MemoryStrategy[Any]]]:  # type: ignore[empty-body]
    """Ways of saving memory. Called once when the plugin is loaded; must not import torch."""


@hookspec
def attention_kernels() -> Iterable[type[AttentionKernel[Any]]]:  # type: ignore[empty-body]
    """Implementations of attention. Called once when the plugin is loaded; must not import torch."""


@hookspec
def evaluators() -> Iterable[type[Evaluator[Any]]]:  # type: ignore[empty-body]
    """Benchmarks. Called once when the plugin is loaded; must not import torch."""


@hookspec
def data_sources() -> Iterable[type[DataSource[Any]]]:  # type: ignore[empty-body]
    """Readers of training data. Called once when the plugin is loaded; must not import torch."""


@hookspec
def data_operators() -> Iterable[type[DataOperator[Any]]]:  # type: ignore[empty-body]
    """Filters and makers of training data. Called once when the plugin is loaded; must not import torch."""


@hookspec
def happened(event: Event) -> None:
    """Something happened in a run (see `graftwork.contracts.events`). An observer that raises is muted and reported."""
