# SPDX-License-Identifier: Apache-2.0
"""What a comparison of plans found, as a table: means over seeds with 95 % intervals over questions."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxlm.comparison import run_directory
from jaxlm.comparison_plans import best_plan_rate
from jaxlm.config import PlanComparison
from jaxlm.resampling import Interval
from jaxlm.rewards.resampled import interval_of_mean


class PlanArm(NamedTuple):
    """One arm at its best rate.

    Attributes:
      name, rate: which.
      splits: split -> {"accuracy", "versus", "shuffled", "mean"}: estimates over questions, seeds averaged first;
        "versus" is the accuracy less that of the plain arm on the same questions.
      numbers: means over seeds of everything that `result.json` holds.
    """

    name: str
    rate: float
    splits: Mapping[str, Mapping[str, Interval]]
    numbers: Mapping[str, float]


def plan_findings(comparison: PlanComparison, *, resamples: int = 10_000) -> list[PlanArm]:
    """Every arm, in the order of the comparison.

    Raises: ValueError if a run is missing.
    """
    found = {arm: _runs(comparison, arm) for arm in comparison.arms}
    arms = []
    for name, (rate, results, answers) in found.items():
        splits = {}
        for split in comparison.tests:
            correct, plain = (_mean(each, f"{split}/correct") for each in (answers, found[comparison.plain][2]))
            told = {"accuracy": correct, "versus": correct - plain}
            told |= {name: _mean(answers, f"{split}/{name}") for name in ("shuffled", "mean")}
            kept = {key: x for key, x in told.items() if not np.isnan(x).any()}
            splits[split] = {key: interval_of_mean(x, resamples=resamples) for key, x in kept.items()}
        numbers = {key: float(np.mean([result[key] for result in results])) for key in results[0]}
        arms.append(PlanArm(name, rate, splits, numbers))
    return arms


def plan_table(comparison: PlanComparison, arms: list[PlanArm]) -> str:
    """Markdown: a table for each split."""
    text = []
    for split in comparison.tests:
        text += [f"**{split}**, points of 100; {len(comparison.seeds)} seeds", ""]
        heads: tuple[str, ...] = (
            "arm",
            "rate",
            "accuracy",
            f"less {comparison.plain}",
            "capsules exchanged",
            "mean capsule",
            "visible tokens",
        )
        heads += ("all tokens", "s alone", "s full", "plan tokens right", "plan, nats")
        text += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for arm in arms:
            n, estimates = arm.numbers, arm.splits[split]
            cells = [arm.name, f"{arm.rate:g}"]
            cells += [_points(estimates.get(key)) for key in ("accuracy", "versus", "shuffled", "mean")]
            cells += [_number(n, f"{key}/{split}", "{:.1f}") for key in ("visible", "tokens")]
            cells += [_number(n, key, "{:.3f}") for key in ("seconds_alone", "seconds_full")]
            cells += [_number(n, f"plan_accuracy/{split}", "{:.1%}"), _number(n, f"plan_information/{split}", "{:.2f}")]
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def _runs(comparison: PlanComparison, arm: str) -> tuple[float, list[dict[str, float]], list[Any]]:
    rate = best_plan_rate(comparison, arm)
    results, answers = [], []
    for seed in comparison.seeds:
        directory = run_directory(comparison, arm, rate, seed)
        if not (directory / "result.json").is_file():
            raise ValueError(f"arm {arm!r} has not been trained at {rate:g} with seed {seed}: run the comparison")
        results.append(json.loads((directory / "result.json").read_text()))
        with np.load(directory / "answers.npz") as arrays:
            answers.append(dict(arrays))
    return rate, results, answers


def _mean(answers: list[Any], name: str) -> np.ndarray:
    return np.mean([each[name] for each in answers], axis=0)


def _points(estimate: Interval | None) -> str:
    return (
        "-"
        if estimate is None
        else f"{100 * estimate.mean:.1f} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"
    )


def _number(numbers: Mapping[str, float], name: str, how: str) -> str:
    return how.format(numbers[name]) if name in numbers else "-"
