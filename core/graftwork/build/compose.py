"""The one construction path: from a plan to a model that trains, evaluates, or only has its shape."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graftwork.attention.kernels import Binding, bind
from graftwork.attention.transformers import ATTN_IMPLEMENTATION, WINDOWED, register
from graftwork.build.copies import account_for
from graftwork.build.filling import (
    BaseWeights,
    check_complete,
    check_keys,
    fill,
    fill_rest,
    folders_of,
    open_base,
    roles_not_in,
)
from graftwork.build.sharding import complete
from graftwork.build.values import hollow, parameters_on_meta
from graftwork.config.machine import chosen_device
from graftwork.config.restore import restore_component
from graftwork.config.sites import attention_sites, describe_towers, kernels_for
from graftwork.contracts.anatomy import (
    DTYPES,
    AttentionSite,
    BuildContext,
    Structure,
    TowerOutput,
    earlier_names,
    modules_of,
    named_tensors,
    within,
)
from graftwork.contracts.assembly import Adaptation, Assembly
from graftwork.contracts.coordinates import InView
from graftwork.contracts.kinds import MemoryStrategy, ModelArchitecture, PeftMethod, VisionTower
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.model import Processor
from graftwork.contracts.plan import Choice, Plan, config_of, folder_of
from graftwork.errors import AdapterError, PlanRefused, WeightsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def build(
    plan: Plan,
    lookup: Lookup,
    *,
    device: str | None = None,
    precision: str | None = None,
    fake_pretrained: bool = False,
    trained: Mapping[str, Tensor] | None = None,
    processor_folder: Path | None = None,
) -> Assembly:
    """Build a plan's model, filled from its base weights.

    `trained` are the tensors of a checkpoint, loaded strictly; without them everything new is initialised. With
    `fake_pretrained` the plan has no weights, and everything is as if it had all that its roles do not initialise newly, with
    random values. `processor_folder` is where a checkpoint keeps its processor. Raises WeightsError and AdapterError.
    """
    import torch

    model_spec = plan.model_spec
    where = chosen_device(device)
    processor = ProcessorSource(processor_folder, may_lack=fake_pretrained)
    on_meta = model_spec.model.weights is not None or trained is not None
    assembly = assemble(plan, lookup, where, precision, processor, on_meta=on_meta)
    base, newly_initialised = base_weights(assembly, shapes_only=False)
    structure, dtype = assembly.structure, getattr(torch, DTYPES[assembly.precision])
    if trained is None:
        refuse_empty_roles(assembly)
    assembly.base_files = account_for(base, structure, model_spec)
    available = base.tensors
    check_complete(model_spec, structure, available, newly_initialised, trained or {})
    fill_rest(structure.model, available, dtype, trained or {})
    filler = partial(
        fill,
        available=available,
        dtype=dtype,
        architecture_name=model_spec.model.name,
        folders=folders_of(model_spec),
    )
    sharders = [shard for each in assembly.strategies if (shard := each.sharder(assembly)) is not None]
    part_by_part = on_meta and bool(sharders)
    if not part_by_part:
        filler(named_tensors(structure.model))
    base_names = set(available)
    if fake_pretrained:
        untrained = [module for role in newly_initialised for module in structure.roles[role]]
        base_names = {name for name in named_tensors(structure.model) if not within(name, untrained)}
    names = adapt(assembly, base_names, newly_initialised, fresh=trained is None)
    if trained is not None:
        check_saved_state(assembly, trained)
    complete(assembly, sharders, trained, names, filler if part_by_part else None)
    prepare(assembly)
    return assembly


def build_shape(plan: Plan, lookup: Lookup, *, processor_folder: Path | None = None) -> Assembly:
    """Build a plan's model on the meta device: names, shapes and the map of the model are right, and nothing is read."""
    import torch

    processor = ProcessorSource(processor_folder, may_lack=True)
    assembly = assemble(plan, lookup, torch.device("meta"), None, processor, on_meta=True)
    base, newly_initialised = base_weights(assembly, shapes_only=True)
    adapt(assembly, base.tensors.keys(), newly_initialised, fresh=False)
    return assembly


