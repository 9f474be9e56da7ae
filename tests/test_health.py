"""Whether a run is a success, or only ended."""

from __future__ import annotations

import math

import pytest

from graftwork.contracts import Verdict
from graftwork.train.health import GIVE_UP_AFTER, Health, count_spikes

VOCABULARY = 256_000
CHANCE = math.log(VOCABULARY)
FALLING = [3.0 * 0.98**step for step in range(100)]


def judged(losses: list[float], skipped: int = 0, **options: object) -> Verdict:
    """The verdict on a run with these losses, the first of which were skipped."""
    health = Health(VOCABULARY, **options)  # type: ignore[arg-type]
    for step, loss in enumerate(losses):
        health.update(loss, skipped=step < skipped)
    return health.verdict()


def test_a_falling_loss_is_healthy() -> None:
    verdict = judged(FALLING)
    assert verdict.healthy
    assert verdict.reasons == ()
    assert verdict.first_loss is not None
    assert verdict.last_loss is not None
    assert verdict.last_loss < 0.5 < 2.5 < verdict.first_loss < 3.0
    assert verdict.sentence() == "healthy: loss 2.744 to 0.445 (a model that knows nothing has 12.453)"


def test_one_step_can_be_healthy() -> None:
    assert judged([2.0]).healthy


def test_the_reported_overflow_in_fp16_is_unhealthy_for_every_reason() -> None:
    verdict = judged([1e11, 1e11, 1.2e11], precision="fp16", overflows_in=("fp16",))
    assert not verdict.healthy
    assert verdict.reasons == (
        "fp16 is known to overflow in this model; train in bf16 or fp32",
        "the loss starts at 1e+11, and a model that knows nothing has 12.5: the weights, the prompt or the precision are "
        "wrong",
        "the loss ends at 1.2e+11, above the 12.5 of a model that knows nothing",
        "the loss rose from 1e+11 to 1.2e+11; lower the learning rate",
    )
    assert verdict.sentence().startswith("unhealthy: fp16 is known to overflow in this model")


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_unhealthy(loss: float) -> None:
    assert judged([*FALLING, loss]).reasons == ("1 of 101 losses are not finite numbers",)


def test_a_run_of_nothing_but_nan_has_no_last_loss() -> None:
    verdict = judged([math.nan] * 3, skipped=3)
    assert (verdict.healthy, verdict.first_loss, verdict.last_loss) == (False, None, None)
    assert verdict.reasons == (
        "3 of 3 losses are not finite numbers",
        "3 of 3 steps were skipped for gradients that are not finite",
    )


def test_a_run_without_steps_is_unhealthy() -> None:
    assert judged([]).reasons == ("no step was taken",)


def test_a_start_above_twice_chance_is_unhealthy() -> None:
    verdict = judged([2.01 * CHANCE, *FALLING])
    assert verdict.reasons == (
        "the loss starts at 25.03, and a model that knows nothing has 12.5: the weights, the prompt or the precision are "
        "wrong",
    )
    assert judged([1.99 * CHANCE, *FALLING]).healthy


def test_an_end_above_chance_is_unhealthy() -> None:
    assert judged([1.5 * CHANCE] * 20 + [1.1 * CHANCE] * 20).reasons == (
        "the loss ends at 13.7, above the 12.5 of a model that knows nothing",
    )


def test_a_rising_loss_is_unhealthy() -> None:
    assert judged([1.0 + 0.02 * step for step in range(50)]).reasons == (
        "the loss rose from 1.04 to 1.94; lower the learning rate",
    )
    assert judged([1.0] * 10 + [1.09] * 10).healthy
    assert judged([0.02] * 10 + [0.05] * 10).healthy  # a loss near 0 wavers


def test_many_jumps_are_unhealthy_and_few_are_not() -> None:
    jumping = [2.0] * 100
    for step in range(10, 40, 5):
        jumping[step] = 9.0
    assert judged(jumping).reasons == ("the loss jumped 6 times in 100 steps; lower the learning rate",)
    jumping[10] = 2.0
    assert judged(jumping).healthy


def test_a_jump_is_over_three_times_the_usual_and_by_more_than_a_nat() -> None:
    assert count_spikes([1.0] * 10 + [3.1]) == 1
    assert count_spikes([1.0] * 10 + [2.9]) == 0
    assert count_spikes([0.1] * 10 + [0.9]) == 0
    assert count_spikes([0.1] * 10 + [1.2]) == 1
    assert count_spikes([1.0, 1.0, 1.0, 1.0, 50.0]) == 0


def test_a_large_share_of_skipped_steps_is_unhealthy() -> None:
    assert judged(FALLING, skipped=11).reasons == ("11 of 100 steps were skipped for gradients that are not finite",)
    assert judged(FALLING, skipped=10).healthy


def test_a_precision_that_overflows_is_unhealthy_even_when_the_loss_falls() -> None:
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
