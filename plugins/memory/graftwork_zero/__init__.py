"""ZeRO by DeepSpeed: optimizer state, gradients and weights shared out over processes, or kept in main memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import hookimpl
from graftwork.contracts import MemoryStrategy, Requires, setting
from graftwork.errors import GraftworkError

if TYPE_CHECKING:
    from torch import nn

    from graftwork.contracts import Assembly, Plan, Stepper, TrainSettings


@dataclass(frozen=True)
class ZeroSettings:
    """What is shared out, and what is kept in main memory."""

    stage: int | None = setting(
        None, "Share out optimizer state (1), gradients too (2, the default), weights too (3)", minimum=1, maximum=3
    )
    offload_optimizer: bool = setting(False, "Keep the optimizer's state in main memory, and update weights there")
    offload_parameters: bool = setting(False, "Keep weights in main memory until they are needed; stage 3 only")
    config: Path | None = setting(None, "A DeepSpeed configuration in JSON, for everything else; it must fit the run")


class Zero(MemoryStrategy[ZeroSettings]):
    """DeepSpeed's ZeRO: every process keeps a part of the optimizer's state, the gradients and the weights

    The optimizer is PyTorch's AdamW, on a CPU too: DeepSpeed would compile its own when they are first used.
    """

    name = "zero"
    requires = Requires(packages=("deepspeed>=0.19",), install="--no-build-isolation 'deepspeed>=0.19'")
    Settings = ZeroSettings

    def validate(self, plan: Plan) -> Iterable[str]:
        from graftwork_zero import config

        train = plan.run_context.train
        if train.precision == "fp16":
            yield "'zero' does not scale losses, which fp16 needs; set train.precision to 'bf16' or 'fp32'"
        if train.compile:
            yield "compiled blocks were not tried with 'zero', whose engine acts within them; leave train.compile out"
        try:
            given = config.read(self.settings.config)
        except GraftworkError as error:
            yield error.sentence
            return
        yield from config.contradictions(given, self.settings, train)
        if self.settings.offload_parameters and config.stage_of(given, self.settings) < 3:
            yield "only stage 3 can keep weights in main memory; set stage = 3, or leave offload_parameters out"

    def sharder(self, assembly: Assembly) -> Callable[[nn.Module], None] | None:
        from graftwork_zero import config

        if config.stage_of(config.read(self.settings.config), self.settings) < 3:
            return None
        from graftwork_zero.engine import sharder

        return sharder(assembly, self.settings)

    def stepper(self, assembly: Assembly, settings: TrainSettings) -> Stepper:
        from graftwork_zero.engine import Engine

        return Engine(assembly, settings, self.settings)

    def footprint(self, alone: Mapping[str, int], processes: int, assembly: Assembly) -> Mapping[str, int]:
        """Stages 1 and 2 keep all weights on every process. In stage 3 the largest block is whole while it is loaded; what
        DeepSpeed gathers ahead of the module that runs, and its buckets for sending, are not in it."""
        from graftwork_zero import config

        given = config.read(self.settings.config)
        stage = config.stage_of(given, self.settings)
        shared = ["optimizer state", *["gradients"] * (stage > 1), *["frozen weights", "trained weights"] * (stage > 2)]
        away = ["optimizer state"] * config.offloads(given, self.settings, "optimizer")
        away += ["frozen weights", "trained weights"] * config.offloads(given, self.settings, "param")
        kept = {name: -(-size // processes) if name in shared else size for name, size in alone.items()}
        rows = assembly.structure.blocks.values() if stage > 2 and processes > 1 else ()
        blocks = [assembly.model.get_submodule(name) for row in rows for name in row]
        largest = max((sum(parameter.nbytes for parameter in block.parameters()) for block in blocks), default=0)
        return kept | dict.fromkeys(away, 0) | {"temporaries": kept["temporaries"] + largest}

    @contextmanager
    def full_params(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
        if not sharded:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0):
            for parameter in sharded:
                # With one process it is the very memory that the part is kept in, which is written to afterwards.
                parameter.data = parameter.data.clone()
            yield


@hookimpl
def memory_strategies() -> list[type[MemoryStrategy[Any]]]:
    """The strategy of this plugin."""
    return [Zero]
