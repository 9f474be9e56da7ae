"""PEFT methods, memory strategies and settings that break one promise each, next to sound ones that they extend."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.func import functional_call

from graftwork import NoSettings
from graftwork.contracts import (
    Adapter,
    Approximation,
    ExternalFolder,
    MemoryStrategy,
    PeftMethod,
    Stepper,
    cross_entropy,
)
from graftwork.errors import AdapterError

# PEFT methods -----------------------------------------------------------------------------------------------------------


class Scale(PeftMethod[NoSettings]):
    """A trained factor for each output of each linear layer"""

    name = "scale"

    def inject(self, model: Any, targets: Sequence[str], *, fresh: bool) -> None:
        linears = [m for m in map(model.get_submodule, targets) if isinstance(m, torch.nn.Linear)]
        if not linears:
            raise AdapterError("no linear layer")
        for linear in linears:
            linear.factor = torch.nn.Parameter(torch.ones(linear.out_features, device=linear.weight.device))
            linear.hook = linear.register_forward_hook(_scale)

    @contextmanager
    def disable_adapter(self, model: Any) -> Iterator[None]:
        for linear in scaled(model):
            linear.off = True
        try:
            yield
        finally:
            for linear in scaled(model):
                del linear.off

    def merge(self, model: Any) -> None:
        for linear in scaled(model):
            linear.weight.data *= linear.factor.data[:, None]
            if linear.bias is not None:
                linear.bias.data *= linear.factor.data
            linear.hook.remove()
            del linear.factor, linear.hook


def _scale(linear: Any, inputs: Any, output: Any) -> Any:
    return output if hasattr(linear, "off") else output * linear.factor.to(output.dtype)


def scaled(model: Any) -> list[Any]:
    """The layers that have a factor."""
    return [module for module in model.modules() if hasattr(module, "factor")]


class ClaimsEveryFolder(Scale):
    """Adopts whatever it is shown"""

    def import_from(self, folder: ExternalFolder) -> Adapter:
        return Adapter("an adapter", lambda targets: {}, {}, frozenset())


class Widens(Scale):
    """Its outputs are fp32, whatever they were"""

    def inject(self, model: Any, targets: Sequence[str], *, fresh: bool) -> None:
        super().inject(model, targets, fresh=fresh)
        for linear in scaled(model):
            linear.hook.remove()
            linear.hook = linear.register_forward_hook(lambda m, _, out: out if hasattr(m, "off") else out * m.factor)


class TrainsWhatItDoesNotUse(Scale):
    """One of its parameters is for nothing"""

    def inject(self, model: Any, targets: Sequence[str], *, fresh: bool) -> None:
        super().inject(model, targets, fresh=fresh)
        scaled(model)[0].spare = torch.nn.Parameter(torch.ones(1))


class MeasuresTheBaseTooEarly(Scale):
    """Starts from what the base holds, which is not there yet where weights are sharded"""

    def inject(self, model: Any, targets: Sequence[str], *, fresh: bool) -> None:
        super().inject(model, targets, fresh=fresh)
        for linear in scaled(model) if fresh else ():
            linear.factor.data = 1 + 0 * linear.weight.detach().sum(1)


class LearnsNothing(Scale):
    """What it trains is multiplied by zero"""

    def inject(self, model: Any, targets: Sequence[str], *, fresh: bool) -> None:
        super().inject(model, targets, fresh=fresh)
        for linear in scaled(model):
            linear.hook.remove()
            linear.hook = linear.register_forward_hook(lambda m, _, out: out + 0 * m.factor)


class OffDoesNothing(Scale):
    """Its off does nothing"""

    def disable_adapter(self, model: Any) -> Any:
        return nullcontext()


class StaysOff(Scale):
    """An error leaves it off"""

    @contextmanager
    def disable_adapter(self, model: Any) -> Iterator[None]:
        for linear in scaled(model):
            linear.off = True
        yield
        for linear in scaled(model):
            del linear.off


class MergeForgetsTheBias(Scale):
    """It merges weights alone"""

    def merge(self, model: Any) -> None:
        biases = {linear: linear.bias.data.clone() for linear in scaled(model) if linear.bias is not None}
        super().merge(model)
        for linear, bias in biases.items():
            linear.bias.data = bias


class MergeLeavesItsFactors(Scale):
    """It merges, and keeps what it merged"""

    def merge(self, model: Any) -> None:
        linears = scaled(model)
        super().merge(model)
        for linear in linears:
            linear.register_parameter("factor", torch.nn.Parameter(torch.ones(1)))


class TrainsNeighbours(Scale):
    """It adapts what it was not asked to"""

    def inject(self, model: Any, targets: Sequence[str], *, fresh: bool) -> None:
        super().inject(model, [*targets, "blocks.1.out"], fresh=fresh)


class UnfreezesTheHead(Scale):
    """It trains what it was not asked to"""

    def inject(self, model: Any, targets: Sequence[str], *, fresh: bool) -> None:
        super().inject(model, targets, fresh=fresh)
        model.head.requires_grad_(True)


class ChangesTheBase(Scale):
    """It halves the weights, and starts from twice as much"""

    def inject(self, model: Any, targets: Sequence[str], *, fresh: bool) -> None:
        super().inject(model, targets, fresh=fresh)
        for linear in scaled(model):
            linear.weight.data /= 2


class ReplacesTheBase(Scale):
    """It makes new weights with the old values"""

    def inject(self, model: Any, targets: Sequence[str], *, fresh: bool) -> None:
        super().inject(model, targets, fresh=fresh)
        for linear in scaled(model):
            linear.weight = torch.nn.Parameter(linear.weight.data.clone(), requires_grad=False)


class KeepsANumberToItself(Scale):
    """What it draws is in no checkpoint"""

    drawn = itertools.count(1)

    def inject(self, model: Any, targets: Sequence[str], *, fresh: bool) -> None:
        super().inject(model, targets, fresh=fresh)
        number = next(self.drawn)
        for linear in scaled(model):
            linear.hook.remove()
            linear.hook = linear.register_forward_hook(
                lambda m, _, out: out if hasattr(m, "off") else out * m.factor**number
            )


class GroupsHalf(Scale):
    """Its groups forget half of the parameters"""

    def param_groups(self, parameters: Mapping[str, Any], learning_rate: float) -> list[dict[str, Any]]:
        return [{"params": list(parameters.values())[::2], "lr": learning_rate}]


class AsksValues(Scale):
    """It looks at the weights even without values"""

    def inject(self, model: Any, targets: Sequence[str], *, fresh: bool) -> None:
        super().inject(model, targets, fresh=fresh)
        assert float(scaled(model)[0].weight.sum()) != 0


class RefusesNothing(Scale):
    """It silently does nothing where it cannot do anything"""

    def inject(self, model: Any, targets: Sequence[str], *, fresh: bool) -> None:
        try:
            super().inject(model, targets, fresh=fresh)
        except AdapterError:
            return


# Memory strategies ------------------------------------------------------------------------------------------------------


class Nothing(MemoryStrategy[NoSettings]):
    """It changes nothing"""

    name = "nothing"


class HalvesGradients(Nothing):
    """It loses half of every gradient"""

    def prepare(self, assembly: Any) -> None:
        for parameter in assembly.trained().values():
            parameter.register_hook(lambda gradient: 0 * gradient if gradient.dim() == 1 else gradient)


class RoundsTheBase(Nothing):
    """It stores the head in eight levels"""

    def prepare(self, assembly: Any) -> None:
        weight = assembly.model.head.weight
        weight.data = (weight.data * 4).round() / 4


class WrapsModules(Nothing):
    """It puts a module around each block"""

    def prepare(self, assembly: Any) -> None:
        for name in assembly.structure.blocks["language"]:
            path, _, leaf = name.rpartition(".")
            setattr(assembly.model.get_submodule(path), leaf, torch.nn.Sequential(assembly.model.get_submodule(name)))


class SaysWhatItRounds(Nothing):
    """It stores frozen weights in a few levels, and says so"""

    approximates = Approximation("frozen weights are kept in a few levels", tolerance=0.5, outputs=True)

    def quantize(self, assembly: Any) -> None:
        for parameter in assembly.model.parameters():
            if not parameter.requires_grad:
                parameter.data = (parameter.data * 64).round() / 64


class RoundsAndLearnsNothing(SaysWhatItRounds):
    """It takes its rounding for a reason not to learn"""

    def prepare(self, assembly: Any) -> None:
        for parameter in assembly.trained().values():
            parameter.register_hook(lambda gradient: 0 * gradient)


class RoundsMoreThanItSays(RoundsTheBase):
    """It rounds the head by far more than it says"""

    approximates = Approximation("the head is kept in many levels", tolerance=1e-3, outputs=True)


class SaysThatItsOutputsStay(RoundsTheBase):
    """It rounds what it says that it does not"""

    approximates = Approximation("the optimizer's state is rounded", tolerance=0.5, outputs=False)


class ForgetsTheLastLabel(Nothing):
    """Its loss ends too early"""

    def prepare(self, assembly: Any) -> None:
        assembly.cross_entropy = lambda model, hidden, labels: cross_entropy(model, hidden[:-1], labels[:-1])


class TeachesTheHeadNothing(Nothing):
    """Its loss is right, and what the head learns from it is not"""

    def prepare(self, assembly: Any) -> None:
        def loss(model: Any, hidden: Any, labels: Any) -> Any:
            frozen = functional_call(model.head, {"weight": model.head.weight.detach()}, hidden)
            return torch.nn.functional.cross_entropy(frozen, labels, reduction="sum")

        assembly.cross_entropy = loss


class LearnsTwiceAsFast(Nothing):
    """Its optimizer has a learning rate of its own"""

    def optimizer(self, groups: Any, settings: Any) -> Any:
        return torch.optim.AdamW([{**group, "lr": 2 * group["lr"]} for group in groups])


class CountingAdamW(torch.optim.AdamW):
    """It remembers steps where no checkpoint sees them."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            group["lr"] *= 1.0 if self.steps == 1 else self.steps
        return super().step(closure)


