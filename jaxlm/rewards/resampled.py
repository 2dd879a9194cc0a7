# SPDX-License-Identifier: Apache-2.0
"""95 % intervals over questions, by bootstrap.  NumPy only.  Q questions, K columns, R resamples."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_DRAWN_AT_ONCE = 2_000_000  # questions; 16 MB


class Estimate(NamedTuple):
    """A number and its 95 % interval over questions."""

    mean: float
    low: float
    high: float


def interval_of_mean(values_Q: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """The mean over questions of any score, with the interval of Q questions drawn anew from Q.

    The samples of one question belong together: average them first, and give one value a question. Give differences
    of two models on the same questions for a paired comparison. Where all values are equal the interval has no width,
    which says that a bootstrap knows nothing there, not that the number is sure.

    Args:
      values_Q: [Q] finite.
      resamples: R >= 1.
      seed: the same seed, the same interval.
    Raises: ValueError for no questions, or a value that is not finite.

    >>> interval_of_mean(np.array([0.0, 1.0, 1.0, 1.0]), resamples=1000).mean
    0.75
    """
    values_Q = np.asarray(values_Q, np.float64)
    if values_Q.ndim != 1 or not len(values_Q):
        raise ValueError(f"values must be [Q] with a value for each question, got the shape {values_Q.shape}")
    if not np.isfinite(values_Q).all():
        raise ValueError(f"value {int(np.argmin(np.isfinite(values_Q)))} is not finite: leave that question out")
    return resampled(values_Q[:, None], lambda sums: sums[:, 0] / len(values_Q), resamples=resamples, seed=seed)


def resampled(
    sums_QK: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, resamples: int, seed: int
) -> Estimate:
    """Any number that is computed from sums over questions, with its interval.

    Args:
      sums_QK: [Q, K] what each question adds to the sums.
      statistic: [*, K] sums to [*] numbers.
      resamples, seed: as in `interval_of_mean`.
    Returns: `Estimate`; resamples where the number is not defined (NaN) are left out.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}: 10_000 make intervals that stay put")
    drawn = statistic(_drawn_sums(sums_QK, resamples, seed))
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return Estimate(float(statistic(sums_QK.sum(axis=0)[None])[0]), float(low), float(high))


def _drawn_sums(sums_QK: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """[R, K]; a draw is how often each question was taken, so that its sums are one product."""
    rng = np.random.Generator(np.random.PCG64(seed))
    n = len(sums_QK)
    sums = np.empty((resamples, sums_QK.shape[1]))
    at_once = max(1, _DRAWN_AT_ONCE // n)
    for begin in range(0, resamples, at_once):
        count = min(at_once, resamples - begin)
        places = rng.integers(0, n, (count, n)) + n * np.arange(count)[:, None]
        taken = np.bincount(places.ravel(), minlength=count * n).reshape(count, n)
        sums[begin : begin + count] = taken.astype(np.float64) @ sums_QK
    return sums
