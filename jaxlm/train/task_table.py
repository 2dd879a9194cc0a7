# SPDX-License-Identifier: Apache-2.0
"""What each task learnt, kept and lost, from means of scores; `continual_metrics` has the formulas.  NumPy only.

N tasks, C the last column; any number of tables at once, as a bootstrap draws them.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from jaxlm.train.score_matrix import Baseline, ScoreMatrix, baseline_items


@dataclasses.dataclass(frozen=True)
class TaskTable:
    """Means [..., N, C+1] and what follows from them for each task, [..., N]; NaN where it is undefined."""

    means: np.ndarray
    learned_at: np.ndarray  # [N], 0 for never
    specialist: np.ndarray | None  # [..., N]
    min_gain: np.ndarray  # [N], of the gain that forgetting is a share of
    min_normalizer: np.ndarray  # [N], of b_i - z_i

    @functools.cached_property
    def _own(self) -> np.ndarray:
        at = np.broadcast_to(self.learned_at[:, None], (*self.means.shape[:-1], 1))
        return np.take_along_axis(self.means, at, axis=-1)[..., 0]

    @functools.cached_property
    def _peak(self) -> np.ndarray:
        columns = np.arange(self.means.shape[-1])
        inside = (self.learned_at[:, None] <= columns) & (columns < columns[-1])
        return np.max(np.where(inside, self.means, -np.inf), axis=-1)

    @property
    def _kept(self) -> np.ndarray:
        return (self.learned_at > 0) & (self.learned_at < self.means.shape[-1] - 1)

    @property
    def final(self) -> np.ndarray:
        return _where(self.learned_at > 0, self.means[..., -1])

    @property
    def plasticity(self) -> np.ndarray:
        return _where(self.learned_at > 0, self._own - self.specialist)

    @property
    def backward_transfer(self) -> np.ndarray:
        return _where(self._kept, self.means[..., -1] - self._own)

    @property
    def forgetting(self) -> np.ndarray:
        return _where(self._kept, self._peak - self.means[..., -1])

    @property
    def forgetting_rate(self) -> np.ndarray:
        gain = self._peak - self.means[..., 0]
        enough = self._kept & (gain >= self.min_gain)
        return _where(enough, self.forgetting / np.where(enough, gain, 1.0))

    @property
    def forward_transfer(self) -> np.ndarray:
        at = np.broadcast_to(np.maximum(self.learned_at - 1, 0)[:, None], (*self.means.shape[:-1], 1))
        before = np.take_along_axis(self.means, at, axis=-1)[..., 0]
        return _where(self.learned_at > 1, before - self.means[..., 0])

    @property
    def base_drop(self) -> np.ndarray:
        return _where(self.learned_at == 0, self.means[..., 0] - self.means[..., -1])

    @property
    def base_drop_trained(self) -> np.ndarray:
        return _where(self.learned_at > 0, self.means[..., 0] - self.means[..., -1])

    @property
    def normalized(self) -> np.ndarray:
        whole = self.specialist - self.means[..., 0]
        enough = (self.learned_at > 0) & (np.abs(whole) >= self.min_normalizer)
        return _where(enough, (self.means[..., -1] - self.means[..., 0]) / np.where(enough, whole, 1.0))

    @property
    def seesaw(self) -> np.ndarray:
        return _where(self.learned_at > 0, self.means[..., -1] - self.specialist)


def _where(defined: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where(defined, values, np.nan)


def mean_of_defined(x: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where nothing is."""
    defined = ~np.isnan(x)
    count = defined.sum(axis=-1)
    return np.where(count, np.where(defined, x, 0.0).sum(axis=-1) / np.maximum(count, 1), np.nan)


def _min(x: np.ndarray) -> np.ndarray:
    least = np.where(np.isnan(x), np.inf, x).min(axis=-1)
    return np.where(np.isinf(least), np.nan, least)


def _sd(x: np.ndarray) -> np.ndarray:
    return np.sqrt(mean_of_defined(np.square(x - mean_of_defined(x)[..., None])))


METRICS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "final": ("final", mean_of_defined),
    "final_worst": ("final", _min),
    "plasticity": ("plasticity", mean_of_defined),
    "backward_transfer": ("backward_transfer", mean_of_defined),
    "forgetting": ("forgetting", mean_of_defined),
    "forgetting_rate": ("forgetting_rate", mean_of_defined),
    "forward_transfer": ("forward_transfer", mean_of_defined),
    "base_drop": ("base_drop", mean_of_defined),
    "base_drop_trained": ("base_drop_trained", mean_of_defined),
    "normalized": ("normalized", mean_of_defined),
    "normalized_worst": ("normalized", _min),
    "seesaw": ("seesaw", _sd),
    "seesaw_normalized": ("normalized", _sd),
}
NEED_SPECIALIST = ("plasticity", "normalized", "normalized_worst", "seesaw", "seesaw_normalized")


def task_table(matrix: ScoreMatrix, specialist: Baseline | None, min_gain: float) -> TaskTable:
    """Of the matrix itself; what a gain must be at least is reckoned from its items."""
    items = None if specialist is None else baseline_items(specialist, matrix)
    least, least_normalizer = [], []
    for i, x in enumerate(matrix.values):
        at = matrix.learned_at[i] or 0
        peak = at + int(np.argmax(x[at : max(at + 1, len(x) - 1)].mean(axis=1)))
        least.append(max(min_gain, 2 * _standard_error(x[peak] - x[0])))
        least_normalizer.append(max(min_gain, 0.0 if items is None else 2 * _standard_error(items[i] - x[0])))
    return TaskTable(
        matrix.means,
        np.array([at or 0 for at in matrix.learned_at]),
        None if items is None else np.array([x.mean() for x in items]),
        np.array(least),
        np.array(least_normalizer),
    )


def _standard_error(x: np.ndarray) -> float:
    """Of a mean over items; a single item tells nothing about it, nor does one that is missing."""
    return float(np.nan_to_num(x.std(ddof=1) / np.sqrt(len(x)))) if len(x) > 1 else 0.0
