"""What every PEFT method must do, tried on a small transformer of which it is to adapt the first of two blocks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from graftwork.build import compose
from graftwork.build.filling import check_keys, fill
from graftwork.build.sharding import complete
from graftwork.build.values import put
from graftwork.conformance.outcome import Check, Subject
from graftwork.conformance.specimens import ROLES, adapt, assemble, calls_of, distance, logits, loss, train, transformer
from graftwork.contracts.anatomy import named_tensors, within
from graftwork.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn

    from graftwork.contracts.assembly import Assembly

TOLERANCE = 1e-4
"""How far rounding may move a logit of the transformer in fp32; its logits are of the order of one."""


def adapted(subject: Subject, **options: Any) -> Assembly:
    """The transformer with the method injected into its first block."""
    return adapt(assemble(peft=subject.ready(), **options))


def inject_leaves_the_base_as_it_is(subject: Subject) -> Iterator[str]:
    """The base's tensors are the same objects with the same values."""
    import torch

    assembly = assemble(peft=subject.ready())
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in named_tensors(assembly.model).items()}
    adapt(assembly)
    after = {id(tensor) for tensor in named_tensors(assembly.model).values()}
    for name, (tensor, value) in before.items():
        if id(tensor) not in after:
            yield f"'inject' must keep the base's own tensors, and '{name}' is another one afterwards; change what is around it"
        if not torch.equal(tensor, value):
            yield f"'inject' must not change what the base's tensors hold, and '{name}' differs; keep the change beside it"


def something_is_trained_and_gets_gradients(subject: Subject) -> Iterator[str]:
    """Some parameter requires gradients, and each that does gets one."""
    assembly = adapted(subject)
    if not assembly.trained():
        yield "'inject' must make something trainable, and nothing requires gradients; call requires_grad_(True) on it"
    assembly.model.train()
    loss(assembly).backward()  # type: ignore[no-untyped-call]
    for name, parameter in assembly.trained().items():
        if parameter.grad is None:
            yield f"every trained parameter must get a gradient, and '{name}' gets none; use it, or do not train it"


def training_changes_the_output(subject: Subject) -> Iterator[str]:
    """A few steps move the logits, and to finite numbers."""
    import torch

    assembly = adapted(subject)
    before = logits(assembly)
    train(assembly)
    after = logits(assembly)
    if not after.isfinite().all():
        yield "training must end in finite numbers, and the output is not finite after three steps; check the start values"
    if torch.equal(before, after):
        yield "training must change what the model computes, and three steps changed nothing; use what is trained"


def only_the_targets_are_adapted(subject: Subject) -> Iterator[str]:
    """Modules outside the targets stay frozen and compute what they computed."""
    import torch

    assembly = assemble(peft=subject.ready())
    model = assembly.model
    base = dict(model.named_parameters())
    others = [n for n, m in model.named_modules() if not list(m.children()) and not within(n, ROLES["first"])]
    with calls_of(model, others) as calls:
        logits(assembly)
    adapt(assembly)
    for name, parameter in base.items():
        if parameter.requires_grad and not within(name, ROLES["first"]):
            yield f"only targets may be trained, and '{name}' requires gradients without being one; adapt 'targets' only"
    train(assembly)
    for name, (inputs, output) in calls.items():
        with torch.no_grad():
            if not torch.equal(model.get_submodule(name)(*inputs), output):
                yield f"only targets may be changed, and '{name}' computes something else after training; adapt 'targets' only"


