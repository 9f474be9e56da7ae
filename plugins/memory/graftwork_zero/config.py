"""A DeepSpeed configuration: what it may say, whether it fits the run, and what the engine gets of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.errors import GraftworkError

if TYPE_CHECKING:
    from graftwork.contracts import TrainSettings
    from graftwork_zero import ZeroSettings

AUTO = "auto"
"""What Hugging Face's configurations write for values that the run decides."""
OF_THE_RUN = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "fp16", "bf16", "zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer"),
)
"""The keys that must agree with the run, and then say nothing new."""
PASSED_ON = (
    *("zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler"),
)
"""The keys that the engine gets as they are."""


def read(file: Path | None) -> dict[str, Any]:
    """The configuration of a file; GraftworkError when it is none."""
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GraftworkError(f"'{file}' cannot be read as JSON ({error}); correct the path or the file") from None
    if not isinstance(found, dict):
        raise GraftworkError(f"'{file}' holds no JSON object; write one, as DeepSpeed's documentation says")
    return found


def contradictions(given: Mapping[str, Any], zero: ZeroSettings, train: TrainSettings) -> Iterator[str]:
    """What a configuration says against the run, a clause each."""
    file = f"'{zero.config}'"
    for key in given.keys() - {*OF_THE_RUN, *PASSED_ON}:
        yield f"{file} has '{key}', which is not about memory or is the run's to say; leave it out"
    wanted = {
        "train_batch_size": ("train.batch_size", train.batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", train.micro_batch_size),
        "gradient_clipping": ("train.max_grad_norm", train.max_grad_norm),
        "bf16.enabled": ("train.precision", train.precision == "bf16"),
        "fp16.enabled": ("train.precision", train.precision == "fp16"),
        "optimizer.params.lr": ("train.learning_rate", train.learning_rate),
        "optimizer.params.betas": ("train.adam_betas", list(train.adam_betas)),
        "optimizer.params.eps": ("train.adam_epsilon", train.adam_epsilon),
        "optimizer.params.weight_decay": ("train.weight_decay", train.weight_decay),
    }
    if zero.stage is not None:
        wanted["zero_optimization.stage"] = ("memory.zero.stage", zero.stage)
    for key, (name, value) in wanted.items():
        if (found := at(given, key)) not in (None, AUTO, value):
            wanted_value = train.precision if name == "train.precision" else value
            yield f"{file} says {key} = {shown(found)}, and {name} is {shown(wanted_value)}; make them agree, or leave it out"
    optimizer = at(given, "optimizer.type")
    if optimizer not in (None, AUTO, "AdamW", "Adam") or at(given, "optimizer.params.adam_w_mode") is False:
        yield f"{file} asks for the optimizer {shown(optimizer)}, and a run trains with AdamW; leave it out"
    for kind in ("offload_optimizer", "offload_param"):
        if (device := at(given, f"zero_optimization.{kind}.device")) not in (None, "none", "cpu"):
            yield f"{file} has {kind} to {shown(device)}, for which DeepSpeed compiles; use 'cpu'"


def steps_contradiction(given: Mapping[str, Any], zero: ZeroSettings, train: TrainSettings, processes: int) -> str:
    """What a configuration says against the number of micro-batches that each process gets; empty if nothing."""
    share = -(-train.batch_size // processes)
    steps = -(-share // (train.micro_batch_size or share))
    if given.get("gradient_accumulation_steps", AUTO) in (AUTO, steps):
        return ""
    return (
        f"'{zero.config}' says gradient_accumulation_steps = {shown(given['gradient_accumulation_steps'])}, and each of "
        f"{processes} processes has {steps} micro-batches of a step; make them agree, or leave it out"
    )


def offloads(given: Mapping[str, Any], zero: ZeroSettings, kind: str) -> bool:
    """Whether the `optimizer`'s state, or the `param`eters, are to be kept in main memory."""
    asked = zero.offload_optimizer if kind == "optimizer" else zero.offload_parameters
    return asked or at(given, f"zero_optimization.offload_{kind}.device") == "cpu"


def stage_of(given: Mapping[str, Any], zero: ZeroSettings) -> int:
    """The stage that is meant: the setting's, the file's, or 2."""
    found = at(given, "zero_optimization.stage")
    return zero.stage or (found if isinstance(found, int) else 2)


def combined(given: Mapping[str, Any], zero: ZeroSettings, train: TrainSettings) -> dict[str, Any]:
    """The engine's configuration. Micro-batches, precision and the optimizer are Graftwork's, so it is not told of them."""
    table = given.get("zero_optimization", {})
    sharing = {key: value for key, value in table.items() if value != AUTO} | {"stage": stage_of(given, zero)}
    for wanted, key in ((zero.offload_optimizer, "offload_optimizer"), (zero.offload_parameters, "offload_param")):
        if wanted:
            sharing[key] = {**sharing.get(key, {}), "device": "cpu"}
    return {
        **{key: value for key, value in given.items() if key in PASSED_ON and value != AUTO},
        "zero_optimization": sharing,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "zero_force_ds_cpu_optimizer": False,
    }


def at(table: Any, dotted: str) -> Any:
    """The value at a dotted path; None where there is none."""
    for key in dotted.split("."):
        table = table.get(key) if isinstance(table, Mapping) else None
    return table


def shown(value: Any) -> str:
    """A value as JSON writes it."""
    return json.dumps(value)
