"""What every memory strategy must leave as it is: what is computed, what is learned, and what things are called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graftwork.conformance.outcome import Check, Subject
from graftwork.conformance.specimens import adapt, assemble, distance, logits, train
from graftwork.filling import named_tensors

if TYPE_CHECKING:
    from graftwork.compose import Assembly

TOLERANCE = 1e-5
"""How far another order of computing may move a number of the transformer in fp32."""


def assembled(subject: Subject | None) -> Assembly:
    """The transformer with its first block trained and with dropout, with the strategy or without one."""
    return adapt(assemble(strategies=[subject.ready()] if subject else (), also_train=("first",), dropout=0.1))


def one_step_is_a_plain_step(subject: Subject) -> Iterator[str]:
    """The loss of a training step, and every number after it."""
    plain, saving = assembled(None), assembled(subject)
    (wanted,), (loss,) = train(plain, steps=1), train(saving, steps=1)
    if not abs(loss - wanted) <= TOLERANCE * max(1.0, abs(wanted)):
        yield f"a strategy must not change the loss, and a step has {loss:.6g} instead of {wanted:.6g}; compute the same numbers"
    with saving.whole(dict(saving.model.named_parameters())):
        found = named_tensors(saving.model)
        for name, tensor in named_tensors(plain.model).items():
            if name not in found or (error := distance(found[name], tensor)) > TOLERANCE:
                far = f"is {error:.3g} away" if name in found else "is not there"
                yield f"a strategy must not change what a step learns, and '{name}' {far} after one; hand every gradient on"


def names_and_shapes_stay(subject: Subject) -> Iterator[str]:
    """Modules, tensors and what is trained have the names and shapes that checkpoints are made of."""
    plain, saving = assembled(None), assembled(subject)
    with saving.whole(dict(saving.model.named_parameters())):
        wanted = {name: tuple(tensor.shape) for name, tensor in plain.model.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in saving.model.state_dict().items()}
    if different := sorted(dict(wanted.items() ^ found.items())):
        yield f"'state_dict' must keep its names and shapes, and '{different[0]}' is not in both; wrap functions, not modules"
    if different := sorted(plain.trained().keys() ^ saving.trained().keys()):
        yield f"the same parameters must be trained, and '{different[0]}' is not in both cases; leave requires_grad alone"


def answers_stay(subject: Subject) -> Iterator[str]:
    """What the model computes in evaluation, before and after training."""
    plain, saving = assembled(None), assembled(subject)
    for when in ("before", "after"):
        if (error := distance(logits(saving), logits(plain))) > TOLERANCE:
            yield f"a strategy must not change the output, and {when} training it is {error:.3g} away; compute the same numbers"
        train(plain), train(saving)


CHECKS: tuple[Check, ...] = (one_step_is_a_plain_step, names_and_shapes_stay, answers_stay)
