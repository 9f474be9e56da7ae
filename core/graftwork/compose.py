"""The one construction path: from a plan to a model that trains, evaluates, or only has its shape."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graftwork import attention
from graftwork.errors import AdapterError, WeightsError
from graftwork.filling import base_tensors, census, config_of, fill, folder_of, missing_roles, named_tensors, within
from graftwork.kinds import (
    AttentionKernel,
    AttentionSite,
    MemoryStrategy,
    ModelArchitecture,
    PeftMethod,
    Site,
    Structure,
    TowerOutput,
    VisionTower,
)
from graftwork.lookup import Lookup
from graftwork.model import Processor
from graftwork.plan import Choice, Plan
from graftwork.resolve import restore_component
from graftwork.stepping import cross_entropy

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass
class Assembly:
    """A built model with everything around it that a run, an evaluation or a merge needs."""

    plan: Plan
    architecture: ModelArchitecture[Any]
    towers: Mapping[str, VisionTower[Any]]
    outputs: Mapping[str, TowerOutput]
    structure: Structure
    processor: Processor
    peft: PeftMethod[Any] | None
    strategies: Sequence[MemoryStrategy[Any]]
    bindings: Mapping[str, attention.Binding]
    device: torch.device
    precision: str
    fresh: tuple[str, ...] = ()
    """Roles that the base weights lack."""
    from_base: frozenset[str] = frozenset()
    """Names, in the built model, of the tensors that the base weights hold."""
    leaves: tuple[str, ...] = ()
    """The modules that held parameters themselves before the PEFT method was applied."""
    of_method: frozenset[str] = frozenset()
    """Names of the parameters that the PEFT method added."""
    base_values: dict[str, Tensor] = field(default_factory=dict)
    """The base's values, on the CPU, of its tensors that are trained."""
    cross_entropy: Callable[[Any, Tensor, Tensor], Tensor] = cross_entropy
    """From the model, hidden states `[labels, width]` and labels to the summed loss; a memory strategy may replace it."""
    running: Callable[[Callable[[], Any]], Any] = lambda work: work()
    """How to run something that calls the model, outside a stepper; an engine whose weights come and go replaces it."""
    counted: dict[str, int] | None = None
    """What `counts` returns, counted before memory strategies keep weights in another way."""

    @property
    def model(self) -> Any:
        """The model (see `model.VisionLanguageModel`), a `torch.nn.Module`."""
        return self.structure.model

    def added(self) -> dict[str, Tensor]:
        """Every tensor that the base does not have or that is trained, by name: what a checkpoint must hold."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return {
            name: tensor
            for name, tensor in named_tensors(self.model).items()
            if name in trained or name not in self.from_base
        }

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that require gradients, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def counts(self) -> dict[str, int]:
        """How many numbers the model has (`total`), and how many are trained (`trained`); tied ones count once."""
        return self.counted or {
            "total": sum(parameter.numel() for parameter in self.model.parameters()),
            "trained": sum(parameter.numel() for parameter in self.trained().values()),
        }

    @property
    def trains_vision(self) -> bool:
        """Whether something that the base lacks, or that is trained, lies in a vision tower."""
        towers = tuple(f"{name}." for part in self.towers for name in self.structure.roles[f"vision.{part}"])
        return any(name.startswith(towers) for name in self.added()) if towers else False

    def autocast(self) -> Any:
        """The context in which the model computes at this assembly's precision."""
        import torch

        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, DTYPES[self.precision]))

    @property
    def rounded(self) -> tuple[str, ...]:
        """The memory strategies with which the model computes something else than without."""
        return tuple(strategy.name for strategy in self.strategies if strategy.rounds and strategy.rounds.outputs)

    @property
    def switchable(self) -> bool:
        """Whether `off` can make a difference: false where only what the base lacks is trained (a fresh connector)."""
        return bool(self.of_method or self.base_values)

    @contextmanager
    def whole(self, names: Collection[str]) -> Iterator[None]:
        """While entered, the parameters of these names hold all their numbers, which may be replaced. Collective."""
        parameters = {name: p for name, p in self.model.named_parameters() if name in names}
        with ExitStack() as stack:
            for strategy in self.strategies:
                stack.enter_context(strategy.whole(parameters.values()))
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """While entered, the model computes what its base computes. What the base never had stays as it is. Collective."""
        with self.peft.off(self.model) if self.peft else nullcontext():
            kept = self._replace(self.base_values)
            try:
                yield
            finally:
                self._replace(kept)

    def _replace(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give parameters other values; returns those that they had."""
        kept = {}
        with self.whole(values) if values else nullcontext():
            parameters = dict(self.model.named_parameters())
            for name, value in values.items():
                kept[name] = parameters[name].data
                parameters[name].data = value.to(kept[name].device)
        return kept

    def attention_report(self) -> dict[str, Any]:
        """Which kernel really ran at each site, how often, and why others were passed over."""
        return attention.report(self.bindings)


def build(
    plan: Plan,
    lookup: Lookup,
    *,
    device: str | None = None,
    precision: str | None = None,
    meta: bool = False,
    imagined: bool = False,
    trained: Mapping[str, Tensor] | None = None,
    processor_folder: Path | None = None,
) -> Assembly:
    """Build a plan's model.

    `trained` are the tensors of a checkpoint, loaded strictly; without them everything new starts fresh. With `meta`
    nothing is read or allocated: only names, shapes and the map of the model are right. With `imagined` the plan has no
    weights, and everything is as if it had all that is not in a fresh role, with random values. `processor_folder` is where a
    checkpoint keeps its processor. Raises WeightsError and AdapterError.
    """
    import torch

    identity, circumstance = plan.identity, plan.circumstance
    architecture = cast(ModelArchitecture[Any], restore_component(identity.model, lookup))
    towers = {part: cast(VisionTower[Any], restore_component(c, lookup)) for part, c in identity.parts.items()}
    peft = cast(PeftMethod[Any], restore_component(identity.peft, lookup)) if identity.peft else None
    strategies = [cast(MemoryStrategy[Any], restore_component(choice, lookup)) for choice in circumstance.memory]
    outputs = describe_towers(plan, architecture, towers)
    attention.register()

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with ExitStack() as building:
        for strategy in strategies:
            building.enter_context(strategy.building())
        if meta or identity.model.weights or trained is not None:
            from accelerate import init_empty_weights

            building.enter_context(init_empty_weights(include_buffers=False))
        torch.manual_seed(circumstance.seed)
        site = Site(attn_implementation=attention.ATTN_IMPLEMENTATION)
        modules = {part: tower.build(config_of(identity.parts[part]), site) for part, tower in towers.items()}
        structure = architecture.build(config_of(identity.model), modules, outputs, site)

    assembly = Assembly(
        plan=plan,
        architecture=architecture,
        towers=towers,
        outputs=outputs,
        structure=structure,
        processor=_processor(identity.model, architecture, processor_folder, outputs, shape_only=meta or imagined),
        peft=peft,
        strategies=strategies,
        bindings=bind_attention(plan, lookup, structure, architecture, towers, outputs),
        device=torch.device("meta") if meta else where,
        precision=precision or circumstance.train.precision,
    )
    available = base_tensors(identity, architecture, towers, structure, shapes_only=meta)
    assembly.fresh = missing_roles(architecture, structure, available)
    if not meta:
        fill(identity, structure, available, assembly.fresh, getattr(torch, DTYPES[assembly.precision]), trained)
    untrained = [module for role in assembly.fresh for module in structure.roles[role]]
    known = {
        id(tensor)
        for name, tensor in named_tensors(structure.model).items()
        if name in available or (imagined and not within(name, untrained))
    }
    adapt(assembly, fresh=trained is None and not meta)
    assembly.from_base = frozenset(n for n, tensor in named_tensors(structure.model).items() if id(tensor) in known)
    if meta:
        return assembly
    assembly.base_values = {
        name: parameter.detach().clone() for name, parameter in assembly.trained().items() if name in assembly.from_base
    }
    if trained is not None:
        load_added(assembly, trained)
    for strategy in strategies:
        strategy.compress(assembly)
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


def describe_towers(
    plan: Plan, architecture: ModelArchitecture[Any], towers: Mapping[str, VisionTower[Any]]
) -> Mapping[str, TowerOutput]:
    """What each part's tower computes in this plan."""
    identity = plan.identity
    pairs = {part: (tower, config_of(identity.parts[part])) for part, tower in towers.items()}
    return architecture.describe_towers(config_of(identity.model), pairs)


def attention_sites(
    plan: Plan,
    architecture: ModelArchitecture[Any],
    towers: Mapping[str, VisionTower[Any]],
    outputs: Mapping[str, TowerOutput],
) -> list[AttentionSite]:
    """Every site of a plan's model, towers included (as `vision.PART`), known without weights."""
    from dataclasses import replace

    sites = list(architecture.sites(config_of(plan.identity.model), outputs))
    for part, tower in towers.items():
        sites += [replace(site, name=f"vision.{part}") for site in tower.sites(config_of(plan.identity.parts[part]))]
    return sites


def kernels_for(plan: Plan, site: str, lookup: Lookup) -> list[tuple[str, AttentionKernel[Any]]]:
    """The kernels to try at a site, by name, in order of preference."""
    choices = plan.circumstance.attention.get(site, plan.circumstance.attention.get("*", []))
    return [(choice.name, cast(AttentionKernel[Any], restore_component(choice, lookup))) for choice in choices]


def bind_attention(
    plan: Plan,
    lookup: Lookup,
    structure: Structure,
    architecture: ModelArchitecture[Any],
    towers: Mapping[str, VisionTower[Any]],
    outputs: Mapping[str, TowerOutput],
) -> dict[str, attention.Binding]:
    """Give every attention module of a built model the kernels of its site; sites with none keep the plain one."""
    known = {site.name: site for site in attention_sites(plan, architecture, towers, outputs)}
    bindings = {}
    for name, modules in structure.sites.items():
        if name in known and (kernels := kernels_for(plan, name, lookup)):
            bindings[name] = attention.Binding(known[name], kernels)
            for module in modules:
                attention.bind(structure.model.get_submodule(module).modules(), bindings[name])
    return bindings


def adapt(assembly: Assembly, *, fresh: bool) -> None:
    """Freeze the model, apply the PEFT method to its roles, and free what the plan also trains (in fp32)."""
    identity, model, roles = assembly.plan.identity, assembly.model, assembly.structure.roles
    model.requires_grad_(False)
    assembly.leaves = tuple(n for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None)
    also = [
        parameter
        for name, parameter in model.named_parameters()
        if within(name, modules_of(roles, identity.also_train)) and parameter.is_floating_point()
    ]
    if assembly.peft:
        before = {id(parameter) for parameter in model.parameters()}
        chosen = modules_of(roles, identity.on)
        targets = [name for name in assembly.leaves if name in chosen or within(name, chosen)]
        assembly.peft.apply(model, targets, fresh=fresh)
        assembly.of_method = frozenset(name for name, p in model.named_parameters() if id(p) not in before)
        if not assembly.of_method and not assembly.trained():
            raise AdapterError(
                f"'{identity.peft.label if identity.peft else ''}' changed none of the modules of {', '.join(identity.on)}; "
                "choose other roles"
            )
    for parameter in also:
        parameter.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assembly.counted = assembly.counts()


def modules_of(roles: Mapping[str, tuple[str, ...]], wanted: Sequence[str]) -> list[str]:
    """The modules of the wanted roles, where `language` means every `language.*`."""
    return [
        module
        for role, modules in roles.items()
        if any(role == name or role.startswith(f"{name}.") for name in wanted)
        for module in modules
    ]


def load_added(assembly: Assembly, trained: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's tensors, all of them and nothing else; AdapterError says what does not match."""
    expected = assembly.added()
    census(expected, {name: tuple(tensor.shape) for name, tensor in trained.items()})
    for name, tensor in expected.items():
        tensor.data = trained[name].to(tensor.device)
