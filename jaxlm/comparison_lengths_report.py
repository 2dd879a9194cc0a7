# SPDX-License-Identifier: Apache-2.0
"""What a comparison over lengths found: perplexity of every arm at every length, and how it holds.

S seeds, W windows, R resamples; intervals are over windows, spreads over seeds.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.comparison import unfinished
from jaxlm.comparison_lengths import Tested, best_rate, read_tested
from jaxlm.config import LengthComparison
from jaxlm.resampling import Interval, resampled_means

TIMES = 16  # the ratio that sums an arm up is that of this many times the training length, or the longest below


class LengthArm(NamedTuple):
    """One arm at its best rate.

    Attributes:
      rate: the best one.
      seeds: those that have been tested, the first of the comparison's.
      perplexity, tail: length -> exp of the mean loss of all predictions, or of the last of each window; mean over
        seeds, interval over windows.
      by_seed: length -> perplexity of each seed.
      growth: perplexity at `reach(comparison)` over that at the training length.
      against: perplexity at the training length over the plain arm's, over the seeds that both have.
      far: share of attention at distances over the training length, in windows of `looked_at` tokens, by seed.
      weight, score: [looked_at] by distance, means over seeds, layers and heads; see `jaxlm.nn.attention_probe`.
    """

    name: str
    rate: float
    seeds: tuple[int, ...]
    perplexity: Mapping[int, Interval]
    tail: Mapping[int, Interval]
    by_seed: Mapping[int, Sequence[float]]
    growth: Interval
    against: Interval
    far: Sequence[float]
    weight: np.ndarray
    score: np.ndarray


def reach(comparison: LengthComparison) -> int:
    """The length that an arm's growth is told at."""
    return max(length for length in comparison.lengths if length <= TIMES * comparison.lengths[0])


def length_findings(comparison: LengthComparison, *, resamples: int = 10_000) -> list[LengthArm]:
    """Every arm that has been tested with the first seed, in the order of the comparison.

    Raises: ValueError if the plain arm is not among them.
    """
    found: dict[str, list[Tested]] = {}
    for name in comparison.tested:
        tests = [read_tested(comparison, name, seed) for seed in comparison.seeds]
        there = tests[: tests.index(None)] if None in tests else tests
        if there:
            found[name] = [test for test in there if test is not None]
    if comparison.plain not in found:
        raise ValueError(f"arm {comparison.plain!r} has not been tested yet: run the comparison to its end")
    return [_arm(comparison, name, tests, found[comparison.plain], resamples) for name, tests in found.items()]


def _arm(
    comparison: LengthComparison, name: str, tests: Sequence[Tested], plain: Sequence[Tested], resamples: int
) -> LengthArm:
    first, far, tail = comparison.lengths[0], reach(comparison), comparison.tail
    losses = {length: _losses(tests, length) for length in comparison.lengths}
    tails = {length: _losses(tests, length, tail) for length in comparison.lengths}
    near = losses[first].reshape(-1, far // first, len(tests)).mean(axis=1)  # of the same tokens as windows of `far`
    both = min(len(tests), len(plain))
    versus = losses[first][:, :both].mean(axis=1, keepdims=True)
    versus = versus - _losses(plain[:both], first).mean(axis=1, keepdims=True)
    weight, score = (
        np.stack([x.mean(axis=(0, 1), dtype=np.float64) for x in found])
        for found in ([test.weight for test in tests], [test.score for test in tests])
    )
    return LengthArm(
        name=name,
        rate=best_rate(comparison, comparison.yarn.get(name, name)),
        seeds=comparison.seeds[: len(tests)],
        perplexity={length: _exp_mean(x, resamples) for length, x in losses.items()},
        tail={length: _exp_mean(x, resamples) for length, x in tails.items()},
        by_seed={length: np.exp(x.mean(axis=0)).tolist() for length, x in losses.items()},
        growth=_exp_mean(losses[far] - near, resamples),
        against=_exp_mean(versus, resamples),
        far=weight[:, first + 1 :].sum(axis=1).tolist(),
        weight=weight.mean(axis=0),
        score=score.mean(axis=0),
    )


def _losses(tests: Sequence[Tested], length: int, tail: int = 0) -> np.ndarray:
    """[W, S] float64 mean loss of each window, or of its last `tail` predictions; all windows weigh the same."""
    return np.stack([test.nll[length][:, -tail:].mean(axis=1, dtype=np.float64) for test in tests], axis=1)


def _exp_mean(values_WS: np.ndarray, resamples: int) -> Interval:
    """exp of the mean over windows, mean over seeds; every resample draws the same windows for all seeds."""
    (drawn,) = resampled_means([values_WS], resamples=resamples, seed=0)
    low, high = np.percentile(np.exp(drawn).mean(axis=1), [2.5, 97.5])
    return Interval(float(np.exp(values_WS.mean(axis=0)).mean()), float(low), float(high))


def length_table(comparison: LengthComparison, arms: Sequence[LengthArm]) -> str:
    """Markdown: how each arm holds, perplexity by length, that of the tails, and the spread of seeds."""
    lengths = [f"{length:,}" for length in comparison.lengths]
    times, first = reach(comparison) // comparison.lengths[0], comparison.lengths[0]
    head = [
        "arm",
        "rate",
        "seeds",
        f"perplexity at {first}",
        f"against {comparison.plain}",
        f"{times}x over 1x",
        f"far attention at {comparison.looked_at:,}",
    ]
    lowest, highest = min(comparison.learning_rates), max(comparison.learning_rates)
    summary = [
        [
            arm.name,
            f"{arm.rate:.2g}" + ("*" if arm.rate in (lowest, highest) else ""),
            str(len(arm.seeds)),
            _interval(arm.perplexity[first]),
            _interval(arm.against),
            _interval(arm.growth),
            f"{100 * float(np.mean(arm.far)):.1f} %",
        ]
        for arm in arms
    ]
    told = [
        ("", _markdown(head, summary)),
        *(
            [("A rate marked * is the lowest or highest that was tried: a better one may lie beyond.", "")]
            if any("*" in row[1] for row in summary)
            else []
        ),
        (
            "Perplexity, all predictions:",
            _by_length(arms, lengths, lambda arm: map(_interval, arm.perplexity.values())),
        ),
        (
            f"Perplexity, the last {comparison.tail} predictions of each window (other text at each length):",
            _by_length(arms, lengths, lambda arm: map(_interval, arm.tail.values())),
        ),
        ("Lowest and highest seed:", _by_length(arms, lengths, lambda arm: map(_spread, arm.by_seed.values()))),
    ]
    text = "\n\n".join("\n\n".join(filter(None, part)) for part in told)
    missing = unfinished(comparison.tested, {arm.name: len(arm.seeds) for arm in arms}, len(comparison.seeds))
    return text + (f"\n\nNot finished: {'; '.join(missing)}." if missing else "")


def _by_length(arms: Sequence[LengthArm], lengths: Sequence[str], cells: Callable[[LengthArm], Iterable[str]]) -> str:
    return _markdown(["arm", *lengths], [[arm.name, *cells(arm)] for arm in arms])


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def _interval(x: Interval) -> str:
    return f"{x.mean:.2f} ({x.low:.2f} to {x.high:.2f})"


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"
