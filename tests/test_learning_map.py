"""The learning map: what should learn and cannot is refused before the first step, and what did not is said by everything that shows a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import COMPONENTS, LORA, NEVER_READ, PlanOf, StepTaken, interrupt_at, plan_of
from tiny_runs import Interrupted as Stopped
from vlm_families import write

from graftwork import NoSettings
from graftwork.build import compose
from graftwork.checkpoint import learning
from graftwork.checkpoint.learning import LearningMap, ModuleLearning, RoleShape, matches, short_names
from graftwork.cli.console import open_console
from graftwork.cli.printing import print_learned
from graftwork.config.resolve import resolve
from graftwork.config.runfile import parse_run
from graftwork.contracts import Assembly, DictLookup, Event, MemoryStrategy, NotLearning, RunStarted
from graftwork.contracts.stepper import stepper_for
from graftwork.data.training_data import load_training_data
from graftwork.errors import AdapterError, CheckpointError, PlanRefused, RunFileError
from graftwork.jobs.checkpoint import open as open_job
from graftwork.jobs.importing import Inspected, inspect
from graftwork.report.learning import learning_map
from graftwork.report.learning_wording import findings, role_lines, summary
from graftwork.train.feeding import Feed
from graftwork.train.learning import Learning
from graftwork.train.loop import train
from graftwork_hf_vlm import HfVlm
from graftwork_lora import Lora

SEEING = LORA | {"on": ["language.attention", "language.mlp", "vision.low"]}
LAST = "model.vision_tower.vision_model.encoder.layers.2"


class Detached(MemoryStrategy[NoSettings]):
    """Detaches what the second layer of CLIP gives"""

    name = "planted-detach"

    def prepare(self, assembly: Assembly) -> None:
        layer = assembly.model.get_submodule("model.vision_tower.vision_model.encoder.layers.1")
        layer.forward = partial(_detached, layer.forward)


def _detached(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs).detach()


class Still(Lora):
    """LoRA whose adapters in vision towers have a learning rate of 0"""

    name = "still"

    def param_groups(self, parameters: Any, learning_rate: float) -> list[dict[str, Any]]:
        seeing = {True: [], False: []}  # type: dict[bool, list[nn.Parameter]]
        for name, parameter in parameters.items():
            seeing["vision" in name].append(parameter)
        return [{"params": seeing[True], "lr": 0.0}, {"params": seeing[False], "lr": learning_rate}]


LOOKUP = DictLookup(*COMPONENTS, Detached, Still, HfVlm)


def refused(plan: Any, out: Path) -> PlanRefused:
    with pytest.raises(PlanRefused) as caught:
        train(plan, LOOKUP, out, device="cpu")
    assert not out.exists()
    return caught.value


@pytest.fixture(scope="module")
def partly(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """A run of which the last layer of CLIP is allowed to learn nothing, and what it told."""
    folder, told = tmp_path_factory.mktemp("partly"), list[Event]()
    changes = {"peft": SEEING, "train.allow_unreached": ["*.encoder.layers.2"], "train.steps": 6, "train.save_every": 2}
    train(plan_of(base, folder, changes), LOOKUP, folder / "out", device="cpu", listen=told.append)
    return folder / "out", told


# Before the first step ------------------------------------------------------------------------------------------------


def test_a_layer_behind_the_one_that_is_read_is_refused_by_name(run: PlanOf, tmp_path: Path) -> None:
    error = refused(run({"peft": SEEING}), tmp_path / "out")
    assert error.sentence.startswith("no gradient can reach 6 of the 46 modules that are to be trained")
    assert f'train.allow_unreached = ["{LAST}"]' in error.sentence
    assert error.details == (
        f"vision.low: {LAST}: the model reads what an earlier block gives, so the loss does not depend on them",
    )


def test_so_is_that_of_a_model_of_transformers(tmp_path: Path) -> None:
    table = {
        "model": {"use": "hf-vlm", "weights": str(write("llava", tmp_path / "llava"))},
        "peft": {"use": "lora", "on": ["language.attention", "vision"]},
        "data": {"source": [{"use": "shapes", "count": 6}]},
        "train": {"precision": "fp32", "steps": 1, "batch_size": 2, "max_length": 512},
    }
    error = refused(resolve(parse_run(table, tmp_path), LOOKUP), tmp_path / "out")
    assert 'train.allow_unreached = ["model.vision_tower.encoder.layers.1"]' in error.sentence


def test_a_detached_branch_is_refused(run: PlanOf, tmp_path: Path) -> None:
    error = refused(run({"peft": SEEING, "memory": {"use": ["planted-detach"]}}, LOOKUP), tmp_path / "out")
    assert "no gradient can reach 18 of the 46 modules" in error.sentence and '["vision.low"]' in error.sentence
    assert error.details == (
        "vision.low: the loss does not depend on them, or what they give is detached on the way to it",
    )


def test_a_role_in_which_nothing_is_trained_is_refused(run: PlanOf, tmp_path: Path) -> None:
    changes = {"peft": LORA | {"on": ["language.attention", "language.norms"]}}
    error = refused(run(changes), tmp_path / "out")
    assert error.sentence.startswith("peft.on names 'language.norms', in which 'dictionary:lora' trains nothing")
    told = list[Event]()
    plan = run(changes | {"train.allow_unreached": ["language.norms"], "train.steps": 1})
    train(plan, LOOKUP, tmp_path / "out", device="cpu", listen=told.append)
    assert [e.warnings for e in told if isinstance(e, RunStarted)] == [
        ("peft.on names 'language.norms', and nothing in it is trained, as train.allow_unreached allows",)
    ]


def test_towers_cannot_learn_from_records_without_images(run: PlanOf, tmp_path: Path) -> None:
    file = tmp_path / "text.json"
    turns = [{"from": "human", "value": "what is red?"}, {"from": "gpt", "value": "a colour"}]
    file.write_text(json.dumps([{"id": str(number), "conversations": turns} for number in range(6)]))
    source = {"use": "llava-json", "path": str(file)}
    error = refused(run({"peft": SEEING, "data.source": [source]}), tmp_path / "out")
    assert error.details == ("vision.low: they encode images, and no record that was tried has one",)


def test_what_is_allowed_must_be_trained(run: PlanOf, tmp_path: Path) -> None:
    error = refused(run({"train.allow_unreached": ["language.atention"]}), tmp_path / "out")
    assert str(error) == (
        "train.allow_unreached: 'language.atention' names nothing that is trained; did you mean 'language.attention'?"
    )
    with pytest.raises(RunFileError, match=r"train.allow_unreached: found 'vision', wanted list of strings"):
        run({"train.allow_unreached": "vision"})


def test_the_dry_pass_leaves_no_trace(run: PlanOf) -> None:
    plan = run({"peft": SEEING | {"dropout": 0.3}, "train.allow_unreached": ["*.encoder.layers.2"]})
    assembly = compose.build(plan, LOOKUP, device="cpu")
    feed = Feed(plan.run_context, assembly.processor, load_training_data(plan, LOOKUP, assembly.processor))
    stepper = stepper_for(assembly, plan.run_context.train)
    assembly.model.register_buffer("seen", torch.zeros(3))

    def count(model: Any, given: Any, made: Any) -> None:
        model.seen.add_(1)

    assembly.model.register_forward_hook(count)
    before, random = {k: v.clone() for k, v in assembly.model.state_dict().items()}, torch.get_rng_state()
    Learning(assembly, stepper, plan.run_context.train.allow_unreached).check(feed, 2)
    assert torch.get_rng_state().equal(random)
    assert all(value.equal(before[name]) for name, value in assembly.model.state_dict().items())
    assert all(p.grad is None for p in assembly.model.parameters()) and not stepper.optimizer.state
    assert not feed.data.unusable


# In training ----------------------------------------------------------------------------------------------------------


def test_a_map_says_what_moved_and_what_could_not(partly: tuple[Path, list[Event]]) -> None:
    out, told = partly
    learned = learning.read(out / "checkpoint-6")
    assert learned is not None and learned.steps == 6
    dead = [module for module in learned.modules if module.status != "learned"]
    assert {module.block for module in dead} == {LAST} and all(m.allowed and m.status == "unreached" for m in dead)
    assert all(0.01 < m.moved < 1 and m.first > 0 and m.last > 0 for m in learned.modules if m not in dead)
    assert not [*learned.faults()] and not [*learned.idle()]
    assert [e.warnings for e in told if isinstance(e, RunStarted)] == [
        (f"6 of 46 trained modules cannot learn, as train.allow_unreached allows: {LAST}",)
    ]
    assert not [event for event in told if isinstance(event, NotLearning)]


def test_a_resumed_run_has_the_map_of_one_that_was_never_interrupted(
    partly: tuple[Path, list[Event]], base: Path, tmp_path: Path
) -> None:
    changes = {"peft": SEEING, "train.allow_unreached": ["*.encoder.layers.2"], "train.steps": 6, "train.save_every": 2}
    plan = plan_of(base, tmp_path, changes)
    with pytest.raises(Stopped):
        train(plan, LOOKUP, tmp_path / "out", device="cpu", listen=interrupt_at(StepTaken, 5))
    # What is allowed may be said in another way by then.
    plan = plan_of(base, tmp_path, changes | {"train.allow_unreached": ["vision.low"]})
    train(plan, LOOKUP, tmp_path / "out", device="cpu", resume=True)
    one, other = (learning.read(out / "checkpoint-6") for out in (partly[0], tmp_path / "out"))
    assert one is not None and other is not None
    assert [(m.name, m.moved, m.first, m.last, m.steps) for m in one.modules] == [
        (m.name, m.moved, m.first, m.last, m.steps) for m in other.modules
    ]


def test_a_learning_rate_of_0_is_said_before_and_after_and_is_no_health(run: PlanOf, tmp_path: Path) -> None:
    told = list[Event]()
    peft = SEEING | {"use": "still"}
    plan = run({"peft": peft, "train.allow_unreached": ["*.encoder.layers.2"], "train.steps": 6}, LOOKUP)
    outcome = train(plan, LOOKUP, tmp_path / "out", device="cpu", listen=told.append)
    (started,) = [event for event in told if isinstance(event, RunStarted)]
    assert started.warnings[-1] == (
        "18 of 46 trained modules have a learning rate of 0, and stay as they are: vision.low"
    )
    places = "model.vision_tower.vision_model.encoder.layers.0-1"
    clause = "12 of 46 trained modules did not learn (gradients came, and the values stayed the same): " + places
    (first,) = [event for event in told if isinstance(event, NotLearning)]
    assert first.findings[0] == clause
    assert outcome.verdict.failure == "did not learn" and clause in outcome.verdict.reasons
    with pytest.raises(AdapterError, match="reopens as saved, but not all of it has learned") as caught:
        open_job(tmp_path / "out", lookup=LOOKUP, device="cpu").verify()
    assert caught.value.details == (clause,)


def test_a_bias_that_a_softmax_ignores_cannot_learn(run: PlanOf, tmp_path: Path) -> None:
    peft = {"use": "full", "on": ["vision.low"]}
    plan = run({"peft": peft, "train.allow_unreached": NEVER_READ, "train.steps": 5})
    outcome = train(plan, LOOKUP, tmp_path / "out", device="cpu")
    learned = learning.read(outcome.checkpoint)
    assert learned is not None
    idle = [name for module in learned.modules for name in module.idle]
    names = [f"model.vision_tower.vision_model.encoder.layers.{n}.self_attn.k_proj.bias" for n in (0, 1)]
    assert idle == names and outcome.verdict.healthy
    assert [*learned.idle()] == [
        f"'{names[0]}' and 1 more cannot learn: the gradient is zero, or nothing but rounding, although other parameters of the same "
        "module learn"
    ]


def test_nobody_is_warned_of_parameters_that_can_have_no_effect(run: PlanOf, tmp_path: Path) -> None:
    notes: list[Event] = []
    plan = run({"peft": {"also_train": ["mining"]}, "train.steps": 5})
    outcome = train(plan, LOOKUP, tmp_path / "out", device="cpu", listen=notes.append)
    learned = learning.read(outcome.checkpoint)
    assert learned is not None and outcome.verdict.healthy
    assert not [*learned.faults()] and not [*learned.idle()]
    (aux,) = (module for module in learned.modules if module.name == "model.vlm_uni_aux_projector.1")
    assert (aux.status, aux.idle) == ("learned", ())
    assert not [note for note in notes if "no gradient can reach" in str(note)]


@pytest.mark.parametrize("method", ["pissa", "ia3"])
def test_sound_runs_of_other_methods_raise_no_alarm(method: str, run_of: Any) -> None:
    learned = learning.read(run_of(method).checkpoint)
    assert learned is not None
    assert not [*findings(learned)] and all(module.moved for module in learned.modules)


# Where it is shown ----------------------------------------------------------------------------------------------------


def test_inspect_and_verify_show_a_line_for_each_role(
    partly: tuple[Path, list[Event]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspect(partly[0], lookup=LOOKUP)
    assert isinstance(found, Inspected) and found.learned and found.to_json()["learned"]["steps"] == 6
    opened = open_job(partly[0], lookup=LOOKUP, device="cpu").verify()
    assert opened.learned == found.learned
    print_learned(open_console(), found.learned)
    printed = capsys.readouterr().out.splitlines()
    assert [line[:56].rstrip() for line in printed[:3]] == [
        line[:56].rstrip()
        for line in (
            f"  learned   language.attention  16 of 16 moved, by {_range(found.learned, 'language.attention')}",
            f"            language.mlp        12 of 12 moved, by {_range(found.learned, 'language.mlp')}",
            f"            vision.low          12 of 18 moved, by {_range(found.learned, 'vision.low')}",
        )
    ]
    assert (
        f"6 of 46 trained modules did not learn, as train.allow_unreached allows (no gradient gets there): {LAST}."
        in printed[3]
    )


def _range(learned: LearningMap, role: str) -> str:
    return dict(role_lines(learned))[role].partition("by ")[2]


def test_a_changed_map_is_damage(partly: tuple[Path, list[Event]], tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(partly[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    (folder / learning.FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"learning.json' was changed after it was written"):
        open_job(folder, lookup=LOOKUP, device="cpu").verify()
    with pytest.raises(CheckpointError, match=r"learning.json' is damaged"):
        learning.read(folder)


def test_the_picture_has_a_cell_for_every_block_of_every_role(partly: tuple[Path, list[Event]]) -> None:
    learned = learning.read(partly[0] / "checkpoint-6")
    assert learned is not None
    page = learning_map(learned)
    cells = {role: shape.blocks + (shape.outside or not shape.blocks) for role, shape in learned.roles.items()}
    assert cells["language.attention"] == 4 and cells["language.norms"] == 5 and cells["connector"] == 1
    assert page.count("<rect") == sum(cells.values())
    assert page.count('class="unlearned"') == 2  # the last layer of CLIP, and the legend
    assert "vision.low, block 2: self_attn.k_proj no gradient gets there" in page
    assert summary(learned).startswith("40 of 46 trained modules learned, half of them by ")


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ("vision", True),
        ("vision.low", True),
        ("vision.lo", False),
        ("tower.layers.12", True),
        ("tower.layers.1", False),
        ("tower.layers.12.q_proj", True),
        ("*.layers.12", True),
        ("*.q_proj", True),
        ("tower.layers.3-12", True),
        ("tower.layers.13-20", False),
        ("tower.layers.20-3", False),
        ("*", True),
        ("", False),
        ("tower", True),
        ("low", False),
    ],
)
def test_an_entry_names_a_role_a_module_or_a_pattern(entry: str, named: bool) -> None:
    assert matches(entry, "tower.layers.12.q_proj", "vision.low") is named


def some(layers: Iterable[int], of: str = "vision", leaves: Iterable[str] = ("q", "v")) -> list[ModuleLearning]:
    return [ModuleLearning(f"{of}.layers.{n}.{leaf}", of, of, n, f"{of}.layers.{n}") for n in layers for leaf in leaves]


@pytest.mark.parametrize(
    ("dead", "names"),
    [
        (some(range(8)), ["vision"]),
        (some([7]), ["vision.layers.7"]),
        (some([0, 1, 2, 5, 7]), ["vision.layers.0-2", "vision.layers.5", "vision.layers.7"]),
        (some([1, 2]) + some([4], leaves=["v"]), ["vision.layers.1-2", "vision.layers.4.v"]),
    ],
)
def test_what_did_not_learn_is_named_in_as_few_entries_as_say_it(dead: list[ModuleLearning], names: list[str]) -> None:
    every = some(range(8)) + some(range(4), of="language")
    assert short_names(dead, every) == names
    assert [m for m in every if any(matches(name, m.name, m.role) for name in names)] == dead


def test_a_map_of_every_kind_of_fault_says_each() -> None:
    modules = (
        ModuleLearning("a", "x", steps=3, moved=0.1),
        ModuleLearning("b", "x", steps=3),
        ModuleLearning("c", "x"),
        ModuleLearning("d", "x", reached=False),
        ModuleLearning("e", "x", reached=False, allowed=True),
    )
    learned = LearningMap(3, modules, {"x": RoleShape()}, since=4)
    assert [*learned.faults()] == [
        "1 of 5 trained modules did not learn (no gradient gets there): d",
        "1 of 5 trained modules did not learn (the gradient was exactly zero in every step): c",
        "1 of 5 trained modules did not learn (gradients came, and the values stayed the same): b",
    ]
    assert [*findings(learned)][-1] == "Observed from step 5 on: the run began before there were learning maps."
