"""Which records make up which step, and how fast it learns."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as some

from graftwork.data.sampling import WINDOW, Sampler, batches, steps_for
from graftwork.train.schedule import learning_rate_factor

LENGTHS = some.lists(some.integers(1, 500), min_size=1, max_size=200)
SIZES = some.integers(1, 40)


def padding(found: list[list[int]], lengths: list[int]) -> int:
    """Tokens of padding in all batches."""
    return sum(max(lengths[i] for i in batch) - lengths[index] for batch in found for index in batch)


@given(LENGTHS, SIZES, some.integers(0, 2**32 - 1), some.integers(0, 9), some.booleans())
def test_an_epoch_takes_every_record_at_most_once_in_full_batches(
    lengths: list[int], size: int, seed: int, epoch: int, by_length: bool
) -> None:
    found = batches(lengths, size, seed=seed, epoch=epoch, by_length=by_length).tolist()
    taken = [index for batch in found for index in batch]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= set(range(len(lengths)))
    assert {len(batch) for batch in found} == {min(size, len(lengths))}
    assert len(taken) > len(lengths) - min(size, len(lengths))
    assert batches(lengths, size, seed=seed, epoch=epoch, by_length=by_length).tolist() == found


@given(LENGTHS, SIZES, some.integers(0, 99))
def test_a_step_is_the_same_however_one_gets_to_it(lengths: list[int], size: int, step: int) -> None:
    size = min(size, len(lengths))
    walking, jumping = (Sampler(lengths, size, seed=3, by_length=True) for _ in range(2))
    walked = [walking.batch(number) for number in range(step + 1)]
    assert jumping.batch(step) == walked[-1]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [
        str(batches([10] * 64, 8, seed=seed, epoch=epoch, by_length=False)) for seed in (1, 2) for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_every_epoch_of_a_sampler_is_one_pass() -> None:
    sampler = Sampler(list(range(1, 13)), 4, seed=1, by_length=True)
    for epoch in range(3):
        assert sorted(i for step in range(3) for i in sampler.batch(3 * epoch + step)) == list(range(12))


def test_records_of_similar_length_share_a_batch() -> None:
    lengths = [1 + (37 * number) % 400 for number in range(1024)]
    mixed = batches(lengths, 16, seed=1, epoch=0, by_length=False).tolist()
    grouped = batches(lengths, 16, seed=1, epoch=0, by_length=True).tolist()
    assert padding(grouped, lengths) < 0.1 * padding(mixed, lengths)
    means = [sum(lengths[i] for i in batch) / 16 for batch in grouped]
    assert means != sorted(means)
    assert means[:WINDOW] != sorted(means[:WINDOW])


@pytest.mark.parametrize(
    ("records", "size", "epochs", "steps", "expected"),
    [
        (100, 10, 1.0, None, 10),
        (105, 10, 1.0, None, 10),
        (105, 10, 2.0, None, 21),
        (100, 10, 0.5, None, 5),
        (100, 10, 0.01, None, 1),
        (100, 10, 3.0, 7, 7),
        (10, 32, 1.0, None, 1),
        (10, 32, 3.0, None, 3),
    ],
)
def test_epochs_become_steps(records: int, size: int, epochs: float, steps: int | None, expected: int) -> None:
    assert steps_for(records, size, epochs, steps) == expected


def test_the_learning_rate_rises_and_falls_as_the_schedule_says() -> None:
    def rates(schedule: str, warmup: float = 0.25) -> list[float]:
        return [round(learning_rate_factor(step, 8, warmup, schedule), 6) for step in range(8)]

    assert rates("constant") == [round(1 / 3, 6), round(2 / 3, 6), 1, 1, 1, 1, 1, 1]
    assert rates("linear") == [round(x / 6, 6) for x in (2, 4, 6, 5, 4, 3, 2, 1)]
    assert rates("cosine", warmup=0.0)[:5] == [round(0.5 + 0.5 * math.cos(math.pi * step / 8), 6) for step in range(5)]


@given(
    some.integers(1, 500), some.floats(0, 1), some.sampled_from(["cosine", "linear", "constant"]), some.integers(0, 499)
)
def test_the_learning_rate_is_never_zero_and_never_above_the_highest(
    steps: int, warmup: float, schedule: str, step: int
) -> None:
    assert 0.0 < learning_rate_factor(step % steps, steps, warmup, schedule) <= 1.0