def disable_adapter_gives_the_base_and_leaving_it_the_adapter(subject: Subject) -> Iterator[str]:
    """Exactly, and requires_grad as well, even where an error leaves `disable_adapter`."""
    import torch

    assembly = assemble(peft=subject.ready())
    base = logits(assembly)
    adapt(assembly)
    train(assembly)
    trained, flags = logits(assembly), {name: p.requires_grad for name, p in assembly.model.named_parameters()}
    with assembly.disable_adapter():
        inside = logits(assembly)
    if not torch.equal(inside, base):
        yield (
            f"within 'disable_adapter' the model must compute exactly what its base computes, and it is {distance(inside, base):.3g} away; "
            "bypass everything that 'inject' added"
        )
    if not torch.equal(logits(assembly), trained):
        yield "after 'disable_adapter' the adapter must work as before, and the output differs; undo in 'disable_adapter' all that it did"
    for name, parameter in assembly.model.named_parameters():
        if parameter.requires_grad != flags.get(name):
            yield f"after 'disable_adapter' the same parameters must be trained, and requires_grad of '{name}' changed; restore it"
    try:
        with assembly.disable_adapter():
            raise InterruptedError
    except InterruptedError:
        pass
    if not torch.equal(logits(assembly), trained):
        yield "after an error within 'disable_adapter' the adapter must work as before, and it stays disabled; restore it in a finally block"


def saved_tensors_rebuild_the_adapter(subject: Subject) -> Iterator[str]:
    """Another instance, injected with `fresh` false and given the saved tensors, computes exactly the same."""
    import torch

    first = adapted(subject)
    train(first)
    saved = {name: tensor.detach().clone() for name, tensor in first.state_to_save().items()}
    second = adapt(assemble(peft=subject.ready()), fresh=False)
    try:
        compose.check_saved_state(second, saved)
    except AdapterError as error:
        yield f"'inject' must add the same tensors each time, and {'; '.join([error.sentence, *error.details])}; do not depend on 'fresh'"
        return
    for name, tensor in second.state_to_save().items():
        put(tensor, saved[name])
    if not torch.equal(logits(second), logits(first)):
        yield (
            "what is new or trained must be all that a checkpoint needs, and a model rebuilt from it is "
            f"{distance(logits(second), logits(first)):.3g} away; keep every value in a parameter or a persistent buffer"
        )


def merging_keeps_the_output_and_restores_the_modules(subject: Subject) -> Iterator[str]:
    """The same logits but for rounding, from the same modules and tensors as before `inject`."""
    assembly = assemble(peft=subject.ready())
    modules = {name: type(module).__name__ for name, module in assembly.model.named_modules()}
    tensors = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in named_tensors(assembly.model).items()}
    adapt(assembly)
    train(assembly)
    trained = logits(assembly)
    assert assembly.peft
    assembly.peft.merge(assembly.model)
    found = {name: type(module).__name__ for name, module in assembly.model.named_modules()}
    if different := sorted(dict(found.items() ^ modules.items())):
        yield f"'merge' must restore the modules of before 'inject', and '{different[0]}' is not as it was; put the base's back"
    left = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in named_tensors(assembly.model).items()}
    if different := sorted(dict(left.items() ^ tensors.items())):
        yield f"'merge' must leave the base's tensors alone in the model, and '{different[0]}' is not as it was; fold and remove"
    if (error := distance(logits(assembly), trained)) > TOLERANCE:
        yield f"'merge' must not change what the model computes, and it is {error:.3g} away; fold all of it, biases too"


def groups_hold_every_parameter_once(subject: Subject) -> Iterator[str]:
    """The optimizer's groups, each with a learning rate."""
    assembly = adapted(subject)
    assert assembly.peft
    trained = assembly.trained()
    groups = assembly.peft.param_groups(trained, 0.1)
    if missing := [group for group in groups if "lr" not in group or "params" not in group]:
        yield f"a group must have 'params' and 'lr', and one has {sorted(missing[0])}; add what is missing"
        return
    held = [id(parameter) for group in groups for parameter in group["params"]]
    for name, parameter in trained.items():
        if (times := held.count(id(parameter))) != 1:
            yield f"'param_groups' must hold every trained parameter once, and '{name}' is there {times} times; fix the groups"
    if len(held) > len(trained):
        yield "'param_groups' must hold nothing but what is trained, and it holds more; use only the parameters that it is given"


