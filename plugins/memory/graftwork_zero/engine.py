"""Training steps by a DeepSpeed engine, which is kept quiet and from compiling anything."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import processes
from graftwork.contracts import Stepper, summed_loss
from graftwork.errors import GraftworkError, PlanRefused
from graftwork_zero import config

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graftwork.contracts import Assembly, Batch, TrainSettings
    from graftwork_zero import ZeroSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Stepper):
    """Steps of DeepSpeed: its gradients, its clipping, and PyTorch's AdamW on what each process keeps."""

    reduces_gradients = True
    needs_equal_micro_batches = True
    zero_is_unreached = True

    def __init__(self, assembly: Assembly, settings: TrainSettings, zero: ZeroSettings) -> None:
        import torch

        super().__init__(assembly, settings)
        self.norms = torch.zeros(len(self.parameters))
        if type(self.optimizer) is not torch.optim.AdamW:
            raise PlanRefused(
                f"'zero' shares out the state of AdamW, and another memory strategy brings {type(self.optimizer).__name__}; "
                "use one or the other"
            )
        given = config.read(zero.config)
        if clause := config.steps_contradiction(given, zero, settings, processes.count()):
            raise PlanRefused(clause)
        deepspeed = start_deepspeed(assembly)
        self.adamw: Any = self.optimizer
        with configuring(zero):
            self.engine, self.optimizer, *_ = deepspeed.initialize(
                model=running_inside(assembly.model),
                optimizer=self.adamw,
                config=config.combined(given, zero, settings),
                dist_init_required=False,
            )
        self.updated = False
        assembly.run_forward = self.engine

    def accumulate(self, batch: Batch, num_label_tokens: float, *, last: bool = True) -> Tensor:
        return self.backward(batch, num_label_tokens, last)

    def backward(self, batch: Batch, num_label_tokens: float, last: bool) -> Tensor:
        """Forward and backward by the engine; returns this process's share of the loss."""

        def compute() -> Tensor:
            with self.assembly.autocast():
                return summed_loss(self.assembly.model, batch, self.assembly.cross_entropy) / (num_label_tokens or 1)

        self.engine.set_gradient_accumulation_boundary(last)
        loss: Tensor = self.engine(compute)
        # DeepSpeed averages over processes, and each loss is divided by the labels of all of them already.
        self.engine.backward(loss * processes.count())
        return loss.detach()

    def reached(self, batch: Batch) -> frozenset[str]:
        # The engine fills in zeros where there is no gradient, so the values must tell.
        self.backward(batch, 1.0, last=True)
        self.gradient_norm()
        self.clear()
        return frozenset(name for name, norm in zip(self.parameters, self.norms.tolist(), strict=True) if norm)

    def gradient_norms(self) -> Tensor:
        return self.norms

    def gradient_norm(self) -> Tensor:
        import torch
        from deepspeed.utils import safe_get_full_grad

        self.norms = torch.stack([safe_get_full_grad(parameter).norm() for parameter in self.parameters.values()])
        norm: Tensor = self.norms.norm()
        return norm

    def update(self) -> None:
        self.engine.step()
        self.updated = True

    def clear(self) -> None:
        if not self.updated:
            from deepspeed.utils import safe_set_full_grad

            # DeepSpeed drops a step with a gradient that is not finite itself, with all that it has gathered.
            largest = int(self.norms.nan_to_num(math.inf).argmax())
            parameter = list(self.parameters.values())[largest]
            safe_set_full_grad(parameter, parameter.new_full(shape_of(parameter), math.inf))
            # With an offloaded optimizer it does not look at them again, but at the norms that it noted when they came.
            for noted in getattr(self.optimizer, "norm_for_param_grads", {}).values():
                noted.fill_(math.inf)
            self.engine.step()
        self.updated = False

    def state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self.link_moments()
        state = {}
        for values in list(self.adamw.state.values())[:1]:  # none before the first step; they all count the same steps
            for name, parameter in self.parameters.items():
                state[f"{name}/step"] = values["step"].cpu().clone()
                for key in MOMENTS:
                    state[f"{name}/{key}"] = (
                        safe_get_full_optimizer_state(parameter, key).to("cpu", copy=True).contiguous()
                    )
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        import torch

        steps = [value for key, value in state.items() if key.endswith("/step")]
        if not steps:
            return
        optimizer: Any = self.optimizer
        sharded = hasattr(optimizer, "fp32_partitioned_groups_flat")
        for flat in optimizer.fp32_partitioned_groups_flat if sharded else optimizer.single_partition_of_fp32_groups:
            self.adamw.state[flat] = {"step": max(steps).clone(), **{key: torch.zeros_like(flat) for key in MOMENTS}}
        self.link_moments()
        for name, parameter in self.parameters.items():
            for key in MOMENTS:
                if (value := state.get(f"{name}/{key}")) is not None:
                    set_moment(parameter, key, value.to(self.assembly.device))

    def link_moments(self) -> None:
        """In stages 1 and 2, let parameters know their places in the moments of their groups.

        DeepSpeed does so after the first update of the first group, when those of the others do not exist yet.
        """
        optimizer: Any = self.optimizer
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()


