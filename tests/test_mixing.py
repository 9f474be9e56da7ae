"""Which records an epoch takes, how they are mixed, which answers carry loss, what records weigh, and what is kept for validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tiny_runs import COMPONENTS, PlanOf, Shapes

from graftwork.build import compose
from graftwork.contracts import IGNORED, DictLookup, Encoded, Image, Record, Turn, collate, summed_loss
from graftwork.contracts.plan import Mix
from graftwork.data.sampling import Sampler, draws
from graftwork.data.splitting import held_out
from graftwork.data.training_data import encode, load_training_data, marked
from graftwork.errors import DataError, RunFileError
from graftwork.jobs.outcome import notes
from graftwork.train.loop import Outcome


def talk(*answers: bool | None, **fields: Any) -> Record:
    turns = [
        turn
        for number, trained in enumerate(answers)
        for turn in (Turn("user", f"question {number}"), Turn("assistant", f"answer {number}", trained))
    ]
    return Record("talk", tuple(turns), **fields)


# Mixing -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "mix", "expected"),
    [
        ([10, 30], [Mix(), Mix()], [10, 30]),
        ([10, 30], [Mix(repeat=2), Mix()], [20, 30]),
        ([10, 30], [Mix(0.3), Mix(0.7)], [12, 28]),
        ([10, 30], [Mix(3.0), Mix(1.0)], [30, 10]),
        ([10, 30], [Mix(0.5), Mix()], [20, 20]),
        ([10, 10, 20], [Mix(0.25), Mix(), Mix()], [10, 10, 20]),
        ([10, 0], [Mix(0.3), Mix(0.7)], [10, 0]),
        ([0, 30], [Mix(0.5), Mix()], [0, 30]),
        ([3, 4], [Mix(1.0), Mix(1.0)], [4, 3]),
    ],
)
def test_an_epoch_takes_of_each_source_what_its_weight_says(
    sizes: list[int], mix: list[Mix], expected: list[int]
) -> None:
    assert draws(sizes, mix) == expected


def counted(sampler: Sampler, epochs: int, size: int) -> Counter[int]:
    batches = sampler.records // size
    return Counter(index for number in range(batches * epochs) for index in sampler.batch(number))


def test_a_weight_takes_other_records_each_epoch_and_each_as_often_as_the_others() -> None:
    sources = numpy.array([0] * 10 + [1] * 30)
    sampler = Sampler([1] * 40, 4, seed=3, by_length=False, sources=sources, mix=[Mix(0.75), Mix(0.25)])
    first, all_epochs = counted(sampler, 1, 4), counted(sampler, 3, 4)
    assert sum(first[index] for index in range(10)) == 30
    assert {first[index] for index in range(10)} == {3}
    assert {all_epochs[index] for index in range(10, 40)} == {1}


def test_a_repeated_source_comes_so_often_and_jumping_equals_walking() -> None:
    sources = numpy.array([0] * 4 + [1] * 8)
    made = [Sampler([1] * 12, 2, seed=3, by_length=True, sources=sources, mix=[Mix(repeat=3), Mix()]) for _ in range(2)]
    found = counted(made[0], 1, 2)
    assert [found[index] for index in range(12)] == [3] * 4 + [1] * 8
    walked = [made[0].batch(number) for number in range(25)]
    assert made[1].batch(24) == walked[24]


def test_sources_without_weights_are_drawn_as_before() -> None:
    plain = Sampler([1] * 12, 2, seed=3, by_length=False)
    mixed = Sampler([1] * 12, 2, seed=3, by_length=False, sources=numpy.zeros(12), mix=[])
    assert [plain.batch(number) for number in range(12)] == [mixed.batch(number) for number in range(12)]


def test_a_mixed_run_takes_the_records_of_its_epoch(go: Callable[..., Outcome]) -> None:
    sources = [{"use": "shapes", "count": 4, "repeat": 3}, {"use": "shapes", "count": 4}]
    outcome = go({"data.source": sources, "train.steps": None, "train.epochs": 1.0, "train.batch_size": 4})
    assert [line["step"] for line in outcome.log] == [1, 2, 3, 4]


def test_weights_that_leave_nothing_are_refused(run: PlanOf) -> None:
    with pytest.raises(RunFileError) as caught:
        run({"data.source": [{"use": "shapes", "weight": 0.6}, {"use": "shapes", "weight": 0.4}, {"use": "shapes"}]})
    assert "the weights add up to 1, which leaves nothing for the sources without one" in caught.value.details[0]
    with pytest.raises(RunFileError, match="exclude each other"):
        run({"data.source": [{"use": "shapes", "weight": 0.6, "repeat": 2}]})


# Answers and weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train_on", "marks", "expected"),
    [
        ("all", (None, None, None), [None, None, None]),
        ("all", (False, None, True), [False, None, True]),
        ("last", (None, None, None), [False, False, True]),
        ("last", (None, None, False), [False, False, False]),
        ("marked", (True, None, False), [True, False, False]),
    ],
)
def test_which_answers_carry_loss(train_on: Any, marks: tuple[bool | None, ...], expected: list[bool | None]) -> None:
    turns = marked(talk(*marks), train_on).turns
    assert [turn.trained for turn in turns if turn.role == "assistant"] == expected


def test_only_the_chosen_answers_are_labelled(run: PlanOf, lookup: DictLookup) -> None:
    processor = compose.build_shape(run({}), lookup).processor
    whole, last = (encode(marked(talk(None, None), how), processor, 512) for how in ("all", "last"))
    assert [*whole.input_ids] == [*last.input_ids]
    assert 0 < last.num_label_tokens < whole.num_label_tokens
    assert processor.decode([label for label in last.labels if label >= 0]) == "answer 1"


def test_records_without_a_mark_are_left_out_where_marks_decide(run: PlanOf, lookup: DictLookup) -> None:
    plan = run({"data.train_on": "marked"})
    with pytest.raises(DataError, match="no record is left to train on") as caught:
        load_training_data(plan, lookup, compose.build_shape(plan, lookup).processor)
    assert (
        caught.value.details[0]
        == 'shapes:0: no answer of it is to be trained on: data.train_on is "marked", or its weight is 0'
    )


def test_a_record_counts_by_its_weight(run: PlanOf, lookup: DictLookup) -> None:
    assembly = compose.build(run({}), lookup, device="cpu")
    light, heavy = (encode(talk(None, weight=weight), assembly.processor, 512) for weight in (1.0, 3.0))
    other = encode(talk(None, None), assembly.processor, 512)

    def loss(*examples: Encoded) -> float:
        with torch.no_grad():
            batch = collate(examples, pad_id=assembly.processor.pad_id)
            return float(summed_loss(assembly.model, batch, assembly.cross_entropy))

    assert loss(heavy) == pytest.approx(3 * loss(light), rel=1e-5)
    assert loss(heavy, other) == pytest.approx(3 * loss(light) + loss(other), rel=1e-5)
    assert heavy.loss_weight == 3 * light.num_label_tokens

    # As what fills up the micro-batches of a process that has fewer than others.
    unlabelled = replace(light, labels=[IGNORED] * len(light.labels), weight=2.0)
    assert loss(heavy, unlabelled) == pytest.approx(loss(heavy))


# Validation -----------------------------------------------------------------------------------------------------------------


def test_no_image_is_on_both_sides_and_the_side_does_not_depend_on_the_others() -> None:
    def shows(id: str, *names: str) -> Record:
        return Record(id, (Turn("user", "?"), Turn("assistant", "!")), tuple(Image(Path(name)) for name in names))

    pairs = [shows(f"{number}-{twin}", f"{number // 2}.png") for number in range(600) for twin in "ab"]
    chain = [shows("x", "left.png", "middle.png"), shows("y", "middle.png", "right.png"), shows("z", "right.png")]
    texts = [shows(f"text {number}") for number in range(200)]
    records = [*pairs, *chain, *texts]
    found = held_out(records, 0.2, 5)
    sides: dict[Any, set[bool]] = {}
    for record, side in zip(records, found.tolist(), strict=True):
        for image in record.images:
            sides.setdefault(image, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert len(set(found[1200:1203].tolist())) == 1
    assert 0.14 < found.mean() < 0.26
    assert held_out(records[::-1], 0.2, 5).tolist() == found.tolist()[::-1]
    assert held_out(pairs[:50], 0.2, 5).tolist() == found[:50].tolist()
    assert held_out(records, 0.2, 6).tolist() != found.tolist()


def test_a_run_measures_what_it_keeps_for_validation(go: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = go({"data.validation": 0.3, "data.source": [{"use": "shapes", "count": 40}]})
    data = outcome.data
    assert data["validation"] > 0 and data["read"] == data["records"] == 40
    steps = [step for step, _ in data["validation_losses"]]
    assert steps[0] == 0 and steps[-1] == outcome.log[-1]["step"]
    assert any(sentence.startswith("Validation loss, of ") for sentence in notes(data))


def test_records_for_validation_that_cannot_be_used_are_told(go: Callable[..., Outcome]) -> None:
    source = {"use": "shapes", "count": 40, "broken": [*range(0, 40, 2)]}
    data = go({"data.validation": 0.3, "data.source": [source]}).data
    assert data["validation_unusable"]
    assert any("records for validation could not be used, such as shapes:" in sentence for sentence in notes(data))


def test_a_weight_that_leaves_a_source_no_record_is_refused() -> None:
    with pytest.raises(DataError, match=r"^data.source.1: of an epoch of 2,050 records its weight leaves it none"):
        draws([2000, 50], [Mix(0.9999), Mix(0.0001)])


def test_a_share_that_leaves_nothing_on_one_side_is_refused(run: PlanOf) -> None:
    class OneImage(Shapes):
        name = "one-image"

        def records(self) -> Any:
            for each in super().records():
                if isinstance(each, Record) and each.images:
                    yield replace(each, images=(Image(Path("one.png")),))

    own = DictLookup(*COMPONENTS, OneImage)
    plan = run({"data.validation": 0.5, "data.source": [{"use": "one-image"}]}, own)
    with pytest.raises(DataError, match="leaves nothing on one side"):
        load_training_data(plan, own, compose.build_shape(plan, own).processor)
