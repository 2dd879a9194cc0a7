# SPDX-License-Identifier: Apache-2.0
"""95 % intervals over questions, by bootstrap.  NumPy only.  Q questions, K columns, R resamples."""

from collections.abc import Callable

import numpy as np

from jaxlm.resampling import Interval, resampled_means


def interval_of_mean(values_Q: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> Interval:
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
) -> Interval:
    """Any number that is computed from sums over questions, with its interval.

    Args:
      sums_QK: [Q, K] what each question adds to the sums.
      statistic: [*, K] sums to [*] numbers.
      resamples, seed: as in `interval_of_mean`.
    Returns: `Interval`; resamples where the number is not defined (NaN) are left out.
    """
    drawn = statistic(resampled_means([sums_QK], resamples=resamples, seed=seed)[0] * len(sums_QK))
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return Interval(float(statistic(sums_QK.sum(axis=0)[None])[0]), float(low), float(high))