class KeepsItsStepsToItself(Nothing):
    """Its optimizer counts in an attribute"""

    def optimizer(self, groups: Any, settings: Any) -> Any:
        return CountingAdamW(groups)


class SavesWhatItGoesOnChanging(Nothing):
    """Its stepper returns the optimizer's own tensors"""

    def stepper(self, assembly: Any, settings: Any) -> Any:
        class Sharing(Stepper):
            def state(self) -> Any:
                names = {id(parameter): name for name, parameter in self.parameters.items()}
                states = self.optimizer.state.items()
                return {f"{names[id(p)]}/{key}": value for p, values in states for key, value in values.items()}

            def restore(self, state: Any) -> None:
                super().restore({name: tensor.clone() for name, tensor in state.items()})

        return Sharing(assembly, settings)


class SwitchesDropoutOff(Nothing):
    """It trains in evaluation mode"""

    def prepare(self, assembly: Any) -> None:
        for name in assembly.structure.blocks["language"]:
            assembly.model.get_submodule(name).dropout.p = 0.0


# Cards ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SilentSettings:
    rank: int = field(default=4, metadata={})


class SaysNothingOfItsSettings(Scale):
    """Its setting has no help"""

    Settings = SilentSettings


@dataclass(frozen=True)
class SetSettings:
    names: Any = field(default=frozenset({"a"}), metadata={"help": "A set, which JSON does not have"})


class CannotSaveItsSettings(Scale):
    """Its settings are no JSON"""

    Settings = SetSettings


class HasNoSummary(Scale):
    __doc__ = None


class HasABadName(Scale):
    """Its name has capitals"""

    name = "My_Method"
