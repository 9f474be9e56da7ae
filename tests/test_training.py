"""The training loop: what it computes, what it leaves out and says so, and what it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import LORA, NEVER_READ, Run, Shapes, ShapesSettings, logits_of, plan_of
from tiny_vlm import CharProcessor

from graftwork.build import compose
from graftwork.checkpoint import manifest, store
from graftwork.checkpoint.store import checkpoints, open_checkpoint
from graftwork.contracts import (
    IGNORED,
    CheckpointSaved,
    DictLookup,
    Encoded,
    Event,
    Plan,
    RunEnded,
    RunStarted,
    StepTaken,
    collate,
    named_tensors,
    summed_loss,
)
from graftwork.errors import CheckpointError
from graftwork.train.loop import Outcome, train

Train = Callable[..., Outcome]


def losses(outcome: Outcome) -> list[float]:
    return [line["loss"] for line in outcome.log]


def refused(call: Callable[..., Any], *args: Any, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        call(*args)
    return str(caught.value)


# What is computed -----------------------------------------------------------------------------------------------------


def test_the_loss_falls(go: Train) -> None:
    outcome = go({"train.steps": 12})
    assert outcome.verdict.healthy
    assert losses(outcome)[-1] < 0.6 * losses(outcome)[0]
    assert math.log(448) == outcome.verdict.chance_loss


def test_the_learning_rate_is_the_schedules(go: Train) -> None:
    outcome = go({"train.schedule": "linear", "train.warmup_ratio": 0.5})
    rates = [line["learning_rate"] for line in outcome.log]
    assert rates == [pytest.approx(share * 1e-2) for share in (1 / 3, 2 / 3, 1, 1 / 2)]


def test_the_loss_at_labels_only_is_the_full_cross_entropy(base: Path, lookup: DictLookup) -> None:
    assembly = compose.build(plan_of(base, base), lookup, device="cpu")
    encoded = [assembly.processor.encode(record) for record in Shapes(ShapesSettings(5)).records()]
    batch = collate(encoded, pad_id=assembly.processor.pad_id)
    logits = assembly.model.logits(assembly.model(batch))
    full = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(summed_loss(assembly.model, batch), full)
    full.backward()
    expected = {name: parameter.grad for name, parameter in assembly.trained().items()}
    assembly.model.zero_grad(set_to_none=True)
    summed_loss(assembly.model, batch).backward()
    for name, parameter in assembly.trained().items():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_batch_without_labels_has_no_loss(base: Path, lookup: DictLookup) -> None:
    assembly = compose.build(plan_of(base, base), lookup, device="cpu")
    batch = collate([Encoded([2, 5, 6], [False] * 3, [IGNORED] * 3, {})], pad_id=0)
    assert float(summed_loss(assembly.model, batch).detach()) == 0.0


@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_make_the_step_of_the_whole_batch(
    base: Path, lookup: DictLookup, tmp_path: Path, micro: int
) -> None:
    # A large epsilon keeps Adam's steps proportional to the gradients, so that rounding is not blown up to a full step.
    same = {"train.adam_epsilon": 1.0, "train.learning_rate": 1.0, "train.batch_size": 6}
    whole, parts = (
        train(plan_of(base, tmp_path, same | more), lookup, tmp_path / name, device="cpu")
        for name, more in (("whole", {}), ("parts", {"train.micro_batch_size": micro}))
    )
    for one, other in zip(whole.log, parts.log, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6, rel=1e-6)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-5)
    after = parts.assembly.trained()
    for name, parameter in whole.assembly.trained().items():
        torch.testing.assert_close(parameter, after[name], atol=1e-6, rtol=0)


def test_runs_with_the_same_seed_are_the_same_and_others_are_not(
    base: Path, lookup: DictLookup, tmp_path: Path, trained: Run
) -> None:
    again, other = (
        train(plan_of(base, tmp_path, {"seed": seed}), lookup, tmp_path / str(seed), device="cpu") for seed in (5, 6)
    )
    assert losses(again) == losses(trained.outcome)
    assert losses(other) != losses(again)
    for name, parameter in trained.outcome.assembly.trained().items():
        assert parameter.equal(again.assembly.trained()[name])


def test_gradients_are_clipped_to_the_norm_and_0_means_never(base: Path, lookup: DictLookup, tmp_path: Path) -> None:
    def moved(norm: float) -> float:
        changes = {"train.max_grad_norm": norm, "train.steps": 1, "train.adam_epsilon": 1.0, "train.learning_rate": 1.0}
        outcome = train(plan_of(base, tmp_path, changes), lookup, tmp_path / f"{norm}", device="cpu")
        return max(float(p.detach().abs().max()) for name, p in outcome.assembly.trained().items() if "lora_B" in name)

    assert moved(0.01) < 0.02 * moved(100.0)
    assert moved(0.0) == moved(1e9)


def test_a_connector_can_be_trained_beside_the_adapter(base: Path, go: Train, lookup: DictLookup) -> None:
    outcome = go({"peft": LORA | {"also_train": ["connector"]}})
    names = {name for name in outcome.assembly.trained() if "lora_" not in name}
    assert names == {f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    plain = compose.build(plan_of(base, base, {"peft": None}), lookup, device="cpu")
    on, off = logits_of(open_checkpoint(outcome.checkpoint, lookup, device="cpu").assembly)
    assert off.equal(logits_of(plain)[0])
    assert on.equal(logits_of(outcome.assembly)[0])
    weight = outcome.assembly.model.get_parameter("model.mm_projector.0.weight")
    assert not weight.equal(plain.model.get_parameter("model.mm_projector.0.weight"))


def test_a_role_can_be_trained_without_any_method(go: Train, lookup: DictLookup) -> None:
    outcome = go({"peft": {"also_train": ["connector", "mining"]}})
    assert outcome.assembly.can_disable
    assert open_checkpoint(outcome.checkpoint, lookup, device="cpu").verification.distance > 0.0


def test_a_model_trained_from_random_weights_reopens(tmp_path: Path, lookup: DictLookup) -> None:
    plan = plan_of(
        None,
        tmp_path,
        {
            "peft": {"use": "full", "on": ["language", "connector", "mining", "vision"]},
            "train.allow_unreached": NEVER_READ,
        },
    )
    outcome = train(plan, lookup, tmp_path / "out", device="cpu")
    opened = open_checkpoint(outcome.checkpoint, lookup, device="cpu")
    assert opened.verification.error == 0.0
    assert not opened.assembly.can_disable  # it has no base that could be compared with
    assert opened.manifest.tensors.keys() == named_tensors(opened.assembly.model).keys()


def test_checkpointing_changes_no_bit_and_is_not_needed_to_reopen(go: Train, trained: Run, lookup: DictLookup) -> None:
    outcome = go({"memory": {"use": ["checkpointing"]}})
    assert losses(outcome) == losses(trained.outcome)
    assert open_checkpoint(outcome.checkpoint, lookup, device="cpu").assembly.strategies == []


def test_fp16_trains_where_it_is_forced_and_is_never_called_healthy(go: Train, lookup: DictLookup) -> None:
    outcome = go({"train.precision": "fp16", "train.force_precision": True})
    assert outcome.verdict.reasons[-1].startswith("fp16 is known to overflow")
    assert open_checkpoint(outcome.checkpoint, lookup, device="cpu").verification.distance > 0.0


def test_a_run_that_explodes_gives_up_and_says_so(go: Train) -> None:
    outcome = go({"train.learning_rate": 1e30, "train.max_grad_norm": 0.0, "train.steps": 40})
    assert not outcome.verdict.healthy
    assert len(outcome.log) < 20
    assert [line.get("skipped", False) for line in outcome.log[-10:]] == [True] * 10
    read = manifest.read(outcome.checkpoint)
    assert read.health == outcome.verdict
    assert read.step == len(outcome.log)


# What is told and written ---------------------------------------------------------------------------------------------


def test_the_caller_and_the_observers_are_told_in_order(go: Train, lookup: DictLookup) -> None:
    told: list[Event] = []
    lookup.events.clear()
    outcome = go({"train.save_every": 2}, listen=told.append)
    assert lookup.events == told
    kinds = [(type(event), getattr(event, "step", None)) for event in told]
    taken = [(StepTaken, step) for step in range(1, 5)]
    place = kinds.index((CheckpointSaved, 2))
    del kinds[place]  # It is written during the steps after it, and told at the end of one of them.
    assert 3 <= place <= 5
    assert kinds == [(RunStarted, 0), *taken, (CheckpointSaved, 4), (RunEnded, 4)]
    started, ended = told[0], told[-1]
    assert isinstance(started, RunStarted)
    assert isinstance(ended, RunEnded)
    assert (started.steps, started.out) == (4, outcome.checkpoint.parent)
    assert isinstance(started.plan, Plan)
    assert (ended.healthy, ended.reasons) == (True, ())


def test_the_log_has_a_line_for_every_step(go: Train) -> None:
    outcome = go()
    lines = [json.loads(line) for line in (outcome.checkpoint.parent / "log.jsonl").read_text().splitlines()]
    assert lines == outcome.log
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0].keys() == {"step", "loss", "learning_rate", "gradient_norm", "images", "tokens", "seconds"}
    assert all(line["tokens"] > 4 * 16 and 0 <= line["images"] <= 4 and line["seconds"] > 0 for line in lines)


def test_an_image_counts_once_however_many_tiles_the_model_sees_of_it(go: Train) -> None:
    source = {"use": "shapes", "count": 6, "broken": [0]}  # four have an image, of which three can be read
    tiles = {"model.image_grid": 2, "model.image_global": True}
    told: list[Event] = []
    outcome = go({"data.source": [source], "train.batch_size": 6, "train.steps": 2} | tiles, listen=told.append)
    assert [event.images for event in told if isinstance(event, StepTaken)] == [3, 3]
    assert [line["images"] for line in outcome.log] == [3, 3]


def test_the_log_can_be_thinned_and_keeps_its_last_line(go: Train) -> None:
    outcome = go({"train.log_every": 3})
    lines = [json.loads(line) for line in (outcome.checkpoint.parent / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    assert lines == outcome.log


def test_only_so_many_checkpoints_are_kept(go: Train, tmp_path: Path) -> None:
    go({"train.save_every": 1, "train.keep": 2, "train.steps": 5})
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-4", "checkpoint-5"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-4", "checkpoint-5", "log.jsonl"]


def test_an_old_checkpoint_is_never_there_in_part(go: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(folder: Path, **options: Any) -> None:
        if files := [path for path in folder.rglob("*") if path.is_file()]:
            files[0].unlink()
            raise KeyboardInterrupt

    def variant(event: Event) -> None:
        if isinstance(event, StepTaken) and event.step == 3:
            monkeypatch.setattr("shutil.rmtree", killed)

    with pytest.raises(KeyboardInterrupt):
        go({"train.save_every": 1, "train.keep": 2}, listen=variant)
    monkeypatch.undo()
    assert checkpoints(tmp_path / "out")
    for folder in checkpoints(tmp_path / "out"):
        manifest.check_files(manifest.read(folder), folder)


def test_a_checkpoint_is_as_public_as_any_file(trained: Run) -> None:
    (trained.out / "plain").write_text("")
    (trained.out / "folder").mkdir()
    for path in trained.checkpoint.rglob("*"):
        other = trained.out / ("folder" if path.is_dir() else "plain")
        assert path.stat().st_mode == other.stat().st_mode, path
    assert trained.checkpoint.stat().st_mode == (trained.out / "folder").stat().st_mode
    (trained.out / "plain").unlink()
    (trained.out / "folder").rmdir()


def test_a_folder_that_holds_checkpoints_is_not_overwritten(trained: Run, lookup: DictLookup) -> None:
    assert refused(train, trained.plan, lookup, trained.out) == (
        f"'{trained.out}' already holds checkpoint-4; go on with --resume, or name another folder with --out"
    )


def test_a_plan_that_trains_nothing_is_refused(go: Train) -> None:
    said = refused(go, {"peft": None})
    assert said == "nothing is trained in this plan; set peft.use, or roles in peft.also_train"


def test_golden_inputs_without_labels_are_refused() -> None:
    from graftwork.checkpoint.verification import golden_inputs

    said = refused(golden_inputs, [Encoded([2, 5], [False] * 2, [IGNORED] * 2, {})], CharProcessor())
    assert said.startswith("the first records carry no labels, so the checkpoint could not be verified with them; ")


def test_saving_leaves_the_random_numbers_and_the_mode_alone(base: Path, lookup: DictLookup, tmp_path: Path) -> None:
    outcome = train(plan_of(base, tmp_path, {"train.steps": 1}), lookup, tmp_path / "out", device="cpu")
    outcome.assembly.model.train()
    before = torch.get_rng_state()
    golden = store.read_tensors(outcome.checkpoint / store.GOLDEN_INPUTS)
    facts: dict[str, Any] = {"step": 1, "steps": 1, "golden": golden, "health": outcome.verdict, "data": {}}
    store.save(outcome.assembly, tmp_path / "again", lookup, **facts)
    assert torch.get_rng_state().equal(before)
    assert outcome.assembly.model.training
