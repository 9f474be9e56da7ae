"""Resolving: plans from run files, every reason at once, what the machine must have, and the way back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from graftwork import contracts
from graftwork.config.machine import Machine
from graftwork.config.resolve import resolve
from graftwork.config.runfile import RunFile, parse_run
from graftwork.contracts import Choice, Component, DictLookup, Lookup, Plan, Requires, Support, setting, unsupported
from graftwork.errors import PlanRefused, WeightsError


@dataclass(frozen=True)
class Layers:
    layers: int = setting(2, "How many layers", minimum=1)

    def __post_init__(self) -> None:
        if self.layers == 13:
            raise ValueError("13 layers bring bad luck; choose another number")


@dataclass(frozen=True)
class File:
    path: Path | None = setting(None, "The file")


def concrete(component: type[Component[Any]]) -> type[Component[Any]]:
    """Resolving builds nothing, so what only builds may stay unwritten."""
    component.__abstractmethods__ = frozenset()
    return component


@concrete
class Tiny(contracts.ModelArchitecture[Layers]):
    """A model with a part that it needs, one that it can do without, and one that is rarely wanted."""

    name = "tiny"
    Settings = Layers
    parts: ClassVar[Mapping[str, contracts.TowerSlot]] = {
        "low": contracts.TowerSlot("sees", "eye"),
        "high": contracts.TowerSlot("sees more", "eye", optional=True),
        "depth": contracts.TowerSlot("sees how far things are", None),
    }
    roles: ClassVar[Mapping[str, str]] = {"language.mlp": "", "language.attention": "", "connector": ""}
    overflows_in = ("fp16",)

    def describe_towers(
        self, config: Mapping[str, Any], towers: Mapping[str, Any]
    ) -> Mapping[str, contracts.TowerOutput]:
        if len({described["size"] for _, described in towers.values()}) > 1:
            raise WeightsError(
                "the parts see images of different sizes; name towers of one size", ["low: 4", "high: 8"]
            )
        return {part: tower.describe(described) for part, (tower, described) in towers.items()}

    def sites(
        self, config: Mapping[str, Any], towers: Mapping[str, contracts.TowerOutput]
    ) -> list[contracts.AttentionSite]:
        return [contracts.AttentionSite("language", head_dim=8, heads=2, kv_heads=1, causal=True, padding=True)]


@concrete
class Eye(contracts.VisionTower[Layers]):
    """A tower that wants a folder."""

    name = "eye"
    Settings = Layers

    def describe(self, config: Mapping[str, Any], size: int | None = None) -> contracts.TowerOutput:
        return contracts.TowerOutput((8,), ((2, 2),), contracts.PixelSettings(4, (0, 0, 0), (1, 1, 1)))

    def sites(self, config: Mapping[str, Any]) -> list[contracts.AttentionSite]:
        return [contracts.AttentionSite("any", head_dim=4, heads=2, kv_heads=2, causal=False, padding=False)]


@concrete
class Adapter(contracts.PeftMethod[Layers]):
    """A method that has nothing against any plan."""

    name = "adapter"
    Settings = Layers


@concrete
class Picky(contracts.PeftMethod[Any]):
    """A method that wants three seeds, and packages that nobody has."""

    name = "picky"
    requires = Requires(("pytest>=1", "pytest>=1000", "no-such-package-at-all"), cuda=(8, 0))

    def validate(self, plan: Plan) -> Iterable[str]:
        if plan.run_context.seed != 3:
            yield f"the seed is {plan.run_context.seed}, and it works with 3 only; set seed = 3"


@concrete
class Plain(contracts.AttentionKernel[Any]):
    """A kernel for everything."""

    name = "plain"

    def supports(self, case: Any) -> Support:
        return Support(True)


@concrete
class Fast(contracts.AttentionKernel[Any]):
    """A kernel for CUDA devices."""

    name = "fast"

    def supports(self, case: Any) -> Support:
        return Support(True) if case.device == "cuda" else unsupported(f"the tensors are on the {case.device}")


class Saver(contracts.MemoryStrategy[Any]):
    """A strategy for large devices."""

    name = "saver"
    requires = Requires(cuda=(8, 0))


@concrete
class Colours(contracts.Evaluator[Layers]):
    """A benchmark."""

    name = "colours"
    Settings = Layers


@concrete
class Lines(contracts.DataSource[File]):
    """A source."""

    name = "lines"
    Settings = File


@concrete
class Keep(contracts.DataOperator[Any]):
    """An operator."""

    name = "keep"


LOOKUP = DictLookup(Tiny, Eye, Adapter, Picky, Plain, Fast, Saver, Colours, Lines, Keep)
CPU = Machine()
H100 = Machine(("NVIDIA H100",), (9, 0), cuda=True)
T4 = Machine(("Tesla T4", "Tesla T4"), (7, 5), cuda=True, bf16=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (("base", 4), ("eye", 4), ("big-eye", 8)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"size": size}), encoding="utf-8")
    (tmp_path / "empty").mkdir()
    return tmp_path


def table(**changes: Any) -> dict[str, Any]:
    """A run file that works, with some tables replaced."""
    parts = {"low": {"use": "eye", "weights": "eye", "layers": 3}, "high": {"config": "eye"}}
    return {
        "model": {"use": "tiny", "weights": "base", "parts": parts},
        "peft": {"use": "adapter", "on": ["language"], "also_train": ["connector"]},
    } | changes


def run_of(folder: Path, **changes: Any) -> RunFile:
    return parse_run(table(**changes), folder)


def reasons(folder: Path, *, machine: Machine | None = None, lookup: Lookup = LOOKUP, **changes: Any) -> list[str]:
    with pytest.raises(PlanRefused) as caught:
        resolve(run_of(folder, **changes), lookup, machine, kernels=["plain"])
    return list(caught.value.details)


def test_a_run_becomes_a_plan_with_everything_in_it(folder: Path) -> None:
    run = run_of(
        folder,
        seed=5,
        attention={"prefer": ["fast", "plain"], "sites": {"vision.low": ["plain"]}},
        memory={"use": ["saver"]},
        data={"strict": True, "source": [{"use": "lines", "path": "a.json"}], "operator": [{"use": "keep"}]},
        train={"steps": 3},
        evaluate={"on": ["colours"], "colours": {"layers": 7}},
    )
    plan = resolve(run, LOOKUP, H100, kernels=["plain"])
    model_spec, run_context = plan.model_spec, plan.run_context
    assert model_spec.model == Choice(
        "model",
        "tiny",
        plugin="dictionary",
        distribution="dictionary",
        version="0",
        settings={"layers": 2},
        weights=contracts.WeightsRef("base", str(folder / "base")),
        config={"size": 4},
        folder=str(folder / "base"),
    )
    assert list(model_spec.parts) == ["low", "high"]
    assert model_spec.parts["low"].settings == {"layers": 3}
    assert (model_spec.parts["high"].name, model_spec.parts["high"].weights) == ("eye", None)
    assert model_spec.parts["high"].folder == str(folder / "eye")
    assert model_spec.peft is not None
    assert (model_spec.peft.name, model_spec.on, model_spec.also_train) == ("adapter", ("language",), ("connector",))
    assert {site: [kernel.name for kernel in kernels] for site, kernels in run_context.attention.items()} == {
        "*": ["fast", "plain"],
        "vision.low": ["plain"],
    }
    assert run_context.sources[0].settings == {"path": str(folder / "a.json")}
    assert run_context.evaluate[0].settings == {"layers": 7}
    assert [choice.name for choice in (*run_context.memory, *run_context.operators)] == ["saver", "keep"]
    assert (run_context.seed, run_context.strict_data, run_context.train.steps) == (5, True, 3)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_callers_kernels_serve_where_the_run_file_prefers_none(folder: Path) -> None:
    def kernels(attention: dict[str, Any], *names: str) -> dict[str, list[str]]:
        plan = resolve(run_of(folder, attention=attention), LOOKUP, kernels=names)
        return {site: [choice.name for choice in choices] for site, choices in plan.run_context.attention.items()}

    assert kernels({}, "fast", "plain") == {"*": ["fast", "plain"]}
    assert kernels({"sites": {"language": ["plain"]}}, "fast") == {"language": ["plain"], "*": ["fast"]}
    assert kernels({"prefer": ["plain"]}, "fast") == {"*": ["plain"]}
    assert kernels({}) == {}


def test_an_optional_part_can_be_left_empty(folder: Path) -> None:
    parts = {"low": {"weights": "eye"}, "high": {"use": "none"}, "depth": {"use": "none"}}
    plan = resolve(run_of(folder, model={"use": "tiny", "weights": "base", "parts": parts}), LOOKUP)
    assert list(plan.model_spec.parts) == ["low"]


def test_a_base_without_an_adapter_is_a_plan_too(folder: Path) -> None:
    assert resolve(run_of(folder, peft={"also_train": ["connector"]}), LOOKUP).model_spec.peft is None


def test_every_reason_is_said_at_once_with_its_path(folder: Path) -> None:
    run = run_of(
        folder,
        model={
            "use": "tiny",
            "weights": "bsae",
            "wieghts": "x",
            "parts": {"low": {"layers": 0}, "lwo": {"use": "eye"}},
        },
        peft={"use": "adapter", "on": ["langage"], "also_train": ["conector"], "layers": 13},
        attention={"prefer": ["fsat"]},
        memory={"use": ["svaer"]},
        data={"source": [{"use": "lines"}, {"use": "lines", "paht": "x"}]},
        train={"precision": "fp16"},
        evaluate={"on": ["colours"], "colours": {"layers": "many"}},
    )
    with pytest.raises(PlanRefused) as caught:
        resolve(replace(run, source=Path("run.toml")), LOOKUP, CPU)
    assert str(caught.value).splitlines() == [
        "'run.toml' cannot work, for 14 reasons",
        "  model.wieghts: there is no such setting; did you mean 'weights'?",
        f"  model.weights: there is no folder '{folder}/bsae', and 'bsae' is no hub id (owner/name or owner/name@revision); correct the path",
        "  model.parts.lwo: 'tiny' has no such part; did you mean 'low'?",
        "  model.parts.low.layers: found 0, wanted integer ≥ 1",
        "  model.parts.high: 'eye' needs a folder of weights or of configurations: set 'weights' or 'config'",
        "  peft: 13 layers bring bad luck; choose another number",
        "  peft.on: 'langage' is no role of 'tiny'; did you mean 'language'?",
        "  peft.also_train: 'conector' is no role of 'tiny'; did you mean 'connector'?",
        "  train.precision: 'tiny' is known to overflow in fp16; use bf16 or fp32, or set train.force_precision = true",
        "  train.precision: fp16 needs a CUDA device, and this machine has none; use bf16 or fp32",
        "  attention.prefer: nothing is called 'fsat'; known: fast, plain",
        "  memory.svaer: nothing is called 'svaer'; known: saver",
        "  data.source.1.paht: there is no such setting; did you mean 'path'?",
        "  evaluate.colours.layers: found 'many', wanted integer ≥ 1",
    ]


def test_an_unknown_model_leaves_the_rest_to_be_judged(folder: Path) -> None:
    found = reasons(folder, model={"use": "tinny"}, peft={"use": "lorra", "on": ["x"]})
    assert found == [
        "model: nothing is called 'tinny'; known: tiny",
        "peft: nothing is called 'lorra'; known: adapter, picky",
    ]


def test_roles_are_listed_where_none_is_near(folder: Path) -> None:
    known = "connector, language, language.attention, language.mlp"
    assert reasons(folder, peft={"use": "adapter", "on": ["zzz"]}) == [
        f"peft.on: 'zzz' is no role of 'tiny'; known: {known}"
    ]
    assert reasons(folder, peft={"use": "adapter"}) == [
        f"peft.on: is missing, wanted roles of 'tiny' to adapt; known: {known}"
    ]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"low": {"use": "none"}}, "model.parts.low.use: 'tiny' cannot do without this part; name a tower"),
        ({"depth": {"weights": "eye"}}, "model.parts.depth.use: is missing, wanted the name of a vision tower"),
        ({"low": {"use": "ey", "weights": "eye"}}, "model.parts.low: nothing is called 'ey'; known: eye"),
        (
            {"low": {"weights": "empty"}},
            "model.parts.low: '{folder}/empty' holds no config.json; is it the right folder?",
        ),
    ],
)
def test_a_part_that_cannot_be_filled_is_refused(folder: Path, parts: dict[str, Any], reason: str) -> None:
    rest = {"low": {"weights": "eye"}, "high": {"use": "none"}}
    found = reasons(folder, model={"use": "tiny", "weights": "base", "parts": rest | parts})
    assert found == [reason.format(folder=folder)]


def test_towers_that_do_not_fit_together_are_refused(folder: Path) -> None:
    parts = {"low": {"weights": "eye"}, "high": {"weights": "big-eye"}}
    assert reasons(folder, model={"use": "tiny", "weights": "base", "parts": parts}) == [
        "model: the parts see images of different sizes; name towers of one size",
        "model: low: 4",
        "model: high: 8",
    ]


def test_a_site_that_the_model_does_not_have_is_refused(folder: Path) -> None:
    sites = {"vison.low": ["plain"], "mining": ["plain"]}
    assert reasons(folder, attention={"sites": sites}) == [
        "attention.sites.mining: 'tiny' has no attention site 'mining'; known: language, vision.low, vision.high",
        "attention.sites.vison.low: 'tiny' has no attention site 'vison.low'; did you mean 'vision.low'?",
    ]


def test_a_site_that_no_kernel_computes_is_refused_only_where_the_machine_is_known(folder: Path) -> None:
    attention = {"prefer": ["plain"], "sites": {"language": ["fast"]}}
    assert reasons(folder, machine=CPU, attention=attention) == [
        "attention: no kernel computes what 'language' needs (fast: the tensors are on the cpu); name one more"
    ]
    run = run_of(folder, attention=attention)
    assert resolve(run, LOOKUP).model_spec == resolve(run, LOOKUP, H100).model_spec


def test_precision_must_be_one_that_model_and_machine_bear(folder: Path) -> None:
    forced = {"precision": "fp16", "force_precision": True}
    assert resolve(run_of(folder, train=forced), LOOKUP, T4).run_context.train.precision == "fp16"
    assert reasons(folder, machine=CPU, train=forced) == [
        "train.precision: fp16 needs a CUDA device, and this machine has none; use bf16 or fp32"
    ]
    assert reasons(folder, machine=T4, train={"precision": "bf16"}) == [
        "train.precision: this machine (Tesla T4) does not compute in bf16; use fp32 or fp16"
    ]
    assert resolve(run_of(folder, train={"precision": "fp32"}), LOOKUP, T4)
    assert resolve(run_of(folder), LOOKUP, CPU)


def test_what_a_component_lacks_and_what_it_objects_to_are_reasons(folder: Path) -> None:
    peft = {"use": "picky", "on": ["language"]}
    objection = "peft: the seed is 17, and it works with 3 only; set seed = 3"
    lacking = "'picky' needs pytest>=1000 and no-such-package-at-all"
    pip = 'pip install "pytest>=1000" "no-such-package-at-all"'
    assert reasons(folder, peft=peft) == [f"peft: {lacking}: {pip}", objection]
    assert reasons(folder, peft=peft, seed=3) == [f"peft: {lacking}: {pip}"]


def test_the_advice_on_a_missing_package_is_the_components_own(folder: Path) -> None:
    @concrete
    class Built(contracts.PeftMethod[Any]):
        """A method whose library is built here."""

        name = "built"
        requires = Requires(("no-such-package-at-all",), install="--no-build-isolation no-such-package-at-all")

    lookup = DictLookup(Tiny, Eye, Plain, Built)
    assert reasons(folder, lookup=lookup, peft={"use": "built", "on": ["language"]}) == [
        "peft: 'built' needs no-such-package-at-all: pip install --no-build-isolation no-such-package-at-all"
    ]


def test_hardware_is_judged_where_the_machine_is_known(folder: Path) -> None:
    memory, wanted = {"use": ["saver"]}, "memory.saver: 'saver' needs a CUDA device of compute capability 8.0 or more"
    train = {"precision": "fp32"}
    assert reasons(folder, machine=CPU, memory=memory, train=train) == [
        f"{wanted}, and this machine has no CUDA device"
    ]
    assert reasons(folder, machine=T4, memory=memory, train=train) == [f"{wanted}, and this machine's has 7.5"]
    run = run_of(folder, memory=memory)
    assert resolve(run, LOOKUP, H100) == resolve(run, LOOKUP)
