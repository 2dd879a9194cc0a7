# SPDX-License-Identifier: Apache-2.0
"""The table that everything about learning and forgetting is computed from: scores of tasks at columns of time.

i task, c column (0: before any training), q item of a task; N tasks, C the last column.  NumPy only, float64.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


class ScoreMatrix:
    """Scores of every item of every task, before training and after each stage.

    Args:
      scores: for each task a [C+1, items] array; a number of items may differ between tasks. A [N, C+1] array of
        means is a table whose tasks have one item each.
      learned_at: for each task the first column whose stage trained on it, None for one that is never trained on.
      higher_is_better: True: scores lie in [0, 1]. False: they are losses as they are measured (nats a token, >= 0);
        `values` and all metrics see them negated, once.
      items_hash: names the items and their order; tables with different ones are never compared.
      tasks, columns: names, for people.
    Raises: ValueError for scores or columns that make no such table.

    >>> table = ScoreMatrix([[0.1, 0.8, 0.6], [0.2, 0.2, 0.7]], learned_at=(1, 2))
    >>> table.means.tolist()
    [[0.1, 0.8, 0.6], [0.2, 0.2, 0.7]]
    """

    def __init__(
        self,
        scores: Sequence[Any],
        learned_at: Sequence[int | None],
        *,
        higher_is_better: bool = True,
        items_hash: str = "",
        tasks: Sequence[str] = (),
        columns: Sequence[str] = (),
    ):
        given = [np.asarray(x, np.float64) for x in scores]
        if not given:
            raise ValueError("a score matrix needs at least one task")
        given = [x[:, None] if x.ndim == 1 else x for x in given]
        num_columns = len(given[0])
        self.higher_is_better = higher_is_better
        self.items_hash = items_hash
        self.tasks = tuple(tasks) or tuple(f"task {i}" for i in range(len(given)))
        self.columns = tuple(columns) or ("before", *(f"column {c}" for c in range(1, num_columns)))
        self.learned_at = tuple(None if at is None else int(at) for at in learned_at)
        for task, x in zip(self.tasks, given, strict=True):
            if x.ndim != 2 or len(x) != num_columns or not x.size:
                raise ValueError(
                    f"task {task!r} has scores of shape {x.shape}, wanted [columns, items] with {num_columns} columns "
                    "and at least one item"
                )
            self._check_scores(task, x)
        if len(self.columns) != num_columns or len(self.learned_at) != len(given):
            raise ValueError(
                f"{len(given)} tasks and {num_columns} columns of scores, but {len(self.learned_at)} entries in "
                f"learned_at and {len(self.columns)} names of columns"
            )
        self._check_learned(num_columns)
        self.values = tuple(x if higher_is_better else -x for x in given)

    @property
    def means(self) -> np.ndarray:
        """[N, C+1] float64, `a[i, c] = mean_q X[i, c, q]`; higher is better."""
        return np.stack([x.mean(axis=1) for x in self.values])

    @property
    def trained(self) -> list[int]:
        """Tasks that some stage trains on."""
        return [i for i, at in enumerate(self.learned_at) if at is not None]

    @property
    def general(self) -> list[int]:
        """Tasks that no stage trains on."""
        return [i for i, at in enumerate(self.learned_at) if at is None]

    def _check_scores(self, task: str, x: np.ndarray) -> None:
        def place(wrong: np.ndarray) -> str:
            c, q = np.argwhere(wrong)[0]
            return f"task {task!r}, column {self.columns[c] if c < len(self.columns) else c!r}, item {q}: {x[c, q]}"

        if not np.isfinite(x).all():
            raise ValueError(f"a score is not finite: {place(~np.isfinite(x))}")
        if self.higher_is_better and ((x < 0) | (x > 1)).any():
            raise ValueError(
                f"a score lies outside of [0, 1]: {place((x < 0) | (x > 1))}; pass higher_is_better=False for losses"
            )
        if not self.higher_is_better and (x < 0).any():
            raise ValueError(
                f"a loss is negative: {place(x < 0)}; give losses as they are measured, they are negated here, once"
            )

    def _check_learned(self, num_columns: int) -> None:
        for task, at in zip(self.tasks, self.learned_at, strict=True):
            if at == 0:
                raise ValueError(
                    f"task {task!r} is learned at column 0: evaluate before training: forgetting of base abilities "
                    "needs column 0"
                )
            if at is not None and not 0 < at < num_columns:
                raise ValueError(
                    f"task {task!r} is learned at column {at}, but the last column is {num_columns - 1}: record the "
                    "scores after every stage"
                )


Baseline = ScoreMatrix | Sequence[Any]  # a number or [items] scores a task, None where there is none; or a last column


def check_same_items(matrices: Sequence[ScoreMatrix]) -> None:
    """Raises ValueError unless all are scores of the same items and tasks."""
    first = matrices[0]
    for other in matrices[1:]:
        sizes, others = ([x.shape[1] for x in m.values] for m in (first, other))
        if other.items_hash != first.items_hash or sizes != others or other.tasks != first.tasks:
            raise ValueError(
                f"scores of different items are not compared: {', '.join(first.tasks)} with {sizes} items of hash "
                f"{first.items_hash!r} against {', '.join(other.tasks)} with {others} of {other.items_hash!r}"
            )
        if other.higher_is_better != first.higher_is_better:
            raise ValueError("losses and scores are not compared: higher_is_better differs")


def baseline_items(baseline: Baseline, matrix: ScoreMatrix) -> list[np.ndarray]:
    """For each task the [items] scores of a baseline, higher is better; NaN where it has none."""
    if isinstance(baseline, ScoreMatrix):
        check_same_items([matrix, baseline])
        return [x[-1] for x in baseline.values]
    if len(baseline) != len(matrix.tasks):
        raise ValueError(f"a baseline of {len(baseline)} tasks for {len(matrix.tasks)}: None stands for one without")
    found = []
    for task, given, x in zip(matrix.tasks, baseline, matrix.values, strict=True):
        scores = np.asarray(np.nan if given is None else given, np.float64)
        if scores.shape not in ((), x.shape[1:]):
            raise ValueError(f"the baseline of task {task!r} has the shape {scores.shape}, its items {x.shape[1:]}")
        found.append(np.broadcast_to(scores if matrix.higher_is_better else -scores, x.shape[1:]))
    return found
