"""How sure a score is: bootstrap intervals over images, intervals over seeds as well, and McNemar's exact test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 10_000
SEED = 17
MIN_SEEDS = 3
"""Two seeds leave Student's t with one degree of freedom, whose 95 % lie within 12.7 standard errors, where three leave 4.3."""


@dataclass(frozen=True)
class Interval:
    """A number and the 95% interval in which it lies; the bounds are None where nothing can be said."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def known(self) -> bool:
        """Whether there are bounds."""
        return self.low is not None

    @property
    def excludes_zero(self) -> bool:
        """Whether both bounds lie on one side of zero."""
        return self.low is not None and self.high is not None and self.low * self.high > 0

    def within(self, least: float, most: float) -> Interval:
        """With its bounds no further than what the number can be."""
        if self.low is None or self.high is None:
            return self
        return Interval(self.value, max(self.low, least), min(self.high, most))


def interval(value: float, draws: NDArray[np.float64]) -> Interval:
    """The percentile interval of a bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    `draws` holds the number in every resample; a resample in which it does not exist is NaN and does not count. Where all
    questions have the same score the interval has no width, and says nothing of questions that were not asked. For a ratio
    the draws are the ratios of resamples in which both numbers are drawn together (chapter 25, beside Fieller's interval).
    """
    import numpy as np

    exist = draws[np.isfinite(draws)]
    if not exist.size:
        return Interval(value)
    low, high = np.percentile(exist, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def interval_over_seeds(by_seed: Sequence[float], draws: NDArray[np.float64]) -> Interval:
    """The mean of a number over runs that differ in their seed, with its interval over seeds and questions.

    `by_seed` holds the number of each run, `draws` `[resamples]` its mean over the same runs in resamples of the questions. Three
    seeds resampled with replacement give far too narrow an interval, so their part is Student's t with n - 1 degrees of freedom,
    times the standard error of the mean; it is added to the draws as if independent. What seeds and questions have in common is thereby in both
    parts, which makes the interval rather too wide than too narrow; with few images the bootstrap alone is too narrow. No bounds with fewer than MIN_SEEDS seeds.
    """
    import numpy as np

    count, value = len(by_seed), float(np.mean(by_seed))
    if count < MIN_SEEDS:
        return Interval(value)
    drawn = np.resize(draws, RESAMPLES)  # The tails of t want more draws than a benchmark's own total is resampled for.
    # A generator of its own: with that of the resamples both parts would be made of the same random numbers.
    student = np.random.default_rng([SEED, count]).standard_t(count - 1, size=RESAMPLES)
    noise = float(np.std(by_seed, ddof=1)) / count**0.5 * student
    return interval(value, np.concatenate([drawn + noise, drawn - noise]))  # Both signs, so that it is symmetric.


def resample_sums(sums: NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = SEED) -> NDArray[np.float64]:
    """The column sums of `resamples` bootstrap resamples of the rows of `sums`: `[resamples, columns]`.

    A row is a cluster: everything that is asked about one image. Questions about one image are not independent, so
    whole clusters are drawn (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8; for
    benchmarks of language models Miller, Adding Error Bars to Evals, arXiv:2411.00640). Equal rows are interchangeable:
    how often each distinct row is drawn is multinomial, which is exact and much faster than drawing rows.
    """
    import numpy as np

    rows, multiplicity = np.unique(sums, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    size = max(1, 4_000_000 // len(rows))  # keeps the counts of one step near 32 MB
    parts = [
        generator.multinomial(len(sums), multiplicity / len(sums), size=min(size, resamples - start)) @ rows
        for start in range(0, resamples, size)
    ]
    return np.concatenate(parts)


def resample_clusters(clusters: int, *, resamples: int, seed: int = SEED) -> Iterator[NDArray[Any]]:
    """The indices of the drawn clusters, resample by resample, for numbers that are no sums."""
    import numpy as np

    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield generator.integers(clusters, size=clusters)


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p value of McNemar's exact test: are as many answers gained as lost?

    McNemar, Psychometrika 12, 1947; exactly, by the binomial distribution of the answers that changed. It treats
    questions as independent, also those about one image.
    """
    changed, fewer = gained + lost, min(gained, lost)
    term = tail = 1
    for k in range(fewer):
        term = term * (changed - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << changed))
