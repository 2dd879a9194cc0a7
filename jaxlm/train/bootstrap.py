# SPDX-License-Identifier: Apache-2.0
"""When does one arm differ from another: intervals over items, signs over seeds and orders.  NumPy only.

An arm is a list of score matrices, one a seed; A and B two arms scored on the same items. R resamples.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.resampling import Interval, resampled_means
from jaxlm.train.continual import metric_of
from jaxlm.train.score_matrix import Baseline, ScoreMatrix, baseline_items, check_same_items

Arm = ScoreMatrix | Sequence[ScoreMatrix]


class Difference(NamedTuple):
    """How far arm A lies above arm B.

    Attributes:
      mean, low, high: over seeds, with the 95 % interval over items.
      by_seed: of each seed.
      p: two-sided, of the bootstrap over items: how often a resampled difference lies on the other side of 0, twice.
      counts: the interval excludes 0, every seed has one sign, and no other order of the tasks has the other one.
    """

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    p: float
    counts: bool


def paired_bootstrap(
    a: Arm,
    b: Arm | None = None,
    *,
    metric: str = "final",
    specialist: Baseline | None = None,
    min_gain: float = 0.02,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The interval of a metric's difference between two arms over the items they were scored on.

        d = mean_s metric(A_s) - mean_s metric(B_s);    d* the same with n_i items of every task drawn anew

    The same draw serves both arms, all seeds and the specialists, and the metric is computed anew from each draw, its
    maximum over columns included. The interval is that of the 2.5 and 97.5 percentiles of d*. It covers items, not
    the noise of training: see `difference`.

    Args:
      a, b: one score matrix a seed, or one alone; b None: the interval of `a`'s metric itself.
      metric: a name of `continual_metrics`: "final", "backward_transfer", "forgetting", ...
      specialist, min_gain: as there; a baseline of item scores is drawn along.
      resamples, seed: as in `resampled_means`.
    Returns: `Interval`; NaN where the metric is undefined.
    Raises: ValueError for arms scored on different items, or with different numbers of seeds.

    >>> before, after = [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]
    >>> paired_bootstrap(ScoreMatrix([[before, after]], [1]), ScoreMatrix([[before, before]], [1]), resamples=100).mean
    0.75
    """
    by_seed, drawn = _differences(a, b, metric, specialist, min_gain, resamples, seed)
    return Interval(float(np.mean(by_seed)), *_percentiles(drawn))


def difference(
    a: Arm,
    b: Arm,
    *,
    metric: str = "final",
    specialist: Baseline | None = None,
    orders: Sequence[tuple[Arm, Arm]] = (),
    min_gain: float = 0.02,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Whether a difference between two arms counts.

    It does if the interval of `paired_bootstrap` excludes 0, every seed has the same sign (three agree by luck one
    time in four, five one in sixteen), and no other order of the tasks reverses it.

    Args:
      a, b: as there, at least two seeds each; seed s of one is compared with seed s of the other.
      orders: the same two arms under other orders of the tasks.
      metric, specialist, min_gain, resamples, seed: as there.
    Raises: ValueError for a single seed, and as there.
    """
    if min(len(_arm(a)), len(_arm(b))) < 2:
        raise ValueError(
            "one seed: intervals cover items only, not training noise; a claim needs at least 2 seeds an arm, better 5"
        )
    by_seed, drawn = _differences(a, b, metric, specialist, min_gain, resamples, seed)
    mean = float(np.mean(by_seed))
    low, high = _percentiles(drawn)
    drawn = drawn[np.isfinite(drawn)]
    share = min(np.sum(drawn <= 0), np.sum(drawn >= 0))
    others = [float(np.mean(_by_seed(_arm(x), _arm(y), metric, specialist, min_gain))) for x, y in orders]
    agree = len(set(np.sign(by_seed))) == 1 and all(other * mean >= 0 for other in others)
    p = min(1.0, 2 * (1 + share) / (1 + len(drawn))) if len(drawn) else np.nan
    return Difference(mean, low, high, tuple(map(float, by_seed)), float(p), bool(agree and (low > 0 or high < 0)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values of a family of comparisons with one baseline, made larger so that they hold together.

        adjusted of the k-th smallest of m = max over j <= k of min(1, (m - j + 1) * p_j)

    Source: Holm 1979, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6.

    >>> holm({"epi": 0.01, "dpi": 0.04, "cpi_ft": 0.03})
    {'epi': 0.03, 'dpi': 0.06, 'cpi_ft': 0.06}
    """
    if wrong := {name: p for name, p in p_values.items() if not 0 <= p <= 1}:
        raise ValueError(f"a p-value lies in [0, 1], got {wrong}")
    adjusted: dict[str, float] = {}
    least = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in p_values}


def _differences(
    a: Arm, b: Arm | None, metric: str, specialist: Baseline | None, min_gain: float, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """[S] differences of the seeds, [R] resampled differences of their means."""
    arms = [_arm(a)] if b is None else [_arm(a), _arm(b)]
    every = [matrix for arm in arms for matrix in arm]
    check_same_items(every)
    by_seed = _by_seed(arms[0], None if b is None else arms[1], metric, specialist, min_gain)
    columns = [np.concatenate([m.values[i] for m in every]).T for i in range(len(every[0].values))]
    if specialist is not None:
        baseline = baseline_items(specialist, every[0])
        columns = [np.column_stack([x, y]) for x, y in zip(columns, baseline, strict=True)]
    drawn = np.stack(resampled_means(columns, resamples=resamples, seed=seed), axis=1)  # [R, N, columns of all seeds]
    of_specialist = None if specialist is None else drawn[..., -1]
    numbers, begin = [], 0
    for matrix in every:
        end = begin + len(matrix.columns)
        numbers.append(metric_of(matrix, metric, specialist, min_gain, drawn[..., begin:end], of_specialist))
        begin = end
    means = np.mean(numbers[: len(arms[0])], axis=0)
    return by_seed, means if b is None else means - np.mean(numbers[len(arms[0]) :], axis=0)


def _by_seed(
    a: Sequence[ScoreMatrix], b: Sequence[ScoreMatrix] | None, metric: str, specialist: Baseline | None, min_gain: float
) -> np.ndarray:
    """[S] the metric of every seed, or its difference."""
    mine = np.array([metric_of(matrix, metric, specialist, min_gain) for matrix in a])
    if b is None:
        return mine
    if len(a) != len(b):
        raise ValueError(f"arms of {len(a)} and {len(b)} seeds: seed s of one is compared with seed s of the other")
    return mine - np.array([metric_of(matrix, metric, specialist, min_gain) for matrix in b])


def _arm(arm: Arm) -> Sequence[ScoreMatrix]:
    found = [arm] if isinstance(arm, ScoreMatrix) else list(arm)
    if not found:
        raise ValueError("an arm without a score matrix: give one a seed")
    return found


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    """Resamples in which the metric is undefined say nothing."""
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return float(low), float(high)
