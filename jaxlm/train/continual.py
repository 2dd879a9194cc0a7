# SPDX-License-Identifier: Apache-2.0
"""Learning, keeping and forgetting as numbers, all computed from one score matrix.

i task, c column (0: before any training), q item of a task; C the last column; L(i) = learned_at[i], the first column
whose stage trained on task i; z_i score before training, b_i of a specialist, m_i of joint training.  NumPy only.
"""

import dataclasses
import difflib
from typing import Any, NamedTuple

import numpy as np

from jaxlm.resampling import resampled_means
from jaxlm.train.score_matrix import Baseline, ScoreMatrix, baseline_items
from jaxlm.train.task_table import METRICS, NEED_SPECIALIST, mean_of_defined, task_table


def continual_metrics(
    matrix: ScoreMatrix, *, specialist: Baseline | None = None, joint: Baseline | None = None, min_gain: float = 0.02
) -> dict[str, float]:
    """Every number about learning and forgetting that one arm, seed and order has.

        final              mean_i a[i,C]; final_worst: min_i                                  tasks that are trained on
        plasticity         mean_i a[i,L(i)] - b_i                                             the same
        backward_transfer  mean_i a[i,C] - a[i,L(i)]                                          L(i) < C
        forgetting         mean_i max_{L(i) <= c < C} a[i,c] - a[i,C]                         L(i) < C
        forgetting_rate    mean_i forgetting_i / (max_{L(i) <= c < C} a[i,c] - z_i)           and a gain >= min_gain
        forward_transfer   mean_i a[i,L(i)-1] - z_i                                           L(i) > 1
        base_drop          mean_i z_i - a[i,C]                                                tasks never trained on
        base_drop_trained  the same                                                           tasks that are trained on
        normalized         mean_i n_i, n_i = (a[i,C] - z_i) / (b_i - z_i); normalized_worst   |b_i - z_i| >= min_gain
        seesaw             population sd over tasks of a[i,C] - b_i                           tasks that are trained on
        seesaw_normalized  population sd over tasks of n_i                                    as normalized
        losers             tasks whose 95 % interval of a[i,C] - m_i over items lies below 0

    Backward transfer is the primary number of forgetting: the maximum in `forgetting` is biased upward by noise, the
    more so the more columns it is taken over, so compare it only between arms with equally many.

    Args:
      matrix: of one arm, one seed, one order of tasks.
      specialist: b_i, of training on task i alone: a number or the scores of the same items a task, None for a task
        without; or a `ScoreMatrix`, whose last column counts. Losses as they are measured. None: the numbers that need
        one are left out.
      joint: m_i, of training on all tasks together; `losers` is left out without it.
      min_gain: at least what a task must have gained for a share of it to mean something; twice the standard error
        of the gain over items, where that is more.
    Returns: name -> number, NaN where no task defines it; name/skipped -> trained tasks that a mean leaves out, where
      there are any.

    >>> table = ScoreMatrix([[0.1, 0.8, 0.6, 0.5], [0.2, 0.2, 0.7, 0.6], [0, 0.1, 0.1, 0.9]], [1, 2, 3])
    >>> numbers = continual_metrics(table)
    >>> print(f"{numbers['backward_transfer']:.2f} {numbers['backward_transfer/skipped']:.0f}")
    -0.20 1

    Source: Chaudhry et al. 2018, arXiv:1801.10112 (forgetting); Lopez-Paz and Ranzato 2017, arXiv:1706.08840.
    """
    table = task_table(matrix, specialist, min_gain)
    numbers: dict[str, float] = {}
    for name, (by_task, reduce) in METRICS.items():
        if specialist is None and name in NEED_SPECIALIST:
            continue
        found = getattr(table, by_task)
        numbers[name] = float(reduce(found))
        skipped = int(np.isnan(found[matrix.trained]).sum())
        if skipped and reduce is mean_of_defined and by_task != "base_drop":
            numbers[f"{name}/skipped"] = float(skipped)
    if joint is not None:
        numbers["losers"] = float(sum(_upper_bounds(matrix, joint) < 0))
    return numbers