@dataclass(frozen=True)
class ProcessorSource:
    """Where the processor comes from."""

    folder: Path | None
    """Where a checkpoint keeps it; None for the one of the base weights."""
    may_lack: bool
    """Whether the model can do without: where only its shape counts."""


def assemble(
    plan: Plan,
    lookup: Lookup,
    device: torch.device,
    precision: str | None,
    processor: ProcessorSource,
    *,
    on_meta: bool,
) -> Assembly:
    """A plan's components and the model that they build, without base weights; with `on_meta` without any values."""
    import torch

    model_spec, run_context = plan.model_spec, plan.run_context
    architecture = cast(ModelArchitecture[Any], restore_component(model_spec.model, lookup))
    towers = {part: cast(VisionTower[Any], restore_component(c, lookup)) for part, c in model_spec.parts.items()}
    peft = cast(PeftMethod[Any], restore_component(model_spec.peft, lookup)) if model_spec.peft else None
    strategies = [cast(MemoryStrategy[Any], restore_component(choice, lookup)) for choice in run_context.memory]
    outputs = describe_towers(plan, architecture, towers)
    register()
    with ExitStack() as building:
        for strategy in strategies:
            building.enter_context(strategy.building())
        if on_meta:
            building.enter_context(parameters_on_meta())
        torch.manual_seed(run_context.seed)
        context = BuildContext(ATTN_IMPLEMENTATION, WINDOWED)
        modules = {part: tower.build(config_of(model_spec.parts[part]), context) for part, tower in towers.items()}
        structure = architecture.build(config_of(model_spec.model), modules, outputs, context)
    sites = attention_sites(plan, architecture, towers, outputs)
    return Assembly(
        plan=plan,
        architecture=architecture,
        towers=towers,
        outputs=outputs,
        structure=structure,
        processor=_processor(model_spec.model, architecture, processor, outputs),
        peft=peft,
        strategies=strategies,
        bindings=bind_attention(plan, lookup, structure, sites),
        own_attention={site.name: site for site in sites if site.own},
        device=device,
        precision=precision or run_context.train.precision,
    )


def base_weights(assembly: Assembly, *, shapes_only: bool) -> tuple[BaseWeights, tuple[str, ...]]:
    """The base's tensors under the model's names, and the roles that they lack."""
    spec, architecture, structure = assembly.plan.model_spec, assembly.architecture, assembly.structure
    base = open_base(spec, architecture, assembly.towers, structure, shapes_only=shapes_only)
    return base, roles_not_in(architecture, structure, base.tensors)


def processor_of(plan: Plan, lookup: Lookup) -> Processor:
    """A plan's processor, without its model; WeightsError where it is not there."""
    choice = plan.model_spec.model
    architecture = cast(ModelArchitecture[Any], restore_component(choice, lookup))
    towers = {part: cast(VisionTower[Any], restore_component(c, lookup)) for part, c in plan.model_spec.parts.items()}
    outputs = describe_towers(plan, architecture, towers)
    return _processor(choice, architecture, ProcessorSource(None, may_lack=False), outputs)


class NoProcessor:
    """Stands for the processor of a model of which configurations alone are there; any use raises the reason."""

    def __init__(self, reason: WeightsError) -> None:
        self.reason = reason

    def __getattr__(self, name: str) -> Any:
        raise self.reason


def _processor(
    choice: Choice,
    architecture: ModelArchitecture[Any],
    source: ProcessorSource,
    outputs: Mapping[str, TowerOutput],
) -> Processor:
    """The processor of a checkpoint, or else the one beside the base weights, or beside the configuration while there are
    no weights. In a rehearsal too it is the host's, which may look at numbers."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    folder = source.folder or folder_of(choice)
    if choice.folder and not (folder and folder.is_dir()):
        folder = Path(choice.folder)
    try:
        with unset_fake_temporarily():
            return cast(Processor, InView(architecture.processor(config_of(choice), folder, outputs)))
    except WeightsError as error:
        if source.folder or not source.may_lack:
            raise
        return cast(Processor, NoProcessor(error))


def bind_attention(
    plan: Plan,
    lookup: Lookup,
    structure: Structure,
    sites: Sequence[AttentionSite],
) -> dict[str, Binding]:
    """Give every attention module of a built model the kernels of its site; sites with none keep the plain one, or the model's own."""
    known = {site.name: site for site in sites}
    bindings = {}
    for name, modules in structure.attention_modules.items():
        if name in known and not known[name].own and (kernels := kernels_for(plan, name, lookup)):
            bindings[name] = Binding(known[name], kernels)
            for module in modules:
                bind(structure.model.get_submodule(module).modules(), bindings[name])
    return bindings


