"""The conformance kit: what is sound passes, and each broken promise is told in a sentence of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import broken_components as components
import broken_makers as makers
import broken_methods as methods
import pytest

from graftwork.conformance import CHECKS, Outcome, examine
from graftwork.conformance.specimens import KitTower
from graftwork.contracts import KINDS, Component

SOUND = (
    methods.Scale,
    methods.Nothing,
    methods.SaysWhatItRounds,
    components.Plain,
    components.Quiz,
    components.InPairs,
    components.Lines,
    components.Shelf,
    components.Keep,
    makers.Captions,
    makers.Denies,
    KitTower,
)

BROKEN = [
    # Cards
    (methods.HasNoSummary, "the metadata is complete", "'HasNoSummary' has no docstring"),
    (methods.HasABadName, "the metadata is complete", "called 'My_Method', and a name is lower case with hyphens"),
    (methods.SaysNothingOfItsSettings, "every setting has a line of help", "'rank' does not; write setting"),
    (methods.CannotSaveItsSettings, "settings survive a checkpoint", "saved as JSON, and these cannot be"),
    # PEFT methods
    (methods.Widens, "bf16 weights under autocast work", "gives torch.float32 instead of torch.bfloat16"),
    (methods.TrainsWhatItDoesNotUse, "something is trained and gets gradients", "'blocks.0.query.spare' gets none"),
    (methods.LearnsNothing, "training changes the output", "three steps changed nothing"),
    (
        methods.OffDoesNothing,
        "disable adapter gives the base and leaving it the adapter",
        "within 'disable_adapter' the model must compute exactly",
    ),
    (methods.StaysOff, "disable adapter gives the base and leaving it the adapter", "restore it in a finally block"),
    (methods.MergeForgetsTheBias, "merging keeps the output and restores the modules", "fold all of it, biases too"),
    (
        methods.MergeLeavesItsFactors,
        "merging keeps the output and restores the modules",
        "'blocks.0.down.factor' is not as it was",
    ),
    (
        methods.MeasuresTheBaseTooEarly,
        "initial values may wait for the base",
        "gives 'blocks.0.query.factor' no number .* in 'initialise_from_base'",
    ),
    (methods.TrainsNeighbours, "only the targets are adapted", "'blocks.1.out' computes something else"),
    (methods.UnfreezesTheHead, "only the targets are adapted", "'head.weight' requires gradients"),
    (methods.ChangesTheBase, "inject leaves the base as it is", "'blocks.0.query.weight' differs"),
    (methods.ReplacesTheBase, "inject leaves the base as it is", "'blocks.0.query.weight' is another one"),
    (methods.KeepsANumberToItself, "saved tensors rebuild the adapter", "keep every value in a parameter"),
    (methods.GroupsHalf, "groups hold every parameter once", "'blocks.0.value.factor' is there 0 times"),
    (
        methods.AsksValues,
        "shapes are known without values",
        r"raised .*\(broken_methods.py, line \d+, in 'inject'\); fix it",
    ),
    (methods.RefusesNothing, "targets that cannot be adapted are refused", "with no target it did neither; raise it"),
    # Memory strategies
    (methods.HalvesGradients, "one step is a plain step", "'blocks.0.norm.weight' is .* away after one"),
    (methods.SwitchesDropoutOff, "one step is a plain step", "must not change the loss"),
    (methods.RoundsTheBase, "answers stay", "before training it is"),
    (methods.RoundsMoreThanItSays, "one step is a plain step", "must not change the loss"),
    (methods.RoundsAndLearnsNothing, "one step is a plain step", "what is learned is 1 away"),
    (methods.SaysThatItsOutputsStay, "answers stay", "before training it is"),
    (methods.ForgetsTheLastLabel, "one step is a plain step", "must not change the loss"),
    (methods.TeachesTheHeadNothing, "one step is a plain step", "'head.weight' is .* away after one"),
    (methods.LearnsTwiceAsFast, "one step is a plain step", "is 0.05.* away after one"),
    (methods.KeepsItsStepsToItself, "resuming goes on exactly", "keep all that the optimizer knows in its 'state'"),
    (methods.SavesWhatItGoesOnChanging, "what is saved is a copy", "the next step changed '.*/exp_avg'; return copies"),
    (methods.WrapsModules, "names and shapes stay", "'blocks.0.0.down.bias' is not in both"),
    (methods.ClaimsEveryFolder, "an unknown folder is left alone", "'import_from' must return None for a folder"),
    # Attention kernels
    (components.IgnoresPadding, "it computes attention", "away in this case: .* left padding"),
    (components.ClaimsAnyHeadDim, "it computes attention", "RuntimeError: head_dim must be at most 128"),
    (components.DropsAGradient, "its gradients are right", "the gradient of 'k' must be attention's"),
    (components.IgnoresDropout, "dropout keeps the mean", "with 0.5 of it nothing changed"),
    (
        components.GivesNan,
        "a sequence of padding gives finite numbers",
        "a query that sees no key must give finite numbers",
    ),
    (components.GivesNoReason, "supports answers every question", "a no must have a reason"),
    (components.ForgetsItsCard, "supports answers every question", "says yes although the tensors are on the cpu"),
    # Vision towers
    (components.HasAPairInItsConfiguration, "the configuration is plain json", "it does not read back the same"),
    (
        components.LiesAboutItsWidth,
        "it computes what it describes",
        r"says, \[\(2, 32, 4, 4\)\], and it computes \[\(2, 16, 4, 4\)\]",
    ),
    (
        components.ForgetsItsNames,
        "every published name translates back",
        "'patches.bias' becomes 'patches.bias' and then None",
    ),
    (
        components.InventsASite,
        "attention is where the sites say",
        "must run through Graftwork's kernels, and nothing did",
    ),
    (components.ReadsWhileBuilding, "its shape is known without weights", "'patches.bias' has values on 'meta'"),
    # Evaluators
    (components.RepeatsIds, "questions are records with ids of their own", "3 are called '1'"),
    (components.Shuffles, "the order is fixed", "number 1 of two readings differs"),
    (components.ScoresBackwards, "reference answers score best", "for '1' 'yes' has 0 and nonsense has 1"),
    (components.ScoresInPercent, "scores are from 0 to 1 and repeat", "a Score from 0 to 1, and for '1' it gave .*100"),
    (components.LosesItsMetric, "totals hold the metric", "must hold the metric 'accuracy', and it holds numbers"),
    (
        components.ForgetsItsUnits,
        "what counts together has a unit",
        "'accuracy' falls from 1 to 0.5 when that to 'b1' is added; give records .* the same 'unit'",
    ),
    (components.TearsItsUnits, "what counts together has a unit", "others lie between those of 'a'; sort them by it"),
    # Data
    (components.GivesTables, "it gives records", "a Record or a BadRecord must come, and a dict came"),
    (components.YieldsTables, "it yields records", "a Record or a BadRecord must come, and a dict came"),
    (components.ForgetsThePlace, "it yields records", "'a' has 1 for 0; put it into the text"),
    (components.ReadsOnce, "it reads the same each time", "number 1 of two readings differs"),
    (components.ForgetsTheWeight, "what is written is read again", "number 7 is another one; write all that a record"),
    (components.CountsItsWritings, "what is written is read again", "'number.txt' differs when they are written"),
    (components.NamesOtherFiles, "what is written is read again", "there is no file 'elsewhere.jsonl'; correct it"),
    (components.Mutates, "it changes no record", "record 1 is another one afterwards"),
    (components.DropsSilently, "nothing is lost in silence", "of 7 records 3 are gone"),
    (components.Draws, "the same seed gives the same", "the same seed must give the same records"),
    (components.GoesThroughTwice, "the same seed gives the same", "go through them once"),
    (components.NamesNoSetting, "it uses the questions that it asks for", "there is no setting 'against'; correct it"),
    (
        components.IgnoresTheQuestions,
        "it uses the questions that it asks for",
        "with and without them it gives the same",
    ),
    (
        makers.MakesOfNothing,
        "a maker keeps what it is given",
        "'made_by' of 'open/caption' is 'captions' and 'of' None",
    ),
    (makers.ReplacesWhatItIsGiven, "a maker keeps what it is given", "record 8 is missing or another one"),
    (makers.VouchesForAll, "a verifier gives verdicts", "no reply affirms, and it keeps 'open/0'; drop it"),
    (makers.SaysNothing, "a verifier gives verdicts", r"and it gives \[\]; give them after 'apply'"),
]


def outcomes(component: type[Component[Any]], **options: Any) -> Mapping[str, Outcome]:
    return {outcome.check: outcome for outcome in examine(component, **options)}


def test_every_kind_has_checks_and_no_two_of_them_one_name() -> None:
    assert set(CHECKS) == set(KINDS)
    for checks in CHECKS.values():
        assert len({check.__name__ for check in checks}) == len(checks) > 1


@pytest.mark.parametrize("component", SOUND, ids=lambda component: component.__name__)
def test_what_is_sound_passes(component: type[Component[Any]]) -> None:
    wrong = [outcome for outcome in outcomes(component).values() if outcome.state == "failed"]
    assert not wrong


@pytest.mark.parametrize(("component", "check", "sentence"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_promise_is_told(component: type[Component[Any]], check: str, sentence: str) -> None:
    outcome = outcomes(component)[check]
    assert outcome.state == "failed"
    assert re.search(sentence, outcome.sentence), outcome.sentence
    assert "\n" not in outcome.sentence


def test_every_check_but_those_of_models_catches_something() -> None:
    """A check that nothing fails may be one that nothing can fail; models are broken in a file of their own."""
    caught = {check for _, check, _ in BROKEN}
    made = {check.__name__.replace("_", " ") for kind in CHECKS.keys() - {"model"} for check in CHECKS[kind]}
    assert not made - caught


def test_a_component_that_cannot_work_here_is_skipped_with_the_reason() -> None:
    found = outcomes(methods.Scale, unmet_requirement="needs a CUDA device of compute capability 8.0 or more")
    assert found["the metadata is complete"].state == "passed"
    skipped = found["training changes the output"]
    assert (skipped.state, skipped.sentence) == ("skipped", "needs a CUDA device of compute capability 8.0 or more")
    assert not [outcome for outcome in found.values() if outcome.state == "failed"]


def test_a_tower_without_an_example_is_skipped_and_one_with_a_folder_is_not(tmp_path: Path) -> None:
    class Folded(KitTower):
        """A tower that needs a folder"""

        name = "folded"

        def configuration(self, folder: Path | None) -> Mapping[str, Any]:
            return super(KitTower, self).configuration(folder)

    assert "give a folder with --config" in outcomes(Folded)["it computes what it describes"].sentence
    (tmp_path / "config.json").write_text('{"size": 16, "patch": 8, "width": 4}')
    assert outcomes(Folded, config=tmp_path)["it computes what it describes"].state == "passed"
    (tmp_path / "config.json").write_text('{"size": 16, "width": 4}')
    found = outcomes(Folded, config=tmp_path)
    assert "KeyError: 'patch'" in found["the configuration is plain json"].sentence
    assert found["it computes what it describes"].sentence == "building it failed, as reported above"
