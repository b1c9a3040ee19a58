"""Confidence intervals by the paired bootstrap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
CONFIDENCE = 0.95
_SEED = 95


@dataclass(frozen=True)
class Interval:
    """A difference with its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether zero is outside."""
        return self.low > 0 or self.high < 0


def difference(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> Interval | None:
    """Return by how much the first does better on average over the tasks.

    Samples are drawn again with all their questions, because the questions about one sample stand
    or fall together; both methods are judged by the same questions.

    Parameters
    ----------
    first, second : array
        Points of the same questions, [samples, tasks], NaN where there is no answer.

    Returns
    -------
    Interval or None
        None where no question was answered by both.
    """
    both = ~(np.isnan(first) | np.isnan(second))
    both_tasks = both.any(axis=0)
    if not both_tasks.any():
        return None
    paired = np.where(both, first - second, 0.0)[:, both_tasks]
    present = both[:, both_tasks].astype(float)
    n = len(paired)
    drawn = np.random.default_rng(_SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    counts = drawn @ present
    means = np.where(counts > 0, drawn @ paired / np.maximum(counts, 1), np.nan)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(np.nanmean(means, axis=1), (tail, 1 - tail))
    value = (paired.sum(axis=0) / present.sum(axis=0)).mean()
    return Interval(float(value), float(low), float(high))
