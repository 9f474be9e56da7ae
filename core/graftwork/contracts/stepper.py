"""One optimizer step over an assembled model: the part of training that memory strategies may change."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, ClassVar

from graftwork import processes
from graftwork.contracts.loss import summed_loss
from graftwork.errors import PlanRefused

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from graftwork.contracts.assembly import Assembly
    from graftwork.contracts.batch import Batch
    from graftwork.contracts.plan import TrainSettings


NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|[._])norm(\.|$)")
"""In the names of parameters, in lower case."""


def decays(model: nn.Module, name: str) -> bool:
    """Whether weight decay falls on the parameter `name`: not on biases and normalisation layers, as in Hugging Face's Trainer.

    A normalisation layer is known by its class, such as `GemmaRMSNorm`, or by what it is called.
    """
    owner = model.get_submodule(name.rpartition(".")[0])
    normalises = any("norm" in base.__name__.lower() for base in type(owner).__mro__)
    return not normalises and not NOT_DECAYED.search(name.lower())


class Stepper:
    """Forward, backward and update. Nothing here reads a number out of a tensor, so that it runs on fake tensors too.

    A step is `accumulate` for each micro-batch, `gradient_norm`, `update` unless the step is skipped, and `clear`. A memory
    strategy with an engine of its own returns a child of this class from `MemoryStrategy.stepper`.
    """

    reduces_gradients: ClassVar[bool] = False
    """Whether gradients are summed over all processes, each of which accumulates its share of the records."""
    zero_is_unreached: ClassVar[bool] = False
    """Whether the engine cannot tell a gradient that is zero from one that never came (see `reached`)."""
    needs_equal_micro_batches: ClassVar[bool] = False
    """Whether all processes must accumulate equally many micro-batches, each with images if any record has some."""

    def __init__(self, assembly: Assembly, settings: TrainSettings) -> None:
        import torch

        self.assembly, self.settings = assembly, settings
        self.parameters = assembly.trained()
        groups = self._groups()
        self.rates = [group["lr"] for group in groups]
        self.optimizer = self._optimizer(groups)
        self.scaler = torch.amp.GradScaler(assembly.device.type, enabled=assembly.precision == "fp16")

    def _groups(self) -> list[dict[str, Any]]:
        """The PEFT method's parameter groups, each split by whether weight decay falls on a parameter."""
        peft, rate, model = self.assembly.peft, self.settings.learning_rate, self.assembly.model
        whole: list[dict[str, Any]] = [{"params": list(self.parameters.values()), "lr": rate}]
        decayed = {id(parameter) for name, parameter in self.parameters.items() if decays(model, name)}
        groups = []
        for group in peft.param_groups(self.parameters, rate) if peft else whole:
            for applies, decay in ((True, group.get("weight_decay", self.settings.weight_decay)), (False, 0.0)):
                if chosen := [parameter for parameter in group["params"] if (id(parameter) in decayed) is applies]:
                    groups.append({**group, "params": chosen, "weight_decay": decay})
        return groups

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The first optimizer that a strategy offers, else AdamW."""
        import torch

        for strategy in self.assembly.strategies:
            if (offered := strategy.optimizer(groups, self.settings)) is not None:
                return offered
        return torch.optim.AdamW(
            groups,
            lr=self.settings.learning_rate,
            betas=self.settings.adam_betas,
            eps=self.settings.adam_epsilon,
            weight_decay=self.settings.weight_decay,
            fused=True,  # one kernel for all parameters, as by default in Hugging Face's Trainer
        )

    def set_rate(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times its highest."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def accumulate(self, batch: Batch, num_label_tokens: float, *, last: bool = True) -> Tensor:
        """Add the gradients of a micro-batch; returns its share of the loss: the sum over its labels divided by `num_label_tokens`, the
        number of labels of the whole step, of all processes, each counted by its record's weight. `last` says whether it is the step's last micro-batch."""
        with self.assembly.autocast():
            loss = summed_loss(self.assembly.model, batch, self.assembly.cross_entropy) / (num_label_tokens or 1)
        if loss.requires_grad:  # else nothing that is trained had a part in it
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def reached(self, batch: Batch) -> frozenset[str]:
        """The trained parameters that the gradients of a micro-batch come to, by name, whatever their values; no step is taken, and
        nothing of it is left. Where an engine cannot tell, those whose gradient is not zero. Collective."""
        with self.assembly.autocast():
            loss = summed_loss(self.assembly.model, batch, self.assembly.cross_entropy)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        found = frozenset(name for name, parameter in self.parameters.items() if parameter.grad is not None)
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def gradients(self) -> list[Tensor]:
        """The gathered gradients of all trained parameters: zero for one that no record of the step has reached, so that
        it does not matter to AdamW which process had which records."""
        import torch

        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def gradient_norm(self) -> Tensor:
        """Clip the gathered gradients, and return their norm from before."""
        import torch

        self.gradients()
        self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm or math.inf)

    def gradient_norms(self) -> Tensor:
        """The norm of each trained parameter's gathered gradient, in their order, once `gradient_norm` was called. Collective."""
        import torch

        return torch.stack([gradient.norm().to(self.assembly.device) for gradient in self.gradients()])

    def update(self) -> None:
        """Change the trained parameters by the gathered gradients."""
        self.scaler.step(self.optimizer)

    def clear(self) -> None:
        """Forget the gradients; every step ends so, a skipped one too."""
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def unshard(self, value: Tensor) -> Tensor:
        """All numbers of a tensor of the optimizer's state, of which a process may have a part. Collective."""
        return value

    def shard(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """The part that this process needs of `value`, a tensor of the state of `parameter`; the inverse of `unshard`."""
        return value.to(parameter.device)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs of the optimizer, by parameter name and key, copied to the CPU: it is written to a file while the
        next steps are taken. Collective."""
        import torch

        names = {id(parameter): name for name, parameter in self.parameters.items()}
        state = {
            # Copied one by one, for a file holds no tensor twice either; a whole number becomes a tensor, and one again in `restore`.
            f"{names[id(parameter)]}/{key}": self.unshard(torch.as_tensor(value).detach())
            .to("cpu", copy=True)
            .contiguous()
            for parameter, values in self.optimizer.state.items()
            for key, value in values.items()
        }
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            state["scaler"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]], dtype=torch.float64)
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        import torch

        def restored(key: str, parameter: nn.Parameter) -> Tensor | int:
            if state[key].dtype == torch.int64 and state[key].dim() == 0:
                return int(state[key])
            if key.endswith("/step"):  # where the fused kernel wants it; an older run kept it on the CPU
                return state[key].to(parameter.device, torch.float32)
            return self.shard(state[key], parameter)

        for name, parameter in self.parameters.items():
            keys = [key for key in state if key.rpartition("/")[0] == name]
            self.optimizer.state[parameter] = {key.rpartition("/")[2]: restored(key, parameter) for key in keys}
        if "scaler" in state:
            scale, growth = state["scaler"].tolist()
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(growth)})


def stepper_for(assembly: Assembly, settings: TrainSettings) -> Stepper:
    """The stepper that a memory strategy of the assembly brings, else the plain one. PlanRefused where several processes
    would each learn for themselves."""
    brought = (strategy.stepper(assembly, settings) for strategy in assembly.strategies)
    stepper = next((each for each in brought if each is not None), None) or Stepper(assembly, settings)
    if processes.count() > 1 and not stepper.reduces_gradients:
        raise PlanRefused(
            f"{processes.count()} processes run this plan, and none of its memory strategies brings their gradients together; "
            "add one that does to memory.use (graftwork list memory)"
        )
    return stepper
