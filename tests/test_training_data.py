"""The data of a run: what is left out, cut or broken, how that is counted, and which step trains which record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_runs import COMPONENTS, Interrupted, PlanOf, interrupt_at

from graftwork.build import compose
from graftwork.checkpoint import manifest
from graftwork.checkpoint.store import checkpoints, open_checkpoint
from graftwork.contracts import (
    IGNORED,
    Assembly,
    Batch,
    CheckpointSaved,
    DictLookup,
    Encoded,
    MemoryStrategy,
    NoSettings,
    Stepper,
    TrainSettings,
)
from graftwork.data.training_data import TrainingData, cut, load_training_data
from graftwork.errors import DataError, PlanRefused
from graftwork.train.loop import Outcome, train

Train = Callable[..., Outcome]


def refused(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(DataError) as caught:
        call(*args)
    return str(caught.value)


def gathered(run: PlanOf, lookup: DictLookup, changes: dict[str, Any]) -> TrainingData:
    plan = run(changes)
    assembly = compose.build_shape(plan, lookup)
    return load_training_data(plan, lookup, assembly.processor)


def test_longer_records_are_left_out_and_counted(run: PlanOf, lookup: DictLookup) -> None:
    data = gathered(run, lookup, {"data.source": [{"use": "shapes", "long": [1, 5]}]})
    assert data.summary["records"] == len(data.records) == len(data.lengths) == 22
    assert (data.summary["too_long"], data.summary["too_long_were"]) == (2, "left out")
    assert max(data.lengths) <= 128
    assert data.summary["groups"] == {"circle": 10, "square": 12}
    assert [line.split(" tokens")[0][:9] for line in data.summary["bad"]] == ["shapes:1:", "shapes:5:"]
    assert data.summary["stages"] == [
        {"name": "shapes", "read": 24, "kept": 24, "dropped": 0},
        {"name": "train.max_length", "read": 24, "kept": 22, "dropped": 2},
        {"name": "total", "read": 24, "kept": 22, "dropped": 2},
    ]


def test_longer_records_are_cut_where_the_run_says_so(run: PlanOf, lookup: DictLookup, go: Train) -> None:
    changes = {"data.source": [{"use": "shapes", "long": [1, 5]}], "train.too_long": "cut", "train.steps": 6}
    data = gathered(run, lookup, changes)
    assert (len(data.records), data.summary["too_long"], data.summary["too_long_were"]) == (24, 2, "cut")
    assert max(data.lengths) == 128
    outcome = go(changes)
    assert max(line["tokens"] for line in outcome.log) <= 4 * 128
    assert [*outcome.data["bad"]] == []


def test_a_cut_record_without_a_label_left_is_left_out_and_counted(go: Train) -> None:
    outcome = go({"data.source": [{"use": "shapes", "asking": [2]}], "train.too_long": "cut", "train.steps": 6})
    (line,) = outcome.data["bad"]
    assert line.startswith("shapes:2: nothing to learn is left of a record of ")
    assert line.endswith(" tokens cut to 128")


def test_cutting_keeps_labels_and_whole_images_or_refuses() -> None:
    ids, labels = list(range(10)), [IGNORED] * 6 + [6, 7, 8, 9]
    example = Encoded(ids, [True] * 3 + [False] * 7, labels, {"low": torch.zeros(1)})
    assert cut(example, 10) is example
    shorter = cut(example, 8)
    assert ([*shorter.input_ids], [*shorter.labels], len(shorter.image_token_mask)) == (ids[:8], labels[:8], 8)
    assert shorter.pixels is example.pixels
    for length in (6, 2):
        assert "nothing to learn is left" in refused(cut, example, length)
    late = Encoded(ids, [False] * 9 + [True], [IGNORED, *range(9)], {})
    assert "nothing to learn is left" in refused(cut, late, 9)


@pytest.mark.parametrize("too_long", ["skip", "cut"])
def test_strict_data_has_no_long_records(run: PlanOf, lookup: DictLookup, too_long: str) -> None:
    changes = {
        "data": {"strict": True, "source": [{"use": "shapes", "long": [1]}]},
        "train.too_long": too_long,
    }
    said = refused(gathered, run, lookup, changes)
    assert said.startswith("shapes:1: the record has ")
    assert said.endswith(" tokens, train.max_length is 128")


def test_a_record_is_no_longer_than_the_model_reads(run: PlanOf, lookup: DictLookup) -> None:
    long = {"use": "shapes", "longest": [1]}
    by_default = run({"train.max_length": None, "data.source": [long]})
    assert by_default.run_context.train.max_length == 512
    data = load_training_data(by_default, lookup, compose.build_shape(by_default, lookup).processor)
    assert (len(data.records), data.summary["too_long"], data.summary["too_long_were"]) == (23, 1, "left out")
    assert run({"train.max_length": 512}).run_context.train.max_length == 512
    with pytest.raises(PlanRefused) as caught:
        run({"train.max_length": 513})
    assert caught.value.details == (
        "train.max_length: is 513, and 'mgm-gemma' reads 512 tokens at most; set it to 512 or less, or leave it out",
    )


def test_data_without_records_is_refused(run: PlanOf, lookup: DictLookup) -> None:
    said = refused(gathered, run, lookup, {"data.source": [{"use": "shapes", "count": 0}]})
    assert said.startswith("no record is left of 0 that were read")
    said = refused(gathered, run, lookup, {"train.max_length": 5})
    assert said.startswith(
        "no record is left to train on: 24 were read, 24 are longer than train.max_length = 5 tokens\n  shapes:0: "
    )


def test_a_small_data_set_makes_small_batches(go: Train) -> None:
    outcome = go({"data.source": [{"use": "shapes", "count": 3}], "train.steps": None, "train.epochs": 2.0})
    assert [line["images"] for line in outcome.log] == [2, 2]


def test_records_whose_image_is_broken_are_left_out_and_counted_once(go: Train, lookup: DictLookup) -> None:
    source = {"use": "shapes", "count": 8, "broken": [0, 4], "bad": 1}
    outcome = go({"data.source": [source], "train.steps": 6})
    bad = outcome.data["bad"]
    assert bad[0] == "shapes:bad 0: it is bad"
    assert sorted(line.split(":")[1] for line in bad[1:]) == ["0", "4"]
    read = manifest.read(outcome.checkpoint)
    assert (read.data["bad"], read.data["bad_in_all"]) == (bad, 3)
    assert open_checkpoint(outcome.checkpoint, lookup, device="cpu").verification.error == 0.0


class Noting(MemoryStrategy[NoSettings]):
    """Plain steps, which note the records that they train on, by number"""

    name = "noting"
    trained: ClassVar[list[int]] = []

    def stepper(self, assembly: Assembly, settings: TrainSettings) -> Stepper:
        class NotingStepper(Stepper):
            def accumulate(self, batch: Batch, num_label_tokens: float, *, last: bool = True) -> torch.Tensor:
                texts = map(assembly.processor.decode, batch.input_ids.tolist())
                Noting.trained += [int(text.partition("?")[0].rpartition(" ")[2]) for text in texts]
                return super().accumulate(batch, num_label_tokens, last=last)

        return NotingStepper(assembly, settings)


NOTING = DictLookup(*COMPONENTS, Noting)
BROKEN = {"data.source": [{"use": "shapes", "count": 12, "broken": [0, 1, 3, 4, 9]}], "memory": {"use": ["noting"]}}
USABLE = [2, 5, 6, 7, 8, 10, 11]


def noted(run: PlanOf, out: Path, changes: dict[str, Any], **options: Any) -> tuple[list[int], Outcome | None]:
    """The records that a run trains on, and how it ends; None if it was interrupted."""
    Noting.trained.clear()
    try:
        outcome = train(run(BROKEN | changes, NOTING), NOTING, out, device="cpu", **options)
    except Interrupted:
        return list(Noting.trained), None
    return list(Noting.trained), outcome


@pytest.mark.parametrize(("size", "seed"), [(1, 5), (1, 6), (1, 7), (2, 5), (3, 5)])
def test_an_epoch_trains_every_usable_record_once_however_many_batches_are_broken(
    run: PlanOf, tmp_path: Path, size: int, seed: int
) -> None:
    changes = {"seed": seed, "train.batch_size": size, "train.steps": None, "train.epochs": 1.0}
    trained, outcome = noted(run, tmp_path / "out", changes)
    assert outcome and sorted(trained) == USABLE
    assert [line["step"] for line in outcome.log] == list(range(1, len(outcome.log) + 1))
    if size == 1:
        assert len(outcome.log) == 7
    read = manifest.read(outcome.checkpoint)
    assert (read.step, read.steps) == (len(outcome.log), len(outcome.log))


def test_a_run_of_so_many_steps_takes_them_all_epoch_by_epoch(run: PlanOf, tmp_path: Path) -> None:
    trained, outcome = noted(run, tmp_path / "out", {"train.batch_size": 1, "train.steps": 17})
    assert outcome and [line["step"] for line in outcome.log] == list(range(1, 18))
    assert sorted(trained[:7]) == sorted(trained[7:14]) == USABLE
    assert len(set(trained[14:])) == 3
    assert len(outcome.data["bad"]) == 5


@pytest.mark.parametrize("until", [2, 5])
def test_a_resumed_epoch_trains_no_record_again(run: PlanOf, tmp_path: Path, until: int) -> None:
    changes = {"train.batch_size": 1, "train.steps": None, "train.epochs": 1.0, "train.save_every": 1, "train.keep": 9}
    whole, ended = noted(run, tmp_path / "whole", changes)
    first, _ = noted(run, tmp_path / "out", changes, listen=interrupt_at(CheckpointSaved, until))
    rest, resumed = noted(run, tmp_path / "out", changes, resume=True)
    assert first[:until] + rest == whole and sorted(whole) == USABLE  # what came after the checkpoint comes again
    assert ended and resumed
    assert [line["loss"] for line in resumed.log] == [line["loss"] for line in ended.log]


def test_data_of_nothing_but_broken_images_is_refused(go: Train, tmp_path: Path) -> None:
    source = {"use": "shapes", "count": 2, "broken": [0, 1]}
    said = refused(go, {"data.source": [source]})
    assert said.startswith("no record of the data can be used\n  shapes:")
    assert not checkpoints(tmp_path / "out")


def test_strict_data_has_no_broken_images(go: Train) -> None:
    data = {"strict": True, "source": [{"use": "shapes", "broken": [0]}]}
    refused(go, {"data": data, "train.steps": 6})


def test_a_manifest_does_not_grow_with_what_is_wrong_with_the_data(go: Train) -> None:
    outcome = go({"data.source": [{"use": "shapes", "bad": 5000}], "train.steps": 1})
    assert len(outcome.data["bad"]) == 5000
    read = manifest.read(outcome.checkpoint)
    assert (len(read.data["bad"]), read.data["bad_in_all"]) == (100, 5000)
    assert (outcome.checkpoint / manifest.FILE).stat().st_size < 100_000