def adapt(
    assembly: Assembly, base_names: Collection[str], newly_initialised: tuple[str, ...] = (), *, fresh: bool
) -> dict[str, str]:
    """Freeze the model, inject the PEFT method into its roles, and free what the plan also trains (in fp32).

    `base_names` are the tensors that the base weights hold, by their names before, and `newly_initialised` the roles that
    they lack. Returns the name now to the name before, for each tensor that was there.
    """
    import torch

    model_spec, model, roles = assembly.plan.model_spec, assembly.model, assembly.structure.roles
    model.requires_grad_(False)
    leaves = tuple(n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None)
    before = named_tensors(model)
    also_train = [
        parameter
        for name, parameter in model.named_parameters()
        if within(name, modules_of(roles, model_spec.also_train)) and parameter.is_floating_point()
    ]
    if assembly.peft:
        chosen = modules_of(roles, model_spec.on)
        targets = [name for name in leaves if within(name, chosen)]
        with hollow(model, getattr(torch, DTYPES[assembly.precision])) if fresh else nullcontext() as waiting:
            assembly.peft.inject(model, targets, fresh=fresh)
        if fresh and not waiting:
            assembly.peft.initialise_from_base(model)
    names = earlier_names(model, before)
    base_keys = frozenset(name for name, earlier in names.items() if earlier in base_names)
    adapter_parameters = frozenset(name for name, _ in model.named_parameters() if name not in names)
    if model_spec.peft and not adapter_parameters and not assembly.trained():
        raise AdapterError(
            f"'{model_spec.peft.label}' changed none of the modules of {', '.join(model_spec.on)}; choose other roles"
        )
    for parameter in also_train:
        parameter.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assembly.adaptation = Adaptation(
        newly_initialised,
        base_keys,
        names,
        leaves,
        adapter_parameters,
        counts={
            "total": sum(parameter.numel() for parameter in model.parameters()),
            "trained": sum(parameter.numel() for parameter in assembly.trained().values()),
        },
    )
    return names


def refuse_empty_roles(assembly: Assembly) -> None:
    """AdapterError for a role to train that this model has nothing in, such as the head of a model that has tied it."""
    spec, roles = assembly.plan.model_spec, assembly.structure.roles
    for key, wanted in (("on", spec.on), ("also_train", spec.also_train)):
        if empty := [role for role in wanted if not modules_of(roles, [role])]:
            what = assembly.architecture.roles.get(empty[0], "")
            raise AdapterError(
                f"peft.{key}: this model has nothing in the role '{empty[0]}'{f' ({what})' if what else ''}; choose among "
                f"{', '.join(role for role in roles if roles[role])}"
            )


def prepare(assembly: Assembly) -> None:
    """Let the memory strategies change the assembled model; PlanRefused where a second one replaces the loss."""
    replaced = ""
    for strategy in assembly.strategies:
        plain = assembly.cross_entropy
        strategy.prepare(assembly)
        assembly.cross_entropy = strategy.loss(assembly) or assembly.cross_entropy
        if assembly.cross_entropy is not plain:
            if replaced:
                # A plan that could be seen to do so was refused before: one of these replaces it in `prepare`.
                raise PlanRefused(
                    f"'{replaced}' and '{strategy.name}' both compute the loss; remove one of them from memory"
                )
            replaced = strategy.name


def check_saved_state(assembly: Assembly, trained: Mapping[str, Tensor]) -> None:
    """Compare a checkpoint's tensors with those that it must hold; AdapterError says what does not match."""
    check_keys(assembly.state_to_save(), {name: tuple(tensor.shape) for name, tensor in trained.items()})
