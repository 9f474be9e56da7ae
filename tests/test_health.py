"""Whether a run learned, did not learn, or broke; each kind of failure has a case here, and measured ones in test_verdicts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import plan_of
from verdict_runs import DEMO_LORA, FAULTS, LOOKUP, RATES, case, scaled_base

from graftwork.contracts import Record, Turn, Verdict
from graftwork.data.digest import image_hash, record_fields
from graftwork.data.training_data import faults_of
from graftwork.errors import DataError
from graftwork.train.health import GIVE_UP_AFTER, Health
from graftwork.train.loop import train
from graftwork.train.progress import RECORDS, Measurement, steps_to_measure

VOCABULARY = 256_000
CHANCE = math.log(VOCABULARY)
STEPS = 100
FALLING = [3.0 * 0.98**step for step in range(STEPS)]


def judged(losses: Sequence[float], skipped: int = 0, **options: Any) -> Verdict:
    """The verdict on a run with these losses of its steps, the first of which were skipped."""
    health = Health(VOCABULARY, **options)
    for step, loss in enumerate(losses):
        health.update(loss, 1.0, skipped=step < skipped)
    return health.verdict()


def followed(*means: float, changes: float = 0.02, sizes: Sequence[float] = (), **options: Any) -> Health:
    """A run of 100 steps at one learning rate, whose 32 records had these mean losses after equally many steps each.

    Records differ by far more than they change, and by `changes` in how much they do.
    """
    chance = random.Random(1)
    records = [chance.uniform(-0.9, 0.9) for _ in range(RECORDS)]
    health = Health(VOCABULARY, losses=FALLING, norms=[1.0] * STEPS, **options)
    for number, mean in enumerate(means):
        losses = [mean * (1 + record) + chance.gauss(0.0, changes * mean) * (number > 0) for record in records]
        shift = mean - sum(losses) / RECORDS
        step = round(number * STEPS / (len(means) - 1))
        size = sizes[number] if sizes else 0.1
        health.measurements.append(Measurement(step, float(step), size, tuple(loss + shift for loss in losses)))
    return health


def said(health: Health) -> str:
    return health.verdict().sentence()


# By the losses of the same records -------------------------------------------------------------------------------------


def test_a_loss_that_fell_on_the_same_records_is_healthy_and_says_so() -> None:
    assert said(followed(3.0, 1.2, 0.9, 0.8)) == (
        "healthy: loss 3.000 to 0.800 on the same 32 records (a model that knows nothing has 12.453)"
    )


def test_records_that_differ_widely_do_not_hide_that_each_of_them_fell_a_little() -> None:
    assert followed(3.0, 2.6, 2.55, 2.5).verdict().healthy


def test_a_few_records_that_are_learned_make_a_run_healthy_where_the_others_were_known() -> None:
    health = followed(3.0, 3.0)
    before, after = (0.01,) * 28 + (6.0,) * 4, (0.012,) * 28 + (0.5, 4.0, 1.0, 0.1)
    health.measurements = [Measurement(0, 0.0, 0.1, before), Measurement(STEPS, 100.0, 0.1, after)]
    assert health.verdict().healthy


def test_a_loss_that_hardly_changed_did_not_learn() -> None:
    assert said(followed(3.0, 2.995, 2.995, 2.99, changes=0.005)) == (
        "did not learn: the loss of the same 32 records was 3 at first and 2.99 after 100 steps"
    )
    assert followed(3.0, 3.02).verdict().failure == "did not learn"


def test_a_fall_that_is_small_and_does_not_slow_down_did_not_learn_yet() -> None:
    assert said(followed(3.0, 2.93, 2.86, 2.79)) == (
        "did not learn: the loss of the same 32 records was 3 at first and 2.79 after 100 steps, and fell no more slowly in "
        "the end: the learning rate is too low, or the run too short"
    )
    assert followed(3.0, 2.83, 2.80, 2.79).verdict().healthy  # as large, and nearly all of it at once


def test_a_run_of_few_steps_is_asked_for_less() -> None:
    health = followed(3.0, 2.99, 2.99, changes=0.002)
    assert health.verdict().failure == "did not learn"
    health.losses = health.losses[:3]
    assert health.verdict().healthy


def test_a_loss_that_is_exactly_as_before_says_that_nothing_changed() -> None:
    health = followed(3.0, 2.0)
    health.measurements[-1] = replace(health.measurements[0], step=STEPS)
    assert said(health) == (
        "did not learn: nothing changed: the loss of the same 32 records was 3 before, and is the same for each of them"
    )


def test_a_loss_near_0_wavers() -> None:
    assert followed(0.02, 0.02, 0.05).verdict().healthy


def test_a_loss_that_rose_broke_in_the_end_or_on_the_way() -> None:
    assert said(followed(3.0, 2.0, 3.6)) == (
        "broke: the loss of the same 32 records rose from 3 to 3.6; lower the learning rate"
    )
    assert said(followed(3.0, 9.5, 4.0, 1.5)) == (
        "broke: the loss of the same 32 records rose from 3 to 9.5 by step 33, before it came to 1.5; lower the learning rate"
    )
    assert followed(3.0, 3.2, 1.5).verdict().healthy


def test_a_loss_that_stopped_above_that_of_guessing_did_not_learn() -> None:
    assert said(followed(6.0, 4.7, 4.65, 4.64, guessing=2.8)) == (
        "did not learn: the loss of the same 32 records was 6 at first and 4.64 after 100 steps, where it stopped, and "
        "guessing by frequency has 2.8; lower the learning rate"
    )
    assert followed(6.0, 5.5, 5.1, 4.64, guessing=2.8).verdict().healthy  # it is on its way
    assert followed(6.0, 2.9, 2.85, 2.84, guessing=2.8).verdict().healthy


def test_weights_that_grew_beyond_measure_broke_unless_they_began_near_zero() -> None:
    assert said(followed(3.0, 1.5, sizes=(0.05, 1.2))) == (
        "broke: the trained weights grew from 0.05 to 1.2 (root mean square); lower the learning rate"
    )
    assert followed(3.0, 1.5, sizes=(0.0001, 0.1)).verdict().healthy
    assert followed(3.0, 1.5, sizes=(math.nan, 1.0)).verdict().healthy


def test_gradients_that_grew_beyond_measure_broke() -> None:
    health = followed(3.0, 1.5)
    health.norms = [1.2**step for step in range(STEPS)]
    assert said(health).startswith("broke: the gradients' norm grew from ")
    health.norms = [1.0] * 90 + [5000.0] * 10  # a few
    assert health.verdict().healthy
    health.norms = [0.001] * 50 + [2.0] * 50  # the first records were known
    assert health.verdict().healthy


def test_no_gradient_at_all_did_not_learn() -> None:
    health = followed(3.0, 3.0)
    health.norms = [0.0] * STEPS
    assert said(health).startswith(
        "did not learn: no gradient reached what is trained in any of 100 steps: the loss does not depend on it; "
    )


def test_losses_of_the_records_that_are_not_finite_broke() -> None:
    health = followed(3.0, 1.5)
    last = health.measurements[-1]
    health.measurements[-1] = replace(last, losses=(math.nan, *last.losses[1:]))
    assert said(health) == "broke: the losses of 1 of the same 32 records are not finite numbers in the end"


def test_a_run_that_goes_on_cannot_have_failed_to_learn_yet() -> None:
    assert followed(3.0, 3.0).verdict(ended=False).healthy
    assert followed(3.0, 4.0).verdict(ended=False).failure == "broke"


def test_a_run_is_measured_before_it_after_it_and_when_it_may_break() -> None:
    assert sorted(steps_to_measure(200, 6)) == [0, 8, 25, 50, 100, 200]
    assert sorted(steps_to_measure(1, 1)) == [0, 1]


# By the losses of the steps alone ---------------------------------------------------------------------------------------


def test_a_falling_loss_is_healthy() -> None:
    verdict = judged(FALLING)
    assert (verdict.reasons, verdict.failure, verdict.records) == ((), "", 0)
    assert verdict.sentence() == "healthy: loss 2.493 to 0.495 (a model that knows nothing has 12.453)"


def test_one_step_can_be_healthy() -> None:
    assert judged([2.0]).healthy


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_jumps_between_groups_of_records_is_healthy_where_it_falls(seed: int) -> None:
    chance = random.Random(seed)
    losses = [chance.choice((0.1, 4.0, 6.0)) * (0.3 + 0.7 * 0.95**step) for step in range(60)]
    assert judged(losses).healthy


def test_a_level_or_rising_loss_is_not_healthy() -> None:
    chance = random.Random(3)
    level = [2.0 + chance.gauss(0, 0.01) for _ in range(STEPS)]
    assert judged(level).sentence().startswith("did not learn: the loss was 1.999 at first and 2 after 100 steps")
    assert judged([1.0 + 0.02 * step for step in range(50)]).sentence() == (
        "broke: the loss rose from 1.09 to 1.89; lower the learning rate"
    )
    assert judged([0.02] * 10 + [0.05] * 10).healthy  # a loss near 0 wavers


def test_the_reported_overflow_in_fp16_broke_for_every_reason() -> None:
    verdict = judged([1e11, 1e11, 1.4e11], precision="fp16", overflows_in=("fp16",))
    assert verdict.reasons == (
        "fp16 is known to overflow in this model; train in bf16 or fp32",
        "the loss starts at 1e+11 and ends at 1.4e+11, and a model that knows nothing has 12.5: the weights, the prompt or "
        "the precision are wrong",
    )
    assert verdict.sentence().startswith("broke: fp16 is known to overflow in this model")


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_broke(loss: float) -> None:
    assert judged([*FALLING, loss]).sentence() == "broke: 1 of 101 losses are not finite numbers"


def test_a_run_of_nothing_but_nan_has_no_last_loss() -> None:
    verdict = judged([math.nan] * 3, skipped=3)
    assert (verdict.healthy, verdict.first_loss, verdict.last_loss) == (False, None, None)
    assert verdict.reasons == (
        "3 of 3 losses are not finite numbers",
        "3 of 3 steps were skipped for gradients that are not finite",
    )


def test_a_run_without_steps_did_not_learn() -> None:
    assert judged([]).sentence() == "did not learn: no step was taken"


def test_an_end_above_chance_is_only_healthy_on_a_good_way() -> None:
    assert judged([1.1 * CHANCE] * 20 + [1.05 * CHANCE] * 20).sentence() == (
        "did not learn: the loss was 13.7 at first and 13.08 after 40 steps, and a model that knows nothing has 12.5"
    )
    assert judged([1.9 * CHANCE, *FALLING]).healthy
    assert judged([1.8 * CHANCE - 0.2 * step for step in range(40)]).healthy
    assert judged([2.5 * CHANCE - 0.02 * step for step in range(40)]).failure == "broke"


def test_a_large_share_of_skipped_steps_broke() -> None:
    assert judged(FALLING, skipped=11).reasons == ("11 of 100 steps were skipped for gradients that are not finite",)
    assert judged(FALLING, skipped=10).healthy


def test_a_precision_that_overflows_broke_even_when_the_loss_falls() -> None:
    assert judged(FALLING, precision="fp16", overflows_in=("fp16",)).reasons == (
        "fp16 is known to overflow in this model; train in bf16 or fp32",
    )
    assert judged(FALLING, precision="bf16", overflows_in=("fp16",)).healthy


def test_a_run_is_hopeless_after_many_skipped_steps_in_a_row() -> None:
    health = Health(VOCABULARY)
    for _ in range(GIVE_UP_AFTER - 1):
        health.update(math.nan, skipped=True)
    assert not health.should_abort
    health.update(1.0)
    assert health.skipped_in_a_row == 0
    for _ in range(GIVE_UP_AFTER):
        assert not health.should_abort
        health.update(math.nan, skipped=True)
    assert health.should_abort
    assert health.skipped == 2 * GIVE_UP_AFTER - 1


# What is kept and shown ---------------------------------------------------------------------------------------------------


def test_what_a_resumed_run_needs_comes_back() -> None:
    health = followed(3.0, 1.2, 0.9, guessing=2.0)
    again = Health(VOCABULARY)
    again.restore(health.state())
    assert again == health


def test_a_run_from_before_there_were_measurements_can_be_resumed() -> None:
    health = Health(VOCABULARY, losses=FALLING)
    old = {key: value for key, value in health.state().items() if key in ("losses", "skipped")}
    again = Health(VOCABULARY)
    again.restore(old)
    assert (again.losses, again.norms, again.measurements) == (FALLING, [], [])
    assert again.verdict().healthy


def test_an_older_checkpoints_failure_has_no_kind() -> None:
    assert Verdict(False, ("the loss rose",)).sentence() == "unhealthy: the loss rose"


# The data ---------------------------------------------------------------------------------------------------------------


def talk(question: str, answer: str) -> Record:
    return Record("id", (Turn("user", question), Turn("assistant", answer)))


@pytest.mark.parametrize(
    ("records", "faults"),
    [
        ([talk("a", "yes")] * 3, ["the data is one record, 3 times: there is nothing to learn but that record"]),
        (
            [talk("a", "yes"), talk("a", "no")],
            ["all 2 records ask the same of the same image, so that no answer can depend on it"],
        ),
        (
            [talk(str(number), "yes" if number else "no") for number in range(20)],
            ["19 of 20 records have the same answer, 'yes', and no other can be learned"],
        ),
        ([talk(str(number), "yes" if number > 1 else "no") for number in range(20)], []),
    ],
)
def test_data_from_which_nothing_can_be_learned_is_seen(records: list[Record], faults: list[str]) -> None:
    assert faults_of(record_fields(records, image_hash()), records.__getitem__) == faults


# One small run of each kind -----------------------------------------------------------------------------------------------

ENDS = {
    "fp16 overflow": "broke: 10 of 10 losses are not finite numbers",
    "rate 100 times too high": "broke: ",
    "rate 100 times too low": "did not learn: the loss of the same 16 records was ",
    "rate zero": "did not learn: nothing changed",
    "constant loss": "did not learn: no gradient reached what is trained in any of 24 steps",
    "detached adapter": "did not learn: no gradient reached what is trained in any of 24 steps",
    "adapter not optimized": "did not learn: nothing changed",
    "growing gradients": "broke: the gradients' norm grew from ",
    "exploding activations": "broke: the loss starts at ",
    "one answer in the data": "did not learn: 16 of 16 records have the same answer",
    "one answer for one question": "did not learn: all 16 records ask the same of the same image",
    "data of one record": "did not learn: the data is one record, 16 times",
}


@pytest.fixture
def small(base: Path, tmp_path: Path) -> Callable[[str], str]:
    """What is said of a small run of a kind on the data `captions`, whose lengths make the loss jump."""

    def ended(kind: str) -> str:
        one = case(kind, 0)
        factor = FAULTS.get(kind, {}).get("rate", 1.0)
        changes = one.changes | {
            "data.source": [{"use": "captions", "count": 16}],
            "peft": DEMO_LORA,
            "train.learning_rate": RATES["lora"] * factor,
            "train.steps": 24,
            "train.batch_size": 4,
            "train.group_by_length": True,
            "train.schedule": "cosine",
        }
        start = scaled_base(base, tmp_path / "scaled", one.scaled) if one.scaled else base
        outcome = train(plan_of(start, tmp_path, changes, LOOKUP), LOOKUP, tmp_path / "out", device="cpu")
        return outcome.verdict.sentence()

    return ended


def test_a_small_sound_run_is_healthy(small: Callable[[str], str]) -> None:
    assert small("healthy").startswith("healthy: loss ")


@pytest.mark.parametrize("kind", ENDS)
def test_a_planted_failure_is_seen_in_a_small_run(small: Callable[[str], str], kind: str) -> None:
    assert small(kind).startswith(ENDS[kind])


def test_data_whose_labels_are_all_masked_is_refused(small: Callable[[str], str]) -> None:
    with pytest.raises(DataError) as caught:
        small("all labels masked")
    assert caught.value.sentence == "no record of the data can be used"
    assert "nothing is to be learned from a record without a labelled token" in caught.value.details[0]
