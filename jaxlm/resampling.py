# SPDX-License-Identifier: Apache-2.0
"""The bootstrap: draws in which tasks, arms and seeds all see the same items, and what an interval is.  NumPy only.

R resamples, n items of a task, K columns of scores.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_DRAWN_AT_ONCE = 2_000_000  # items; 16 MB


class Interval(NamedTuple):
    """A number and its 95 % interval over items."""

    mean: float
    low: float
    high: float


def resampled_means(values: Sequence[np.ndarray], *, resamples: int, seed: int) -> list[np.ndarray]:
    """Means over items drawn with replacement, `n` of `n`, independently in each task.

    Args:
      values: for each task [n, K] scores; the columns are whatever is to see the same draw: arms, seeds, times.
      resamples: R >= 1.
      seed: of `numpy.random.PCG64`; the same seed, the same draws.
    Returns: for each task [R, K] float64. Equal columns have equal means, to the last bit.

    >>> resampled_means([np.ones((3, 2))], resamples=2, seed=0)[0].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}: 10_000 make intervals that stay put")
    rng = np.random.Generator(np.random.PCG64(seed))
    return [_resampled(np.asarray(x, np.float64), resamples, rng) for x in values]


def _resampled(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    # A draw is how often each item was taken, so that its means are one product; equal columns are multiplied once.
    columns, places = np.unique(values, axis=1, return_inverse=True)
    n = len(values)
    means = np.empty((resamples, columns.shape[1]))
    at_once = max(1, _DRAWN_AT_ONCE // n)
    for begin in range(0, resamples, at_once):
        count = min(at_once, resamples - begin)
        drawn = rng.integers(0, n, (count, n)) + n * np.arange(count)[:, None]
        taken = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        means[begin : begin + count] = taken.astype(np.float64) @ columns / n
    return means[:, places.ravel()]
