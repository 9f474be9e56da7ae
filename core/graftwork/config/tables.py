"""The keys of a run file's tables that are the engine's own, beside those of components."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from graftwork.config.sizes import parse_size
from graftwork.contracts import setting
from graftwork.contracts.coordinates import Coordinates
from graftwork.contracts.plan import TrainOn
from graftwork.errors import GraftworkError


@dataclass(frozen=True)
class RunTable:
    """The keys outside all tables."""

    seed: int = setting(17, "Seeds all that is random: new weights, data order, dropout", minimum=0, maximum=2**32 - 1)
    out: Path | None = setting(None, "The folder to write to; by default NAME-out beside the run file NAME.toml")


@dataclass(frozen=True)
class ModelTable:
    """The keys of `[model]` beside the model's settings."""

    use: str = field(metadata={"help": "The model architecture"})
    weights: str | None = setting(None, "The base weights: a folder, or a Hugging Face hub id, owner/name[@revision]")
    config: str | None = setting(None, "A folder or hub id to take the configuration from; by default that of weights")


@dataclass(frozen=True)
class PartTable:
    """The keys of `[model.parts.PART]` beside the tower's settings."""

    use: str = setting("", "The vision tower; by default the model's choice; 'none' leaves an optional part empty")
    weights: str | None = setting(
        None, "The tower's weights: a folder, or a Hugging Face hub id, owner/name[@revision]"
    )
    config: str | None = setting(None, "A folder or hub id to take the configuration from; by default that of weights")


@dataclass(frozen=True)
class PeftTable:
    """The keys of `[peft]` beside the method's settings."""

    use: str | None = setting(None, "The PEFT method; only also_train may do without one")
    on: tuple[str, ...] = setting(
        (), "The roles of the model that the method adapts; 'language' means all 'language.*'"
    )
    also_train: tuple[str, ...] = setting((), "The roles whose own parameters are trained as well")
    init_from: str | None = setting(
        None,
        "A checkpoint, or the folder of a run, whose trained tensors this run begins with; everything else begins anew",
    )


@dataclass(frozen=True)
class AttentionTable:
    """The keys of `[attention]`."""

    prefer: tuple[str, ...] = setting((), "Kernels in order of preference; by default all that are installed")
    sites: dict[str, tuple[str, ...]] = setting({}, "The same for single sites, such as 'language' or 'vision.low'")


@dataclass(frozen=True)
class MemoryTable:
    """The keys of `[memory]`; the settings of a strategy are in `[memory.NAME]`."""

    use: tuple[str, ...] = setting((), "The memory strategies, in order")
    try_: tuple[tuple[str, ...], ...] = setting(
        (), "Lists of strategies, the fastest first; the first that fits the budget is used, instead of use"
    )
    budget: str | None = setting(
        None, "The memory that a run may take of its device, such as '24 GiB'; by default what the device has"
    )

    def __post_init__(self) -> None:
        if self.use and self.try_:
            raise ValueError("'use' and 'try' exclude each other; keep one of them")
        if self.budget is not None:
            try:
                parse_size(self.budget)
            except GraftworkError as error:
                raise ValueError(f"budget: {error}") from None


@dataclass(frozen=True)
class DataTable:
    """The keys of `[data]`; sources and operators are in `[[data.source]]` and `[[data.operator]]`."""

    strict: bool = setting(False, "Stop at the first record that a source cannot read; by default they are counted")
    train_on: TrainOn = setting(
        "all", "The answers that carry loss: all that the data does not exclude, the last, or those that the data marks"
    )
    validation: float = setting(
        0.0, "The share of records, with all that are about the same images, that is kept for validation", maximum=0.5
    )

    def __post_init__(self) -> None:
        if self.validation < 0:
            raise ValueError(f"'validation' is {self.validation}; give a share from 0 to 0.5")


