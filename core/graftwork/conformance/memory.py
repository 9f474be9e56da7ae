"""What every memory strategy must leave as it is: what is computed, what is learned, and what things are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from graftwork.conformance.outcome import Check, Subject
from graftwork.conformance.specimens import adapt, assemble, distance, logits, stepper, train
from graftwork.contracts.anatomy import named_tensors
from graftwork.contracts.component import Approximation
from graftwork.contracts.kinds import MemoryStrategy

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.contracts.assembly import Assembly

TOLERANCE = 1e-5
"""How far another order of computing may move a number of the transformer in fp32."""
TRAINED: tuple[tuple[str, ...], ...] = (("first",), ("first", "rest"))
"""The roles that are trained: a block, and embeddings and head as well."""


def assembled(
    subject: Subject | None, trained: tuple[str, ...] = TRAINED[0], saved: Mapping[str, Tensor] | None = None
) -> Assembly:
    """The transformer in training and with dropout, with the strategy or without one, as new or with saved numbers."""
    return adapt(
        assemble(strategies=[subject.ready()] if subject else (), also_train=trained, dropout=0.1), saved=saved
    )


def approximation_of(subject: Subject) -> Approximation | None:
    """What the strategy says that it approximates."""
    return cast(type[MemoryStrategy[Any]], subject.component).approximates


def away(found: Tensor, wanted: Tensor, subject: Subject) -> float:
    """How far a tensor is from what it should be: at most; as a whole and relatively where something is rounded."""
    if not approximation_of(subject) or found.shape != wanted.shape:
        return distance(found, wanted)
    difference = float((found.detach().float() - wanted.detach().float()).norm() / wanted.detach().float().norm())
    return difference if difference == difference else float("inf")


def learned(assembly: Assembly) -> Tensor:
    """What training added to the numbers that are trained, all of them in a row."""
    import torch

    steps = [parameter.detach() - assembly.base_copy[name] for name, parameter in assembly.trained().items()]
    return torch.cat([step.flatten() for step in steps])


def one_step_is_a_plain_step(subject: Subject) -> Iterator[str]:
    """The loss of a training step, and every number after it, by the strategy's own loss, optimizer and engine."""
    approximation = approximation_of(subject)
    tolerance = approximation.tolerance if approximation else TOLERANCE
    for trained in TRAINED:
        plain, saving = assembled(None, trained), assembled(subject, trained)
        (wanted,), (loss,) = train(plain, steps=1), train(saving, steps=1)
        if not abs(loss - wanted) <= tolerance * max(1.0, abs(wanted)):
            yield f"a strategy must not change the loss, and a step has {loss:.6g} instead of {wanted:.6g}; compute the same numbers"
        with saving.full_params(dict(saving.model.named_parameters())):
            if approximation and (error := away(learned(saving), learned(plain), subject)) > tolerance:
                yield f"a strategy must not change what a step learns, and what is learned is {error:.3g} away; hand every gradient on"
            found = named_tensors(saving.model)
            for name, tensor in named_tensors(plain.model).items() if not approximation else ():
                if name not in found or (error := distance(found[name], tensor)) > tolerance:
                    far = f"is {error:.3g} away" if name in found else "is not there"
                    yield f"a strategy must not change what a step learns, and '{name}' {far} after one; hand every gradient on"


def kept(assembly: Assembly, subject: Subject) -> dict[str, Tensor]:
    """Every tensor; where frozen weights are rounded, and so stored otherwise, only what a checkpoint holds."""
    approximation = approximation_of(subject)
    return assembly.state_to_save() if approximation and approximation.outputs else named_tensors(assembly.model)


def names_and_shapes_stay(subject: Subject) -> Iterator[str]:
    """Modules, tensors and what is trained have the names and shapes that checkpoints are made of."""
    plain, saving = assembled(None), assembled(subject)
    with saving.full_params(dict(saving.model.named_parameters())):
        wanted = {name: tuple(tensor.shape) for name, tensor in kept(plain, subject).items()}
        found = {name: tuple(tensor.shape) for name, tensor in kept(saving, subject).items()}
    if different := sorted(dict(wanted.items() ^ found.items())):
        yield f"tensors must keep their names and shapes, and '{different[0]}' is not in both; wrap functions, not modules"
    if different := sorted(plain.trained().keys() ^ saving.trained().keys()):
        yield f"the same parameters must be trained, and '{different[0]}' is not in both cases; leave requires_grad alone"


def answers_stay(subject: Subject) -> Iterator[str]:
    """What the model computes in evaluation, before and after training."""
    plain, saving, approximation = assembled(None), assembled(subject), approximation_of(subject)
    for when in ("before", "after"):
        tolerance = (
            approximation.tolerance if approximation and (approximation.outputs or when == "after") else TOLERANCE
        )
        if (error := away(logits(saving), logits(plain), subject)) > tolerance:
            yield f"a strategy must not change the output, and {when} training it is {error:.3g} away; compute the same numbers"
        train(plain, steps=1), train(saving, steps=1)


def resuming_goes_on_exactly(subject: Subject) -> Iterator[str]:
    """What a checkpoint keeps of the optimizer takes the next step as if there had been no break."""
    first = assembled(subject)
    before = stepper(first)
    train(first, steps=2, by=before)
    second = assembled(subject, saved=numbers(first))
    after = stepper(second)
    after.restore(before.state())
    train(first, steps=1, by=before), train(second, steps=1, by=after)
    found = numbers(second)
    for name, wanted in numbers(first).items():
        if (error := distance(found[name], wanted)) > TOLERANCE:
            yield (
                f"a resumed run must take the same steps, and '{name}' is {error:.3g} away after the next one; "
                "keep all that the optimizer knows in its 'state', as tensors and whole numbers"
            )


def numbers(assembly: Assembly) -> dict[str, Tensor]:
    """All numbers that are trained, by name."""
    with assembly.full_params(assembly.trained()):
        return {name: parameter.detach().clone() for name, parameter in assembly.trained().items()}


CHECKS: tuple[Check, ...] = (
    one_step_is_a_plain_step,
    names_and_shapes_stay,
    answers_stay,
    resuming_goes_on_exactly,
)
