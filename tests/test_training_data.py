"""The data of a run: what is left out, cut or broken, how that is counted, and which step trains which record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import PlanOf

from graftwork.build import compose
from graftwork.checkpoint import manifest
from graftwork.checkpoint.store import checkpoints, open_checkpoint
from graftwork.contracts import IGNORED, DictLookup, Encoded
from graftwork.data.training_data import TrainingData, cut, load_training_data
from graftwork.errors import DataError
from graftwork.train.loop import Outcome

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
    assert data.summary["bad"] == []
    assert data.summary["stages"] == [{"name": "shapes", "read": 24, "kept": 24, "dropped": 0}]


def test_longer_records_are_cut_where_the_run_says_so(run: PlanOf, lookup: DictLookup, go: Train) -> None:
    changes = {"data.source": [{"use": "shapes", "long": [1, 5]}], "train.too_long": "cut", "train.steps": 6}
    data = gathered(run, lookup, changes)
    assert (len(data.records), data.summary["too_long"], data.summary["too_long_were"]) == (24, 2, "cut")
    assert max(data.lengths) == 128
    outcome = go(changes)
    assert max(line["tokens"] for line in outcome.log) <= 4 * 128
    assert outcome.data["bad"] == []


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
    assert (shorter.input_ids, shorter.labels, len(shorter.image_token_mask)) == (ids[:8], labels[:8], 8)
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


def test_a_step_whose_records_are_all_broken_takes_the_next_ones(go: Train) -> None:
    source = {"use": "shapes", "count": 6, "broken": [0, 4]}
    outcome = go({"data.source": [source], "train.batch_size": 1, "train.steps": 12})
    assert [line["step"] for line in outcome.log] == list(range(1, 13))
    assert len(outcome.data["bad"]) == 2


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