def task_metrics(
    matrix: ScoreMatrix, *, specialist: Baseline | None = None, min_gain: float = 0.02
) -> dict[str, np.ndarray]:
    """The same before the mean: name -> [N], NaN for a task that does not define it.

    >>> table = ScoreMatrix([[0.1, 0.8, 0.5], [0.2, 0.2, 0.7]], [1, 2])
    >>> task_metrics(table)["backward_transfer"].round(3).tolist()
    [-0.3, nan]
    """
    table = task_table(matrix, specialist, min_gain)
    names = [name for name, (by_task, _) in METRICS.items() if name == by_task]
    return {name: getattr(table, name) for name in names if specialist is not None or name not in NEED_SPECIALIST}


def metric_of(
    matrix: ScoreMatrix,
    name: str,
    specialist: Baseline | None = None,
    min_gain: float = 0.02,
    means: np.ndarray | None = None,
    of_specialist: np.ndarray | None = None,
) -> np.ndarray:
    """One metric, of other means too: [..., N, C+1] `means` and [..., N] `of_specialist` drawn from this matrix."""
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(METRICS)}"
        raise ValueError(f"no metric {name!r}: {hint}")
    if specialist is None and name in NEED_SPECIALIST:
        raise ValueError(f"{name} compares with specialists: pass specialist=, a score of each task trained alone")
    table = task_table(matrix, specialist, min_gain)
    if means is not None:
        table = dataclasses.replace(table, means=means, specialist=of_specialist)
    by_task, reduce = METRICS[name]
    return reduce(getattr(table, by_task))


class Flips(NamedTuple):
    """Shares of items: lost, gained, wrong both times; and for items with options what is left of them without luck."""

    lost: float
    gained: float
    both_wrong: float
    known_to_unknown: float | None = None
    unknown_to_known: float | None = None


def flips(before: Any, after: Any, *, num_options: int | None = None) -> Flips:
    """What was lost and gained, item by item.

        lost = mean 1[right before, wrong after],  gained = mean 1[wrong before, right after]
        known_to_unknown = (lost - both_wrong / (k - 1)) * k / (k - 1), and likewise with gained

    Args:
      before, after: [items] in {0, 1}: right or wrong.
      num_options: k of a multiple choice, where a guesser flips by luck; the corrected shares are exact in expectation
        if one who does not know guesses uniformly, anew each time. They are not clipped. None: not corrected.

    >>> flips([1, 1, 0, 0], [1, 0, 1, 0])
    Flips(lost=0.25, gained=0.25, both_wrong=0.25, known_to_unknown=None, unknown_to_known=None)

    Source: lost and gained as in arXiv:2510.17776. Departs: the correction for chance is derived here.
    """
    u, v = np.asarray(before), np.asarray(after)
    if u.shape != v.shape or u.ndim != 1 or not u.size or not np.isin([u, v], (0, 1)).all():
        raise ValueError(f"flips are of the same items, each 0 or 1, before and after; got {u.shape} and {v.shape}")
    lost, gained, wrong = (float(np.mean((u == x) & (v == y))) for x, y in ((1, 0), (0, 1), (0, 0)))
    if num_options is None:
        return Flips(lost, gained, wrong)
    if num_options < 2:
        raise ValueError(f"num_options must be at least 2, got {num_options}")
    k = num_options
    return Flips(lost, gained, wrong, *((x - wrong / (k - 1)) * k / (k - 1) for x in (lost, gained)))


def _upper_bounds(matrix: ScoreMatrix, joint: Baseline) -> np.ndarray:
    """[N] upper end of the 95 % interval of a[i,C] - m_i over items; NaN for tasks that no stage trains on."""
    pairs = [np.column_stack([x[-1], m]) for x, m in zip(matrix.values, baseline_items(joint, matrix), strict=True)]
    drawn = resampled_means(pairs, resamples=10_000, seed=0)
    upper = np.array([np.percentile(x[:, 0] - x[:, 1], 97.5) for x in drawn])
    return np.where([at is not None for at in matrix.learned_at], upper, np.nan)
