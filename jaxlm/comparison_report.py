# SPDX-License-Identifier: Apache-2.0
"""What a comparison found: a table of every arm, and which differences from the plain arm and the controls count."""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxlm.comparison import Trained, best_rate, read_trained, unfinished
from jaxlm.config import ALONE, Comparison
from jaxlm.resampling import Interval
from jaxlm.train.bootstrap import Difference, difference, holm, paired_bootstrap
from jaxlm.train.continual import continual_metrics
from jaxlm.train.score_matrix import ScoreMatrix

COLUMNS = {  # metric -> heading; base_drop is shown as it is measured: lower is better
    "final": "final",
    "final_worst": "worst task",
    "backward_transfer": "backward transfer",
    "plasticity": "plasticity",
    "base_drop": "base drop",
}
Kind = Literal["accuracy", "nll", "exact"]
COMPARED = ("final", "backward_transfer", "base_drop")


class Arm(NamedTuple):
    """One arm at its best rate.

    Attributes:
      runs: one a seed, of the comparison's first seeds.
      matrices: of the reported half of the records, one a seed.
      metrics: means over seeds with 95 % intervals over items.
      versus: other arm -> metric -> this arm's difference from it, over the seeds that both have, at least two.
    """

    name: str
    rate: float
    runs: Sequence[Trained]
    matrices: Sequence[ScoreMatrix]
    metrics: dict[str, Interval]
    versus: dict[str, dict[str, Difference]]


def findings(comparison: Comparison, *, kind: Kind = "accuracy", resamples: int = 10_000) -> list[Arm]:
    """Every arm that has its best rate, in the order of the comparison.

    Args:
      kind: of scores: "accuracy" (tokens), "exact" or "nll".
    Raises: ValueError if the plain arm is not among them.
    """
    specialist = _specialist(comparison, kind)
    found = {name: runs for name in comparison.arms if (runs := _runs(comparison, name))}
    if comparison.plain not in found:
        raise ValueError(
            f"arm {comparison.plain!r} has not been trained at all of its rates yet: run the comparison to its end"
        )
    matrices = {name: [run.scores.matrix(kind, items="odd") for run in runs] for name, runs in found.items()}
    arms = []
    for name, runs in found.items():
        metrics = {
            metric: paired_bootstrap(matrices[name], metric=metric, specialist=specialist, resamples=resamples)
            for metric in COLUMNS
            if specialist is not None or metric != "plasticity"
        }
        others = {comparison.plain, comparison.controls.get(name), comparison.joint} - {name}
        versus = {
            other: _differences_of(matrices[name], matrices[other], resamples)
            for other in matrices
            if other in others and min(len(matrices[name]), len(matrices[other])) > 1
        }
        arms.append(Arm(name, runs[0].rate, runs, matrices[name], metrics, versus))
    return arms


def _differences_of(mine: list[ScoreMatrix], others: list[ScoreMatrix], resamples: int) -> dict[str, Difference]:
    """Of the metrics that both have, over the seeds that both have."""
    both = min(len(mine), len(others))
    return {
        metric: difference(mine[:both], others[:both], metric=metric, resamples=resamples)
        for metric in COMPARED
        if all(np.isfinite(continual_metrics(matrices[0])[metric]) for matrices in (mine, others))
    }


def _runs(comparison: Comparison, name: str) -> list[Trained]:
    """An arm at its best rate, one a seed up to the first that is missing; none while a rate has not been tried."""
    seeds = comparison.seeds
    if any(read_trained(comparison, name, rate, seeds[0]) is None for rate in comparison.rates(name)):
        return []
    rate = best_rate(comparison, name)
    runs = [read_trained(comparison, name, rate, seed) for seed in seeds]
    return [run for run in itertools.takewhile(lambda run: run is not None, runs) if run is not None]


def _specialist(comparison: Comparison, kind: Kind) -> list[np.ndarray | None] | None:
    """Scores of the specialists on the reported items, means over seeds; None for tasks without one.

    None instead of a list while a specialist is missing: there is no plasticity yet.
    """
    scores: list[np.ndarray | None] = []
    for task in comparison.run.data.task_names:
        if task not in comparison.trained:
            scores.append(None)
            continue
        ends = []
        for run in _runs(comparison, f"{ALONE}/{task}"):
            matrix = run.scores.matrix(kind, items="odd")
            ends.append(matrix.values[matrix.tasks.index(task)][-1])
        if not ends:
            return None
        scores.append(np.abs(np.mean(ends, axis=0)))  # losses as they are measured
    return scores


def table(comparison: Comparison, arms: Sequence[Arm]) -> str:
    """Markdown: every arm's numbers, its differences from the plain arm and from its control, and what is missing."""
    head = ["arm", "rate", "seeds", *COLUMNS.values(), "tokens"]
    plain = next(arm for arm in arms if arm.name == comparison.plain)
    least = plain.runs[0].trained_tokens
    lines = [_row(head), _row(["---"] * len(head))]
    for arm in arms:
        numbers = [_interval(arm.metrics[metric]) if metric in arm.metrics else "" for metric in COLUMNS]
        cells = [arm.name, f"{arm.rate:.1g}", str(len(arm.runs)), *numbers]
        lines.append(_row([*cells, f"{np.mean([run.trained_tokens for run in arm.runs]) / least:.2f}"]))
    lines += ["", *_differences(comparison, arms)]
    missing = unfinished(comparison.arms, {arm.name: len(arm.runs) for arm in arms}, len(comparison.seeds))
    missing += [] if "plasticity" in plain.metrics else ["the specialists"]
    return "\n".join([*lines, "", f"Not finished: {'; '.join(missing)}."] if missing else lines)


def _differences(comparison: Comparison, arms: Sequence[Arm]) -> list[str]:
    """Rows of the second table: which differences count; p-values against the plain arm hold together (Holm)."""
    head = ["arm", "against", *(COLUMNS[metric] for metric in COMPARED)]
    lines = [_row(head), _row(["---"] * len(head))]
    adjusted = {
        metric: holm(
            {
                arm.name: arm.versus[comparison.plain][metric].p
                for arm in arms
                if metric in arm.versus.get(comparison.plain, {})
            }
        )
        for metric in COMPARED
    }
    for arm in arms:
        for other, found in arm.versus.items():
            cells = []
            for metric in COMPARED:
                told = found.get(metric)
                if told is None:
                    cells.append("")
                    continue
                sure = told.counts and (other != comparison.plain or adjusted[metric][arm.name] < 0.05)
                text = f"{100 * told.mean:+.1f} ({100 * told.low:+.1f} to {100 * told.high:+.1f})"
                cells.append(f"**{text}**" if sure else text)
            lines.append(_row([arm.name, other, *cells]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _interval(x: Interval) -> str:
    if not np.isfinite(x.mean):
        return ""
    return f"{100 * x.mean:.1f} ({100 * x.low:.1f} to {100 * x.high:.1f})"
