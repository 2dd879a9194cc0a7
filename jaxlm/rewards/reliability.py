# SPDX-License-Identifier: Apache-2.0
"""Calibration: does a model that is 80 % sure have it right in 80 % of cases.  NumPy only.  N answers, B bins."""

from typing import NamedTuple

import numpy as np

from jaxlm.resampling import Interval
from jaxlm.rewards.resampled import resampled


class Bin(NamedTuple):
    """Answers whose confidence lies in [low, high), the last bin with its end; `answers` 0 leaves the means NaN."""

    low: float
    high: float
    answers: int
    confidence: float
    right: Interval


class Calibration(NamedTuple):
    """How far confidence and success lie apart.

    Attributes:
      error: expected calibration error, in [0, 1].
      brier: mean squared distance of confidence and success, in [0, 1].
      bins: what the error is made of.
    """

    error: Interval
    brier: Interval
    bins: tuple[Bin, ...]


def calibration(
    confidence_N: np.ndarray,
    right_N: np.ndarray,
    questions_N: np.ndarray | None = None,
    *,
    num_bins: int = 10,
    resamples: int = 10_000,
    seed: int = 0,
) -> Calibration:
    """The calibration of N answers, with intervals over questions.

        error = sum_b (n_b / N) |mean confidence in b - mean right in b|;    brier = mean (confidence - right)^2

    The bins have equal width and stay as they are in every resample. The error is biased upwards by noise, the more
    the fewer answers a bin has, and its interval with it: 0 is hardly ever inside. Compare models at equal N and B.

    Args:
      confidence_N: [N] in [0, 1], the probability of being right that was claimed.
      right_N: [N] in [0, 1], a verifier's scores.
      questions_N: [N] which question each answer is of; a question's answers are drawn together. None: one each.
      num_bins: B >= 1.
      resamples, seed: as in `interval_of_mean`.
    Raises: ValueError for shapes that differ, no answer, or numbers outside [0, 1].

    >>> calibration(np.array([0.9, 0.9, 0.3, 0.3]), np.array([1, 1, 0, 1]), resamples=100).error.mean.__round__(3)
    0.15

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv:1706.04599, eq. 3; Brier 1950.
    """
    confidence_N, right_N = np.asarray(confidence_N, np.float64), np.asarray(right_N, np.float64)
    questions_N = np.arange(len(confidence_N)) if questions_N is None else np.asarray(questions_N)
    if not (confidence_N.ndim == 1 and confidence_N.shape == right_N.shape == questions_N.shape and len(right_N)):
        shapes = confidence_N.shape, right_N.shape, questions_N.shape
        raise ValueError(f"confidence, right and questions must be [N] with N >= 1, got {shapes}")
    for name, values in {"confidence": confidence_N, "right": right_N}.items():
        if not ((values >= 0) & (values <= 1)).all():
            place = int(np.argmin((values >= 0) & (values <= 1)))
            raise ValueError(f"{name} of answer {place} is {values[place]}: it must lie in [0, 1]")
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    bin_N = np.minimum((confidence_N * num_bins).astype(int), num_bins - 1)
    _, row_N = np.unique(questions_N, return_inverse=True)
    sums = np.zeros((row_N.max() + 1, 3, num_bins))  # a question's answers, confidence and right, by bin
    for place, values in enumerate((np.ones_like(right_N), confidence_N, right_N)):
        np.add.at(sums[:, place], (row_N, bin_N), values)
    squares = np.zeros((len(sums), 2))
    np.add.at(squares, row_N, np.stack([np.ones_like(right_N), (confidence_N - right_N) ** 2], axis=1))

    def error(flat: np.ndarray) -> np.ndarray:
        count, confidence, right = np.moveaxis(flat.reshape(-1, 3, num_bins), 1, 0)
        return np.abs(confidence - right).sum(axis=1) / count.sum(axis=1)

    flat = sums.reshape(len(sums), -1)
    return Calibration(
        resampled(flat, error, resamples=resamples, seed=seed),
        resampled(squares, _ratio, resamples=resamples, seed=seed),
        tuple(_bin(sums[:, :, b], b, num_bins, resamples, seed) for b in range(num_bins)),
    )


def _bin(sums_Q3: np.ndarray, place: int, num_bins: int, resamples: int, seed: int) -> Bin:
    count, confidence, _ = sums_Q3.sum(axis=0)
    low, high = place / num_bins, (place + 1) / num_bins
    if not count:
        return Bin(low, high, 0, np.nan, Interval(np.nan, np.nan, np.nan))
    right = resampled(sums_Q3[:, [0, 2]], _ratio, resamples=resamples, seed=seed)
    return Bin(low, high, int(count), float(confidence / count), right)


def _ratio(sums: np.ndarray) -> np.ndarray:
    """[*] second sum over first; NaN where the first is 0."""
    count = sums[:, 0]
    return np.where(count > 0, sums[:, 1] / np.where(count > 0, count, 1), np.nan)