def sharder(assembly: Assembly, zero: ZeroSettings) -> Callable[[nn.Module], None]:
    """What leaves of a module's weights this process's part, as stage 3 keeps them."""
    settings = config.combined(config.read(zero.config), zero, assembly.plan.run_context.train)

    def shard(module: nn.Module) -> None:
        if packed := next((n for n, p in assembly.model.named_parameters() if not p.is_floating_point()), None):
            raise PlanRefused(
                f"'zero' shares out floating-point weights in stage 3, and '{packed}' is quantised; use stage 2"
            )
        with configuring(zero):
            start_deepspeed(assembly).zero.Init(module=module, config_dict_or_path=settings)

    return shard


def set_moment(parameter: Any, key: str, value: Tensor) -> None:
    """Put this process's part of a moment of AdamW where DeepSpeed keeps it."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not hasattr(parameter, "ds_id"):
        safe_set_full_optimizer_state(parameter, value, key)
        return
    # Parts are equally long, and the last one is filled up; DeepSpeed's own way to set a whole tensor forgets that.
    size = parameter.ds_tensor.numel()
    filled = value.new_zeros(size * processes.count())
    filled[: value.numel()] = value.flatten()
    safe_set_local_optimizer_state(parameter, filled[size * processes.rank() :][:size], key)


def running_inside(model: nn.Module) -> nn.Module:
    """A module around `model` whose forward runs what it is given: DeepSpeed fetches weights only within a forward."""
    from torch import nn

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, work: Callable[[], Any]) -> Any:
            return work()

    return Inside()


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter, of which a process may have a part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def start_deepspeed(assembly: Assembly) -> Any:
    """DeepSpeed, which finds a group of processes and a device."""
    processes.ensure_group(assembly.device)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists, and by it chooses the device
    return import_deepspeed()


@contextmanager
def configuring(zero: ZeroSettings) -> Iterator[None]:
    """While entered, DeepSpeed is quiet, and what it does not know in a configuration is refused."""
    try:
        with quiet():
            yield
    except ValueError as error:  # pydantic's
        raise PlanRefused(
            f"DeepSpeed refuses the configuration '{zero.config}'; correct it", str(error).splitlines()[:4]
        ) from error


def import_deepspeed() -> Any:
    """DeepSpeed, which says nothing below an error, and refuses to compile."""
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with quiet():
        import deepspeed
        from deepspeed.ops.op_builder.builder import OpBuilder

        deepspeed.utils.logger.setLevel(logging.ERROR)
        # Messages between CPUs go through gloo; DeepSpeed would compile a way through shared memory.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    OpBuilder.jit_load = refuse_to_compile
    return deepspeed


@contextmanager
def quiet() -> Iterator[None]:
    """While entered, nothing is logged below an error, and nothing warned of: DeepSpeed tells what it finds and does."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def refuse_to_compile(builder: Any, verbose: bool = True) -> Any:
    """Stands in for DeepSpeed's compilation at run time, which takes minutes and waits for ever on a killed one's lock."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    locks = [f"a compilation that was killed, or is running, holds '{lock}'" for lock in folder.glob("**/lock")]
    raise GraftworkError(
        f"DeepSpeed wants to compile its '{builder.name}'; leave out of its configuration what needs that, or install "
        f"DeepSpeed with DS_BUILD_{builder.name.upper()}=1",
        locks,
    )
