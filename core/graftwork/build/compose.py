"""The one construction path: from a plan to a model that trains, evaluates, or only has its shape."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graftwork.attention.kernels import Binding, bind
from graftwork.attention.transformers import ATTN_IMPLEMENTATION, register
from graftwork.build.filling import base_tensors, check_keys, fill, roles_not_in
from graftwork.config.restore import restore_component
from graftwork.config.sites import attention_sites, describe_towers, kernels_for
from graftwork.contracts.anatomy import DTYPES, BuildContext, Structure, TowerOutput, modules_of, named_tensors, within
from graftwork.contracts.assembly import Assembly
from graftwork.contracts.kinds import MemoryStrategy, ModelArchitecture, PeftMethod, VisionTower
from graftwork.contracts.lookup import Lookup
from graftwork.contracts.model import Processor
from graftwork.contracts.plan import Choice, Plan, config_of, folder_of
from graftwork.errors import AdapterError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor


def build(
    plan: Plan,
    lookup: Lookup,
    *,
    device: str | None = None,
    precision: str | None = None,
    meta: bool = False,
    fake_pretrained: bool = False,
    trained: Mapping[str, Tensor] | None = None,
    processor_folder: Path | None = None,
) -> Assembly:
    """Build a plan's model.

    `trained` are the tensors of a checkpoint, loaded strictly; without them everything new starts fresh. With `meta`
    nothing is read or allocated: only names, shapes and the map of the model are right. With `fake_pretrained` the plan has no
    weights, and everything is as if it had all that is not in a fresh role, with random values. `processor_folder` is where a
    checkpoint keeps its processor. Raises WeightsError and AdapterError.
    """
    import torch

    model_spec, run_context = plan.model_spec, plan.run_context
    architecture = cast(ModelArchitecture[Any], restore_component(model_spec.model, lookup))
    towers = {part: cast(VisionTower[Any], restore_component(c, lookup)) for part, c in model_spec.parts.items()}
    peft = cast(PeftMethod[Any], restore_component(model_spec.peft, lookup)) if model_spec.peft else None
    strategies = [cast(MemoryStrategy[Any], restore_component(choice, lookup)) for choice in run_context.memory]
    outputs = describe_towers(plan, architecture, towers)
    register()

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with ExitStack() as building:
        for strategy in strategies:
            building.enter_context(strategy.building())
        if meta or model_spec.model.weights or trained is not None:
            from accelerate import init_empty_weights

            building.enter_context(init_empty_weights(include_buffers=False))
        torch.manual_seed(run_context.seed)
        site = BuildContext(attn_implementation=ATTN_IMPLEMENTATION)
        modules = {part: tower.build(config_of(model_spec.parts[part]), site) for part, tower in towers.items()}
        structure = architecture.build(config_of(model_spec.model), modules, outputs, site)

    assembly = Assembly(
        plan=plan,
        architecture=architecture,
        towers=towers,
        outputs=outputs,
        structure=structure,
        processor=_processor(
            model_spec.model, architecture, processor_folder, outputs, shape_only=meta or fake_pretrained
        ),
        peft=peft,
        strategies=strategies,
        bindings=bind_attention(plan, lookup, structure, architecture, towers, outputs),
        device=torch.device("meta") if meta else where,
        precision=precision or run_context.train.precision,
    )
    available = base_tensors(model_spec, architecture, towers, structure, shapes_only=meta)
    assembly.newly_initialised = roles_not_in(architecture, structure, available)
    if not meta:
        fill(
            model_spec,
            structure,
            available,
            assembly.newly_initialised,
            getattr(torch, DTYPES[assembly.precision]),
            trained,
        )
    untrained = [module for role in assembly.newly_initialised for module in structure.roles[role]]
    known = {
        id(tensor)
        for name, tensor in named_tensors(structure.model).items()
        if name in available or (fake_pretrained and not within(name, untrained))
    }
    adapt(assembly, fresh=trained is None and not meta)
    assembly.base_keys = frozenset(n for n, tensor in named_tensors(structure.model).items() if id(tensor) in known)
    if meta:
        return assembly
    assembly.base_copy = {
        name: parameter.detach().clone() for name, parameter in assembly.trained().items() if name in assembly.base_keys
    }
    if trained is not None:
        load_saved_state(assembly, trained)
    for strategy in strategies:
        strategy.quantize(assembly)
    structure.model.to(where)
    for strategy in strategies:
        strategy.prepare(assembly)
    return assembly


class NoProcessor:
    """Stands for the processor of a model of which configurations alone are there; any use raises the reason."""

    def __init__(self, reason: WeightsError) -> None:
        self.reason = reason

    def __getattr__(self, name: str) -> Any:
        raise self.reason


def _processor(
    choice: Choice,
    architecture: ModelArchitecture[Any],
    of_checkpoint: Path | None,
    outputs: Mapping[str, TowerOutput],
    *,
    shape_only: bool,
) -> Processor:
    """The processor of a checkpoint, or else the one that lies with the base weights, or with the configuration while
    there are none; a shape alone may do without that one."""
    folder = of_checkpoint or folder_of(choice)
    if choice.folder and not (folder and folder.is_dir()):
        folder = Path(choice.folder)
    try:
        return architecture.processor(config_of(choice), folder, outputs)
    except WeightsError as error:
        if of_checkpoint or not shape_only:
            raise
        return cast(Processor, NoProcessor(error))


def bind_attention(
    plan: Plan,
    lookup: Lookup,
    structure: Structure,
    architecture: ModelArchitecture[Any],
    towers: Mapping[str, VisionTower[Any]],
    outputs: Mapping[str, TowerOutput],
) -> dict[str, Binding]:
    """Give every attention module of a built model the kernels of its site; sites with none keep the plain one."""
    known = {site.name: site for site in attention_sites(plan, architecture, towers, outputs)}
    bindings = {}
    for name, modules in structure.attention_modules.items():
        if name in known and (kernels := kernels_for(plan, name, lookup)):
            bindings[name] = Binding(known[name], kernels)
            for module in modules:
                bind(structure.model.get_submodule(module).modules(), bindings[name])
    return bindings


def adapt(assembly: Assembly, *, fresh: bool) -> None:
    """Freeze the model, apply the PEFT method to its roles, and free what the plan also trains (in fp32)."""
    model_spec, model, roles = assembly.plan.model_spec, assembly.model, assembly.structure.roles
    model.requires_grad_(False)
    assembly.leaves = tuple(n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None)
    also = [
        parameter
        for name, parameter in model.named_parameters()
        if within(name, modules_of(roles, model_spec.also_train)) and parameter.is_floating_point()
    ]
    if assembly.peft:
        before = {id(parameter) for parameter in model.parameters()}
        chosen = modules_of(roles, model_spec.on)
        targets = [name for name in assembly.leaves if name in chosen or within(name, chosen)]
        assembly.peft.inject(model, targets, fresh=fresh)
        assembly.adapter_parameters = frozenset(name for name, p in model.named_parameters() if id(p) not in before)
        if not assembly.adapter_parameters and not assembly.trained():
            raise AdapterError(
                f"'{model_spec.peft.label if model_spec.peft else ''}' changed none of the modules of {', '.join(model_spec.on)}; "
                "choose other roles"
            )
    for parameter in also:
        parameter.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assembly.counted = assembly.counts()


def load_saved_state(assembly: Assembly, trained: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's tensors, all of them and nothing else; AdapterError says what does not match."""
    expected = assembly.state_to_save()
    check_keys(expected, {name: tuple(tensor.shape) for name, tensor in trained.items()})
    for name, tensor in expected.items():
        tensor.data = trained[name].to(tensor.device)
