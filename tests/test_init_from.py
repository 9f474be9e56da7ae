"""A run that begins with an earlier adapter: its tensors and nothing else, on the same base, and its whole descent is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import LORA, METHODS, Interrupted, PlanOf, Run, interrupt_at, logits_of, plan_of, run_table

from graftwork import weights
from graftwork.checkpoint import ancestry, manifest
from graftwork.checkpoint.manifest import Ancestor
from graftwork.checkpoint.store import OPTIMIZER, TENSORS, open_checkpoint
from graftwork.cli.checkpoint import checkpoint_facts
from graftwork.contracts import DictLookup, Plan, StepTaken
from graftwork.errors import CheckpointError, PlanRefused
from graftwork.jobs.outcome import provenance_of
from graftwork.jobs.planning import plan as planned
from graftwork.jobs.run import Run as JobRun
from graftwork.train.loop import train

STILL = {"train.steps": 1, "train.learning_rate": 0.0}
"""One step that changes nothing, so that what was begun with is what is saved."""
OTHER_DATA = {"data.source": [{"use": "shapes", "count": 9}]}


def sealed(checkpoint: Path) -> str:
    """What identifies a checkpoint."""
    return weights.sha256(checkpoint / manifest.FILE)


def on(checkpoint: Path, method: str = "lora", **changes: Any) -> dict[str, Any]:
    """The changes of a run that begins with a checkpoint."""
    return OTHER_DATA | {"peft": METHODS[method] | {"init_from": str(checkpoint)} | changes}


@pytest.mark.parametrize("method", ["pissa", "full"])
def test_a_run_begins_with_the_tensors_of_another_and_with_nothing_else_of_it(
    run_of: Callable[[str], Run], base: Path, lookup: DictLookup, tmp_path: Path, method: str
) -> None:
    first = run_of(method)
    plan = plan_of(base, tmp_path, on(first.out, method) | STILL)
    outcome = train(plan, lookup, tmp_path / "out", device="cpu")
    begun, saved = load_file(first.checkpoint / TENSORS), load_file(outcome.checkpoint / TENSORS)
    assert begun.keys() == saved.keys()
    assert [name for name in begun if not begun[name].equal(saved[name])] == []
    state = load_file(outcome.checkpoint / OPTIMIZER / "state.safetensors")
    assert {float(value) for name, value in state.items() if name.endswith("step")} <= {1.0}
    read = manifest.read(outcome.checkpoint)
    assert (read.step, read.steps, read.data["records"]) == (1, 1, 9)
    assert read.initialised_from == (Ancestor(sealed(first.checkpoint), str(first.out), 4),)
    (was_on, was_off), (now_on, now_off) = (
        logits_of(open_checkpoint(folder, lookup, device="cpu").assembly)
        for folder in (first.checkpoint, outcome.checkpoint)
    )
    assert torch.equal(was_on, now_on)
    assert torch.equal(was_off, now_off)  # the base is the base of both, not the adapter that was begun with


def test_a_run_that_begins_with_an_adapter_goes_on_learning_from_it(
    trained: Run, base: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    plan = plan_of(base, tmp_path, {"peft.init_from": str(trained.out), "train.steps": 1})
    first, *_ = train(plan, lookup, tmp_path / "out", device="cpu").log
    anew = trained.outcome.log[0]  # on the same records
    assert (first["step"], first["learning_rate"]) == (1, anew["learning_rate"])
    assert first["loss"] < anew["loss"]


def test_the_chain_of_beginnings_is_kept_and_shown(
    trained: Run, base: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    second = train(plan_of(base, tmp_path, on(trained.out) | STILL), lookup, tmp_path / "second", device="cpu")
    plan = plan_of(base, tmp_path, on(Path("second/checkpoint-1"), dropout=0.5, plus_ratio=2.0) | STILL)
    third = train(plan, lookup, tmp_path / "third", device="cpu")
    read = manifest.read(third.checkpoint)
    chain = (
        Ancestor(sealed(trained.checkpoint), str(trained.out), 4),
        Ancestor(sealed(second.checkpoint), "second/checkpoint-1", 1),
    )
    assert read.initialised_from == chain
    assert json.loads((third.checkpoint / manifest.FILE).read_text())["initialised_from"][1]["given"] == chain[1].given
    phrase = (
        f"'second/checkpoint-1' at step 1 (sha256 {chain[1].sha256[:12]}…), which began with '{trained.out}' at step 4 "
        f"(sha256 {chain[0].sha256[:12]}…)"
    )
    assert dict(checkpoint_facts(read))["began with"] == f"the tensors of {phrase}"
    assert provenance_of(read)["began with"] == phrase
    assert "began with" not in provenance_of(manifest.read(trained.checkpoint))
    table = run_table(base)
    table["peft"]["init_from"] = "third"
    shown = planned(JobRun(folder=tmp_path, **table), rehearse=False, lookup=lookup)
    assert shown.to_json()["initialised_from"][0]["sha256"] == chain[0].sha256
    assert [ancestor.step for ancestor in shown.ancestors] == [4, 1, 1]
    table["peft"]["init_from"] = "fourth"
    missing = planned(JobRun(folder=tmp_path, **table), rehearse=False, lookup=lookup)
    assert missing.missing_files == [f"peft.init_from: there is no folder '{tmp_path / 'fourth'}'"]


def test_resuming_compares_the_beginning_and_does_not_read_it_again(
    trained: Run, base: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    shutil.copytree(trained.checkpoint, tmp_path / "old")
    changes = on(Path("old")) | {"train.save_every": 1, "train.steps": 2}
    plan = plan_of(base, tmp_path, changes)
    whole = train(plan, lookup, tmp_path / "whole", device="cpu")
    with pytest.raises(Interrupted):
        train(plan, lookup, tmp_path / "out", device="cpu", listen=interrupt_at(StepTaken, 2))
    shutil.rmtree(tmp_path / "old")
    for other, found in ((None, "None"), ("older", "'older'")):
        with pytest.raises(CheckpointError) as caught:
            train(
                plan_of(base, tmp_path, changes | {"peft.init_from": other}),
                lookup,
                tmp_path / "out",
                resume=True,
                device="cpu",
            )
        assert caught.value.details == (f"run_context.init_from: 'old' in the checkpoint, {found} now",)
    resumed = train(plan, lookup, tmp_path / "out", resume=True, device="cpu")
    begun, ended = load_file(whole.checkpoint / TENSORS), load_file(resumed.checkpoint / TENSORS)
    assert [name for name in begun if not begun[name].equal(ended[name])] == []
    assert manifest.read(resumed.checkpoint).initialised_from == manifest.read(whole.checkpoint).initialised_from


@pytest.fixture(scope="module")
def other_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with another tokenizer's bytes between its tensors: another hash, the same shapes."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("other") / "base"
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft.rank": 8}, "peft.rank is 4 there, and 8 here"),
        (
            {"peft.alpha": 16.0, "peft.use_rslora": True},
            "peft.alpha is 8.0 there, and 16.0 here; peft.use_rslora is False there, and True here",
        ),
        ({"peft.init": "pissa"}, "peft.init is default there, and pissa here"),
        ({"peft.use_dora": True}, "peft.use_dora is False there, and True here"),
        ({"peft.target_modules": ["q_proj"]}, "peft.target_modules is [] there, and ['q_proj'] here"),
        ({"peft": METHODS["ia3"]}, "peft.use is lora there, and ia3 here"),
        ({"peft.on": ["language.mlp"]}, "peft.on is language.attention, language.mlp there, and language.mlp here"),
        ({"peft.also_train": ["connector"]}, "peft.also_train is empty there, and connector here"),
        ({"model.parts.high": {"use": "none"}}, "model.parts.high.use is openclip-convnext there, and none here"),
        (
            {"model.image_size_aux": 128},
            "model.image_size_aux is None there, and 128 here; the configuration of model: image_size_aux is 64",
        ),
    ],
)
def test_an_adapter_of_another_kind_is_refused_in_one_sentence(
    trained: Run, base: Path, lookup: DictLookup, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    plan = plan_of(base, tmp_path, changes | {"peft.init_from": str(trained.out)})
    for hashed in (True, False):
        with pytest.raises(CheckpointError) as caught:
            ancestry.beginning(plan, lookup, hashed=hashed)
        assert str(caught.value).startswith(
            f"peft.init_from '{trained.out}': the tensors of '{trained.checkpoint}' do not fit this run: {said}"
        )
        assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base_is_refused(
    trained: Run, other_base: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    plan = plan_of(other_base, tmp_path, {"peft.init_from": str(trained.out)})
    assert ancestry.beginning(plan, lookup, hashed=False)  # which base it is takes reading it
    with pytest.raises(
        CheckpointError, match=r"model.weights is '.*/base0' \(sha256 \w{12}…\) there, and '.*/base' \(sha256"
    ):
        train(plan, lookup, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_the_order_of_roles_and_how_it_learns_may_be_others(trained: Run, run: PlanOf, lookup: DictLookup) -> None:
    turned = {"peft": LORA | {"on": LORA["on"][::-1], "dropout": 0.1, "plus_ratio": 4.0, "init_from": str(trained.out)}}
    found = ancestry.beginning(run(turned), lookup)
    assert found is not None
    assert found.folder == trained.checkpoint
    assert ancestry.beginning(run(), lookup) is None


def test_a_checkpoint_that_is_missing_or_damaged_is_refused(
    trained: Run, base: Path, lookup: DictLookup, tmp_path: Path
) -> None:
    shutil.copytree(trained.checkpoint, tmp_path / "old")
    damaged = bytearray((tmp_path / "old" / TENSORS).read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "old" / TENSORS).write_bytes(damaged)

    def refusal(given: str) -> str:
        with pytest.raises(CheckpointError) as caught:
            train(plan_of(base, tmp_path, {"peft.init_from": given}), lookup, tmp_path / "out", device="cpu")
        return str(caught.value)

    assert "was changed after it was written" in refusal("old")
    assert refusal("gone").startswith(
        f"peft.init_from 'gone': there is no folder '{tmp_path / 'gone'}'; name a checkpoint"
    )
    (tmp_path / "empty").mkdir()
    assert "is not a Graftwork checkpoint and holds none" in refusal("empty")
    with pytest.raises(PlanRefused, match=r"peft\.init_from: is empty"):
        plan_of(base, tmp_path, {"peft.init_from": ""})


def test_a_plan_without_a_beginning_reads_as_before(run: PlanOf) -> None:
    recorded = run().to_json()
    del recorded["run_context"]["init_from"]  # by an older Graftwork
    assert Plan.from_json(recorded) == run()
