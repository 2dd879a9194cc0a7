# SPDX-License-Identifier: Apache-2.0
"""Metrics of the updates between two reports: sums, and what they come to; refusals of updates that went wrong."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

SHOWN = 8  # records named in an error


class Interval:
    """Adds up what the updates since the last report say.

    Args:
      task_names: for terms that are vectors, "x_by_task" becomes "x/<task>".
      tokens, trained_tokens: those of the stage so far: in a segment, and as the loss weighs them.
    """

    def __init__(self, task_names: Sequence[str], tokens: int = 0, trained_tokens: float = 0.0):
        self._task_names = task_names
        self._tokens = tokens
        self.trained_tokens = trained_tokens
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Any] = {}
        self._weights: dict[str, Any] = {}
        self._last: dict[str, float] = {}
        self._counted = 0
        self.updates = 0
        self._begin = time.perf_counter()

    @property
    def total_tokens(self) -> int:
        """Tokens in a segment since the stage began."""
        return self._tokens + self._counted

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Metrics of one update, on the host."""
        for name, weight in metrics["weights"].items():
            part = np.where(weight > 0, metrics[name], 0.0).astype(np.float64) * weight
            self._sums[name] = self._sums.get(name, 0.0) + part
            self._weights[name] = self._weights.get(name, 0.0) + weight.astype(np.float64)
        last = ("objective", "gradient_norm", "update_norm", "learning_rate")
        self._last = {n: float(value) for n, value in metrics.items() if n in last or n.startswith("isolation/")}
        self._counted += int(metrics.get("tokens", 0))
        self.trained_tokens += float(metrics["weights"].get("loss", 0.0))
        self.updates += 1

    def leave_out(self, seconds: float) -> None:
        """Time that was not spent on updates."""
        self._begin += seconds

    def report(self) -> dict[str, float]:
        """Means over the weights of the interval; norms, rate and held set of its last update; then a new interval."""
        line: dict[str, float] = {}
        for name, total in self._sums.items():
            weight = self._weights[name]
            if np.ndim(total) == 0:
                line[name] = float(total / weight) if weight > 0 else 0.0
                continue
            family = name.removesuffix("_by_task")
            names = self._task_names if len(self._task_names) == len(total) else range(len(total))
            line |= {f"{family}/{n}": float(t / w) for n, t, w in zip(names, total, weight, strict=True) if w > 0}
        line |= self._last
        if self._counted:
            line["tokens"] = self.total_tokens
            line["tokens_per_second"] = self._counted / max(time.perf_counter() - self._begin, 1e-9)
        self._tokens = self.total_tokens
        self._clear()
        return line


def is_busy(metrics: Any) -> bool:
    """Whether the devices are still at work on the update that these come from."""
    leaves: list[Any] = jax.tree.leaves(metrics)
    return any(not leaf.is_ready() for leaf in leaves)


def records_of(batch: Mapping[str, Any], describe: Callable[[int, int], str] | None) -> str:
    """The records in a batch, for an error: their places in their sources, a few of them."""
    if "record_ids" not in batch:
        return "(the batch carries no record_ids)"
    records = np.asarray(batch["record_ids"])
    tasks = np.broadcast_to(np.asarray(batch.get("task_ids", np.zeros_like(records))), records.shape)
    pairs = sorted({(int(t), int(r)) for t, r in zip(tasks.ravel(), records.ravel(), strict=True) if r >= 0})
    told = [describe(t, r) if describe else f"task {t} record {r}" for t, r in pairs[:SHOWN]]
    more = f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
    return ", ".join(told) + more if told else "(no record: all padding)"


def check_update(step: int, metrics: Mapping[str, Any], records: Callable[[], str]) -> None:
    """Raises ValueError, naming step and records, for an update that is not finite or learnt from nothing."""
    if metrics["empty"]:
        raise ValueError(
            f"step {step} has no trainable token, nothing to learn from: its records are {records()}. Check their "
            "answers, roles and length; a batch must hold a token with loss weight that something precedes"
        )
    if not metrics["finite"]:
        told = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0 and name != "weights"}
        parts = ", ".join(f"{name} {told[name]:.4g}" for name in told if name in (*metrics["weights"], "update_norm"))
        raise ValueError(
            f"step {step} is not finite ({parts}); its records are {records()}. Nothing of it was saved: the last "
            "good checkpoint stays. Look at those records, lower the learning rate or clip the gradient"
        )
