"""A plan: everything a run was resolved to, in two halves, as plain data that goes into the checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from graftwork.contracts.setting import setting


@dataclass(frozen=True)
class WeightsRef:
    """Where base weights are, and what they must be."""

    given: str
    """As the run file wrote it."""
    path: str
    """The folder, absolute."""
    relative: str = ""
    """The folder relative to the checkpoint that records it, for when both move together."""
    sha256: str = ""
    """Of the tensor files (see `graftwork.weights.fingerprint`); empty until the weights were read."""
    commit: str = ""
    """The hub's commit that the folder is a snapshot of; empty where it is no snapshot."""


@dataclass(frozen=True)
class CheckpointRef:
    """An earlier checkpoint, or the run whose newest one is meant, that a run begins with."""

    given: str
    """As the run file wrote it."""
    path: str
    """The folder, absolute."""


@dataclass(frozen=True)
class Choice:
    """One chosen component with all its settings."""

    kind: str
    name: str
    plugin: str
    distribution: str
    version: str
    settings: dict[str, Any] = field(default_factory=dict)
    settings_version: int = 1
    weights: WeightsRef | None = None
    config: dict[str, Any] | None = None
    """What `Weighted.configuration` returned; None for components that have no weights."""
    folder: str | None = None
    """The folder, absolute, that the configuration was read from: the one of the weights, or one of configurations."""
    coordinates: str = ""
    """Of a data source: what the numbers of its boxes and points count; empty where the run does not say it."""

    @property
    def label(self) -> str:
        """The name, with the plugin where they differ."""
        return self.name if self.plugin == self.name else f"{self.plugin}:{self.name}"


@dataclass(frozen=True)
class ModelSpec:
    """What the trained weights mean; needed to rebuild them."""

    model: Choice
    parts: dict[str, Choice] = field(default_factory=dict)
    peft: Choice | None = None
    on: tuple[str, ...] = ()
    """The roles that the PEFT method adapts."""
    also_train: tuple[str, ...] = ()
    """The roles whose own parameters are trained."""


@dataclass(frozen=True)
class TrainSettings:
    """How a run trains: the `[train]` table."""

    epochs: float = setting(1.0, "Passes over the data; ignored when steps is set", minimum=0.0)
    steps: int | None = setting(None, "Optimizer steps; by default as many as the epochs need", minimum=1)
    batch_size: int = setting(32, "Records for each optimizer step", minimum=1)
    micro_batch_size: int | None = setting(None, "Records for each forward pass; by default batch_size", minimum=1)
    learning_rate: float = setting(2e-4, "The highest learning rate of the schedule", minimum=0.0)
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "How the learning rate falls after warm-up")
    warmup_ratio: float = setting(0.03, "The share of steps in which the learning rate rises", minimum=0.0, maximum=1.0)
    weight_decay: float = setting(
        0.0, "AdamW's decoupled weight decay, of all that is trained but biases and normalisation layers", minimum=0.0
    )
    adam_betas: tuple[float, float] = setting((0.9, 0.999), "AdamW's decay rates of the two moments")
    adam_epsilon: float = setting(1e-8, "AdamW's term for numerical stability", minimum=0.0)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm; 0 for no clipping", minimum=0.0)
    precision: Literal["bf16", "fp32", "fp16"] = setting(
        "bf16", "Of frozen weights and of autocast; trained weights are fp32"
    )
    force_precision: bool = setting(False, "Use a precision in which the model is known to overflow")
    max_length: int = setting(
        2048, "The longest record in tokens, image tokens included; by default no more than the model reads", minimum=1
    )
    too_long: Literal["skip", "cut"] = setting(
        "skip", "What happens to longer records, of which 'cut' loses the answer's end; both are counted and said"
    )
    workers: int | None = setting(
        None,
        "Processes that read and encode records ahead of the steps; by default none on a CPU, and beside a GPU up to 16, one less than the cores",
        minimum=0,
    )
    packing: bool = setting(
        False,
        "Put several records into each row, up to max_length tokens, instead of padding; micro_batch_size then counts rows",
    )
    compile: bool = setting(
        False,
        "Compile the language model's blocks with torch.compile; where that fails, the run says so and goes on without",
    )
    group_by_length: bool = setting(True, "Put records of similar length into one batch")
    allow_unreached: tuple[str, ...] = setting(
        (), "What no gradient needs to reach although it is trained: roles, modules, or patterns such as '*.layers.23'"
    )
    save_every: int | None = setting(None, "Steps between checkpoints; by default only the last is saved", minimum=1)
    keep: int = setting(2, "How many intermediate checkpoints are kept", minimum=1)
    log_every: int = setting(1, "Steps between lines of the log", minimum=1)


TrainOn = Literal["all", "last", "marked"]
"""Which answers carry loss: all that the data does not exclude, the last of each record, or only those that the data marks."""


@dataclass(frozen=True)
class Mix:
    """How many records of a source an epoch takes."""

    weight: float | None = None
    """The share of the epoch's records; None where `repeat` decides."""
    repeat: int = 1
    """How many times each record of the source comes in an epoch."""


@dataclass(frozen=True)
class RunContext:
    """How the trained weights come about; recorded in full, and chosen afresh elsewhere."""

    seed: int = 17
    attention: dict[str, list[Choice]] = field(default_factory=dict)
    """Site to kernels in order of preference; `*` for sites that are not named."""
    memory: list[Choice] = field(default_factory=list)
    candidates: list[list[Choice]] = field(default_factory=list)
    """Memory strategies to choose among, the fastest first; empty where the run leaves no choice."""
    budget: int | None = None
    """The bytes that the run may take of its device; None where the device decides."""
    sources: list[Choice] = field(default_factory=list)
    operators: list[Choice] = field(default_factory=list)
    strict_data: bool = False
    train_on: TrainOn = "all"
    validation: float = 0.0
    """The share of the records that is kept for validation."""
    mix: list[Mix] = field(default_factory=list)
    """How the sources are mixed, one for each; empty where an epoch takes every record once."""
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluate: list[Choice] = field(default_factory=list)
    init_from: CheckpointRef | None = None
    """Whose tensors the trained ones begin with; None where the PEFT method gives them their values."""


@dataclass(frozen=True)
class Plan:
    """A resolved run."""

    model_spec: ModelSpec
    run_context: RunContext = field(default_factory=RunContext)

    def to_json(self) -> dict[str, Any]:
        """As plain data; `from_json` reads it back to an equal plan."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: Any) -> Plan:
        """Read what `to_json` wrote, strictly; CheckpointError with every mistake otherwise."""
        import json

        from pydantic import TypeAdapter, ValidationError

        from graftwork.errors import CheckpointError

        try:
            return TypeAdapter(Plan).validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            mistakes = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise CheckpointError(
                "the plan in this checkpoint is not one that this Graftwork wrote", mistakes
            ) from None


def config_of(choice: Choice) -> Mapping[str, Any]:
    """The configuration that a weighted choice was resolved to."""
    return choice.config or {}


def folder_of(choice: Choice) -> Path | None:
    """The folder of a choice's weights, if it has any."""
    return Path(choice.weights.path) if choice.weights else None