def shapes_are_known_without_values(subject: Subject) -> Iterator[str]:
    """On the meta device `inject` makes the same names and shapes; every checkpoint is checked so before it is named."""
    real = {name: tuple(tensor.shape) for name, tensor in adapted(subject).state_to_save().items()}
    shaped = adapt(assemble(peft=subject.ready(), meta=True), fresh=False)
    try:
        check_keys(shaped.state_to_save(), real)
    except AdapterError as error:
        yield f"'inject' must add the same tensors where parameters are on 'meta', and {'; '.join(error.details)}; ask no values"


def initial_values_may_wait_for_the_base(subject: Subject) -> Iterator[str]:
    """The same where the base gets its values only after `inject`, as with a memory strategy that shards the weights."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = adapted(subject).state_to_save()
        torch.manual_seed(0)
        late = assemble(peft=subject.ready(), meta=True)
        late.device = torch.device("cpu")
        base = {name: partial(tensor.detach) for name, tensor in named_tensors(transformer()).items()}
        names = compose.adapt(late, base.keys(), fresh=True)
    load = partial(fill, available=base, dtype=torch.float32, architecture_name="the transformer")
    try:
        complete(late, [lambda module: None], None, names, load)
    except AdapterError as error:
        yield error.sentence
        return
    for name, tensor in late.state_to_save().items():
        if name not in expected or not torch.equal(tensor, expected[name]):
            yield (
                f"the base may get its values only after 'inject', and '{name}' starts otherwise then; set what depends on them "
                "in 'initialise_from_base'"
            )


def bf16_weights_under_autocast_work(subject: Subject) -> Iterator[str]:
    """As in a run in bf16: the base is bf16, what is trained is fp32, and autocast joins them."""
    import torch

    assembly = assemble(peft=subject.ready())
    assembly.model.bfloat16()
    assembly.precision = "bf16"
    leaves = [name for name, module in assembly.model.named_modules() if not list(module.children())]
    with assembly.autocast(), calls_of(assembly.model, leaves) as calls:
        logits(assembly)
    adapt(assembly)
    for name, (inputs, output) in calls.items():
        with torch.no_grad(), assembly.autocast():
            found = assembly.model.get_submodule(name)(*inputs).dtype
        if found != output.dtype:
            yield f"a module must give the dtype that it gave, and '{name}' gives {found} instead of {output.dtype}; convert with .to(output.dtype)"
    loss(assembly).backward()  # type: ignore[no-untyped-call]
    for name, parameter in assembly.trained().items():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            yield f"gradients must be finite in bf16, and that of '{name}' is not; compute what is delicate in fp32"


def targets_that_cannot_be_adapted_are_refused(subject: Subject) -> Iterator[str]:
    """With AdapterError, rather than doing nothing."""

    def adapts_or_refuses(targets: list[str]) -> bool:
        model: nn.Module = transformer().requires_grad_(False)
        try:
            subject.ready().inject(model, targets, fresh=True)
        except AdapterError:
            return True
        return any(parameter.requires_grad for parameter in model.parameters())

    for targets in ([], ["blocks.0.norm"], ["embedding"], ["blocks.0.key"]):
        if not adapts_or_refuses(targets):
            given = f"the target '{targets[0]}'" if targets else "no target"
            yield f"'inject' must adapt something or raise AdapterError, and with {given} it did neither; raise it"


CHECKS: tuple[Check, ...] = (
    inject_leaves_the_base_as_it_is,
    something_is_trained_and_gets_gradients,
    training_changes_the_output,
    only_the_targets_are_adapted,
    disable_adapter_gives_the_base_and_leaving_it_the_adapter,
    saved_tensors_rebuild_the_adapter,
    merging_keeps_the_output_and_restores_the_modules,
    groups_hold_every_parameter_once,
    shapes_are_known_without_values,
    initial_values_may_wait_for_the_base,
    bf16_weights_under_autocast_work,
    targets_that_cannot_be_adapted_are_refused,
)
