"""Fully sharded data-parallel training, by PyTorch's FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graftwork import NoSettings, hookimpl, processes
from graftwork.contracts import MemoryStrategy, Stepper
from graftwork.errors import PlanRefused
from graftwork.processes import sum_over_processes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graftwork.contracts import Assembly, Plan, TrainSettings


class Fsdp(MemoryStrategy[NoSettings]):
    """Every process keeps a part of each block's weights, and fetches the rest while the block runs (FSDP2)

    What lies outside the repeated blocks, such as the embedding, is whole on every process. Weights travel in the precision
    that they are kept in, and are computed with as autocast demands.
    """

    name = "fsdp"

    def validate(self, plan: Plan) -> Iterable[str]:
        if plan.run_context.train.precision == "fp16":
            yield "'fsdp' does not scale losses, which fp16 needs; set train.precision to 'bf16' or 'fp32'"
        if plan.run_context.train.compile:
            yield "compiled blocks were not tried with 'fsdp', which gathers their weights; leave train.compile out"

    def sharder(self, assembly: Assembly) -> Callable[[nn.Module], None]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        processes.ensure_group(assembly.device)
        mesh = init_device_mesh(assembly.device.type, (processes.count(),))
        self.model = assembly.model
        blocks = {self.model.get_submodule(n): n for names in assembly.structure.blocks.values() for n in names}

        def shard(module: nn.Module) -> None:
            if module in blocks:
                if packed := next((n for n, p in module.named_parameters() if not p.is_floating_point()), None):
                    raise PlanRefused(
                        f"'fsdp' shards floating-point weights, and '{blocks[module]}.{packed}' is quantised; use one or the other"
                    )
                fully_shard(module, mesh=mesh, reshard_after_forward=True)

        return shard

    def stepper(self, assembly: Assembly, settings: TrainSettings) -> Stepper:
        return ShardedStepper(assembly, settings)

    def footprint(self, alone: Mapping[str, int], processes: int, assembly: Assembly) -> Mapping[str, int]:
        """Blocks are shared out, and the largest of them is whole while it runs."""
        names = [name for row in assembly.structure.blocks.values() for name in row]
        blocks = [list(assembly.model.get_submodule(name).parameters()) for name in names]
        inside = {id(parameter): parameter for block in blocks for parameter in block}.values()
        frozen = sum(parameter.nbytes for parameter in inside if not parameter.requires_grad)
        trained = sum(parameter.nbytes for parameter in inside if parameter.requires_grad)
        elsewhere = 1 - 1 / processes
        # Gradients and the optimizer's state are spread over parameters as the trained weights are.
        share = elsewhere * trained / max(1, alone["trained weights"])
        kept = {name: round(alone[name] * (1 - share)) for name in ("trained weights", "gradients", "optimizer state")}
        largest = max((sum(parameter.nbytes for parameter in block) for block in blocks), default=0)
        kept["frozen weights"] = round(alone["frozen weights"] - frozen * elsewhere)
        return {**alone, **kept, "temporaries": alone["temporaries"] + (largest if processes > 1 else 0)}

    @contextmanager
    def full_params(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        import torch
        from torch.distributed.tensor import DTensor

        wanted = {id(parameter) for parameter in parameters}
        replaced = []
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if isinstance(parameter, DTensor) and id(parameter) in wanted:
                    values: Any = parameter.detach()
                    full = torch.nn.Parameter(values.full_tensor(), requires_grad=parameter.requires_grad)
                    replaced.append((module, name, parameter, full))
        for module, name, _, full in replaced:
            module._parameters[name] = full
        try:
            yield
        finally:
            for module, name, parameter, full in replaced:
                module._parameters[name] = parameter
                kept: Any = parameter.detach()
                kept.to_local().copy_(part_of(full.detach()))


class ShardedStepper(Stepper):
    """Plain steps on what each process keeps: parts of the blocks, and all of the rest."""

    reduces_gradients = True
    needs_equal_micro_batches = True

    def __init__(self, assembly: Assembly, settings: TrainSettings) -> None:
        import torch

        super().__init__(assembly, settings)
        if type(self.optimizer) is not torch.optim.AdamW:
            raise PlanRefused(
                f"'fsdp' shards the state of AdamW, and another memory strategy brings {type(self.optimizer).__name__}; use one "
                "or the other"
            )

    def _groups(self) -> list[dict[str, Any]]:
        # An optimizer may take a group's tensors all at once, and then they must be of one kind.
        split = []
        for group in super()._groups():
            for kind in (True, False):
                if chosen := [parameter for parameter in group["params"] if is_sharded(parameter) is kind]:
                    split.append({**group, "params": chosen})
        return split

    def gradient_norm(self) -> Tensor:
        import torch

        gradients: list[Any] = self.gradients()
        parts = [gradient.to_local() for gradient in gradients if is_sharded(gradient)]
        wholes = [gradient for gradient in gradients if not is_sharded(gradient)]
        for part in parts:
            # FSDP2 averages, and each loss is divided by the labels of all processes already.
            part.mul_(processes.count())
        sum_over_processes(wholes)
        squares = sum((part.square().sum() for part in parts), torch.zeros((), device=self.assembly.device))
        torch.distributed.all_reduce(squares)
        norm: Tensor = sum((each.square().sum() for each in wholes), squares).sqrt()
        if self.settings.max_grad_norm:
            scale = (self.settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in [*parts, *wholes]:
                gradient.mul_(scale)
        return norm

    def gradient_norms(self) -> Tensor:
        import torch

        gradients: list[Any] = self.gradients()
        sharded = torch.tensor([is_sharded(each) for each in gradients], device=self.assembly.device)
        parts = [each.to_local() if is_sharded(each) else each for each in gradients]
        squares = torch.stack([part.square().sum() for part in parts])
        # Only of what is shared out does each process have a part.
        sums = squares * sharded
        torch.distributed.all_reduce(sums)
        return torch.where(sharded, sums, squares).sqrt()

    def unshard(self, value: Tensor) -> Tensor:
        sharded: Any = value
        full: Tensor = sharded.full_tensor() if is_sharded(value) else value
        return full

    def shard(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        from torch.distributed.tensor import DTensor

        value = value.to(parameter.device)
        if not isinstance(parameter, DTensor):
            return value
        return DTensor.from_local(
            part_of(value).clone(),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only a part of a tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def part_of(full: Tensor) -> Tensor:
    """The rows of a tensor that FSDP2 gives to this process, which may be none."""
    rows = full.chunk(processes.count())
    return rows[processes.rank()] if processes.rank() < len(rows) else full[:0]


@hookimpl
def memory_strategies() -> list[type[MemoryStrategy[Any]]]:
    """The strategy of this plugin."""
    return [Fsdp]
