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
      name, rate, seeds: which, and how many runs of it there are.
      splits: split -> {"accuracy", "versus", "shuffled", "mean"}: estimates over questions, seeds averaged first;
        "versus" is the accuracy less that of the plain arm on the same questions.
      numbers: means over seeds of everything that `result.json` holds.
    """

    name: str
    rate: float
    seeds: int
    splits: Mapping[str, Mapping[str, Interval]]
    numbers: Mapping[str, float]


def plan_findings(comparison: PlanComparison, *, resamples: int = 10_000) -> list[PlanArm]:
    """Every arm that has a finished run at its rate, in the order of the comparison, with the seeds that are there.

    "versus" compares the seeds that an arm and the plain one have in common.

    Raises: ValueError while the rates of an arm that is followed, or the plain arm's runs, are missing.
    """
    found = {arm: _runs(comparison, arm) for arm in comparison.arms}
    if not found[comparison.plain][1]:
        raise ValueError(f"arm {comparison.plain!r} has no finished run to compare with: run the comparison")
    arms = []
    for name, (rate, by_seed) in found.items():
        if not by_seed:
            continue
        results, answers = [result for result, _ in by_seed.values()], [answer for _, answer in by_seed.values()]
        beside = found[comparison.plain][1]
        common = [seed for seed in by_seed if seed in beside]
        splits = {}
        for split in comparison.tests:
            told = {"accuracy": _mean(answers, f"{split}/correct")}
            if common:
                ours, plain = ([each[seed][1] for seed in common] for each in (by_seed, beside))
                told["versus"] = _mean(ours, f"{split}/correct") - _mean(plain, f"{split}/correct")
            told |= {name: _mean(answers, f"{split}/{name}") for name in ("shuffled", "mean")}
            kept = {key: x for key, x in told.items() if not np.isnan(x).any()}
            splits[split] = {key: interval_of_mean(x, resamples=resamples) for key, x in kept.items()}
        numbers = {key: float(np.mean([result[key] for result in results])) for key in results[0]}
        arms.append(PlanArm(name, rate, len(by_seed), splits, numbers))
    return arms


def plan_table(comparison: PlanComparison, arms: list[PlanArm]) -> str:
    """Markdown: a table for each split."""
    text = []
    for split in comparison.tests:
        text += [f"**{split}**, points of 100", ""]
        heads: tuple[str, ...] = (
            "arm",
            "rate",
            "seeds",
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
            cells = [arm.name, f"{arm.rate:g}", str(arm.seeds)]
            cells += [_points(estimates.get(key)) for key in ("accuracy", "versus", "shuffled", "mean")]
            cells += [_number(n, f"{key}/{split}", "{:.1f}") for key in ("visible", "tokens")]
            cells += [_number(n, key, "{:.3f}") for key in ("seconds_alone", "seconds_full")]
            cells += [_number(n, f"plan_accuracy/{split}", "{:.1%}"), _number(n, f"plan_information/{split}", "{:.2f}")]
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    wanted = len(comparison.seeds)
    short = [f"{arm.name} ({arm.seeds} of {wanted} seeds)" for arm in arms if arm.seeds < wanted]
    short += [f"{name} (none)" for name in comparison.arms if name not in {arm.name for arm in arms}]
    if short:
        text.append(f"Not finished: {', '.join(short)}.")
    return "\n".join(text)


def _runs(comparison: PlanComparison, arm: str) -> tuple[float, dict[int, tuple[dict[str, float], Any]]]:
    """The arm's rate; seed -> numbers and answers of the runs that are finished."""
    rate = best_plan_rate(comparison, arm)
    by_seed = {}
    for seed in comparison.seeds:
        directory = run_directory(comparison, arm, rate, seed)
        if (directory / "result.json").is_file():
            with np.load(directory / "answers.npz") as arrays:
                by_seed[seed] = (json.loads((directory / "result.json").read_text()), dict(arrays))
    return rate, by_seed


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
