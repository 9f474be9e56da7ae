"""What every memory strategy must leave as it is: what is computed, what is learned, and the names of modules and tensors."""

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
"""How far another order of computing may move a value of the transformer in fp32."""
TRAINED: tuple[tuple[str, ...], ...] = (("first",), ("first", "rest"))
"""The roles that are trained: a block, and embeddings and head as well."""


def assembled(
    subject: Subject | None, trained: tuple[str, ...] = TRAINED[0], saved: Mapping[str, Tensor] | None = None
) -> Assembly:
    """The transformer in training and with dropout, with the strategy or without one, new or with saved values."""
    return adapt(
        assemble(strategies=[subject.ready()] if subject else (), also_train=trained, dropout=0.1), saved=saved
    )


def approximation_of(subject: Subject) -> Approximation | None:
    """What the strategy says that it approximates."""
    return cast(type[MemoryStrategy[Any]], subject.component).approximates


def error_of(found: Tensor, expected: Tensor, subject: Subject) -> float:
    """How far a tensor is from what it should be: at most; relative to the whole tensor where something is approximated."""
    if not approximation_of(subject) or found.shape != expected.shape:
        return distance(found, expected)
    difference = float((found.detach().float() - expected.detach().float()).norm() / expected.detach().float().norm())
    return difference if difference == difference else float("inf")


def update_of(assembly: Assembly) -> Tensor:
    """What training added to the trained parameters, as one vector."""
    import torch

    steps = [parameter.detach() - assembly.adaptation.base_copy[name] for name, parameter in assembly.trained().items()]
    return torch.cat([step.flatten() for step in steps])


def one_step_is_a_plain_step(subject: Subject) -> Iterator[str]:
    """The loss of a training step, and every tensor after it, by the strategy's own loss, optimizer and engine."""
    approximation = approximation_of(subject)
    tolerance = approximation.tolerance if approximation else TOLERANCE
    for trained in TRAINED:
        plain, saving = assembled(None, trained), assembled(subject, trained)
        (expected,), (loss,) = train(plain, steps=1), train(saving, steps=1)
        if not abs(loss - expected) <= tolerance * max(1.0, abs(expected)):
            yield f"a strategy must not change the loss, and a step has {loss:.6g} instead of {expected:.6g}; compute the same values"
        with saving.full_params(dict(saving.model.named_parameters())):
            if approximation and (error := error_of(update_of(saving), update_of(plain), subject)) > tolerance:
                yield f"a strategy must not change what a step learns, and what is learned is {error:.3g} away; hand every gradient on"
            found = named_tensors(saving.model)
            for name, tensor in named_tensors(plain.model).items() if not approximation else ():
                if name not in found or (error := distance(found[name], tensor)) > tolerance:
                    far = f"is {error:.3g} away" if name in found else "is not there"
                    yield f"a strategy must not change what a step learns, and '{name}' {far} after one; hand every gradient on"


def comparable_tensors(assembly: Assembly, subject: Subject) -> dict[str, Tensor]:
    """Every tensor; where frozen weights are quantized, and so stored otherwise, only what a checkpoint holds."""
    approximation = approximation_of(subject)
    return assembly.state_to_save() if approximation and approximation.outputs else named_tensors(assembly.model)


def names_and_shapes_stay(subject: Subject) -> Iterator[str]:
    """Modules, tensors and what is trained have the names and shapes that checkpoints are made of."""
    plain, saving = assembled(None), assembled(subject)
    with saving.full_params(dict(saving.model.named_parameters())):
        expected = {name: tuple(tensor.shape) for name, tensor in comparable_tensors(plain, subject).items()}
        found = {name: tuple(tensor.shape) for name, tensor in comparable_tensors(saving, subject).items()}
    if different := sorted(dict(expected.items() ^ found.items())):
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
        if (error := error_of(logits(saving), logits(plain), subject)) > tolerance:
            yield f"a strategy must not change the output, and {when} training it is {error:.3g} away; compute the same values"
        train(plain, steps=1), train(saving, steps=1)


def resuming_goes_on_exactly(subject: Subject) -> Iterator[str]:
    """What a checkpoint keeps of the optimizer takes the next step as if there had been no break."""
    first = assembled(subject)
    before = stepper(first)
    train(first, steps=2, by=before)
    second = assembled(subject, saved=trained_values(first))
    after = stepper(second)
    after.restore(before.state())
    train(first, steps=1, by=before), train(second, steps=1, by=after)
    found = trained_values(second)
    for name, expected in trained_values(first).items():
        if (error := distance(found[name], expected)) > TOLERANCE:
            yield (
                f"a resumed run must take the same steps, and '{name}' is {error:.3g} away after the next one; "
                "keep all that the optimizer knows in its 'state', as tensors and whole numbers"
            )


def what_is_saved_is_a_copy(subject: Subject) -> Iterator[str]:
    """A checkpoint is written while the next steps are taken, which must not change what it will hold."""
    assembly = assembled(subject)
    by = stepper(assembly)
    train(assembly, steps=1, by=by)
    kept = {name: (tensor, tensor.clone()) for name, tensor in by.state().items()}
    train(assembly, steps=1, by=by)
    if changed := sorted(name for name, (tensor, before) in kept.items() if not tensor.equal(before)):
        yield f"what 'state' returns must stay as it was, and the next step changed '{changed[0]}'; return copies"


def trained_values(assembly: Assembly) -> dict[str, Tensor]:
    """The values of all trained parameters, by name."""
    with assembly.full_params(assembly.trained()):
        return {name: parameter.detach().clone() for name, parameter in assembly.trained().items()}


CHECKS: tuple[Check, ...] = (
    one_step_is_a_plain_step,
    names_and_shapes_stay,
    answers_stay,
    resuming_goes_on_exactly,
    what_is_saved_is_a_copy,
)