@dataclass(frozen=True)
class OperatorTable:
    """The keys of `[[data.operator]]` beside the operator's settings."""

    use: str = field(metadata={"help": "The data operator"})


@dataclass(frozen=True)
class SourceTable:
    """The keys of `[[data.source]]` beside the source's settings."""

    use: str = field(metadata={"help": "The data source"})
    weight: float | None = setting(
        None, "The share of an epoch's records that comes from this source; by default as many as it has"
    )
    repeat: int = setting(1, "How many times an epoch takes each of its records", minimum=1, maximum=100)
    license: str | None = setting(None, "The licence of its data as their owner gives it, for the data card")
    coordinates: Coordinates | None = setting(
        None,
        "What boxes and points in its texts count: pixels of the image's file, shares of its sides, or nothing of it",
    )

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"'weight' is {self.weight}; give a share, such as 0.3")
        if self.weight is not None and self.repeat != 1:
            raise ValueError("'weight' and 'repeat' exclude each other; keep one of them")


@dataclass(frozen=True)
class EndpointTable:
    """The keys of `[writer.endpoint]`: a server with OpenAI's interface for chat completions."""

    url: str = setting("", "Its base address, such as http://127.0.0.1:8000/v1")
    model: str = setting("", "The model that it is asked for")
    key_from: str | None = setting(None, "The environment variable that holds its key; by default none is sent")
    temperature: float = setting(0.0, "How far it draws its words; 0 takes the likeliest", minimum=0, maximum=2)
    top_p: float = setting(
        1.0, "The likeliest words that it draws from, by their summed probability", minimum=0, maximum=1
    )
    limit_field: Literal["max_tokens", "max_completion_tokens"] = setting(
        "max_tokens", "The field that limits the tokens of a reply; OpenAI's newer models take only the second"
    )
    extra: dict[str, Any] = setting({}, "Further fields of each request, such as those that only this server knows")
    concurrency: int = setting(4, "How many requests are under way at a time", minimum=1, maximum=256)
    timeout: float = setting(120.0, "Seconds after which an attempt is given up", minimum=0.1)
    retries: int = setting(
        4, "How often a request is sent again, later each time, after 429, 5xx or no answer", minimum=0
    )
    give_up_after: int = setting(10, "How many requests in a row may fail before the work stops", minimum=1)
    price: tuple[float, float] | None = setting(
        None, "What a million tokens cost that it reads, and that it writes, in any currency", minimum=0
    )


@dataclass(frozen=True)
class WriterTable:
    """The keys of `[writer]` and `[verify.writer]` beside the tables `model` and `endpoint`; one of the three is named."""

    checkpoint: Path | None = setting(None, "A checkpoint, or the folder of a run, whose newest one answers")
    variant: Literal["adapter", "base"] = setting("adapter", "Whether a checkpoint answers with its adapter or without")
    precision: Literal["bf16", "fp32", "fp16"] | None = setting(
        None, "What a model on this machine computes in; by default as a checkpoint was trained, and bf16 else"
    )
    batch_size: int = setting(16, "How many prompts a model on this machine answers at a time", minimum=1)


@dataclass(frozen=True)
class VerifyTable:
    """The keys of `[verify]` beside the verifier's settings and the table `writer`."""

    use: str = field(metadata={"help": "The data operator that verifies"})


@dataclass(frozen=True)
class CardTable:
    """The keys of `[card]`: what only a person can say of a data set."""

    title: str | None = setting(None, "What the data set is called; by default as its folder is")
    description: str = setting("", "What it is for, and who made it")
    license: str | None = setting(None, "The licence that it is given away under")
    not_for: tuple[str, ...] = setting((), "What it must not be used for, beside what follows from how it was made")


@dataclass(frozen=True)
class EvaluateTable:
    """The keys of `[evaluate]`; the settings of an evaluator are in `[evaluate.NAME]`."""

    on: tuple[str, ...] = setting((), "The evaluators, each at most once")
