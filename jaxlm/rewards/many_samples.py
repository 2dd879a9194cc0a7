# SPDX-License-Identifier: Apache-2.0
"""What n samples of a question say about k: the best of k, and the vote of k.  Exact, nothing is drawn.

Q questions, n samples of each.
"""

import math
from collections.abc import Sequence

import numpy as np

_MOST_SAMPLES = 1000  # beyond it C(n, k) leaves float64


def pass_at_k(right_Q: np.ndarray, num_samples: int | np.ndarray, *, k: int) -> np.ndarray:
    """The chance that k samples hold a right one, estimated without bias from n >= k samples of each question.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1 .. n} (1 - k / i)

    Args:
      right_Q: [Q] int, c, right samples of each question.
      num_samples: n, of all or [Q] of each question.
      k: >= 1, at most n.
    Returns: [Q] float64; its mean over questions is the metric, `interval_of_mean` its interval.
    Raises: ValueError for k > n, or c outside [0, n].

    >>> pass_at_k(np.array([0, 1, 4]), 4, k=2).tolist()
    [0.0, 0.5, 1.0]

    Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code, arXiv:2107.03374, eq. 1.
    """
    right_Q = np.asarray(right_Q)
    num_Q = np.broadcast_to(np.asarray(num_samples), right_Q.shape)
    _check_k(k, int(num_Q.min()) if num_Q.size else k)
    if not (np.issubdtype(right_Q.dtype, np.integer) and np.issubdtype(num_Q.dtype, np.integer)):
        raise ValueError(
            f"right answers and samples are counted, got {right_Q.dtype} of {num_Q.dtype}: sum (score == 1)"
        )
    if ((right_Q < 0) | (right_Q > num_Q)).any():
        place = int(np.argmax((right_Q < 0) | (right_Q > num_Q)))
        raise ValueError(f"question {place} has {right_Q[place]} right answers of {num_Q[place]} samples")
    numbers = zip(right_Q.tolist(), num_Q.tolist(), strict=True)
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c, n in numbers], np.float64)


def majority_at_k(answers: Sequence[str | None], right: Sequence[float], *, k: int) -> float:
    """The score of the most frequent answer among k samples (self-consistency), exact over all subsets of n.

        E over the k-subsets of the n samples of  mean over the answers tied for most votes of their score

    Computed by counting: for an answer with v votes, the ways in which every other answer has fewer votes, or as many
    (a tie, split evenly).

    Args:
      answers: [n] of one question, equal where a verifier's `answer` is; None has no vote. A subset without a vote
        scores 0.
      right: [n] scores in [0, 1]; an answer's score is the mean of its samples'.
      k: >= 1, at most n; n at most 1,000.
    Returns: in [0, 1]; average it over questions.
    Raises: ValueError for unequal lengths, k > n, n > 1,000, or a score outside [0, 1].

    >>> majority_at_k(["4", "4", "5"], [1, 1, 0], k=3), majority_at_k(["4", "4", "5"], [1, 1, 0], k=1)
    (1.0, 0.6666666666666666)

    Source: Wang et al. 2022, Self-Consistency Improves Chain of Thought Reasoning, arXiv:2203.11171.
    Departs: the paper votes once among all its samples; this is what k of them would give on average.
    """
    n = len(answers)
    if len(right) != n:
        raise ValueError(f"{n} answers and {len(right)} scores: every sample has one of each")
    _check_k(k, n)
    if outside := [score for score in right if not 0 <= score <= 1]:
        raise ValueError(f"scores lie in [0, 1], got {outside[0]}")
    if n > _MOST_SAMPLES:
        raise ValueError(f"{n} samples of one question: at most {_MOST_SAMPLES} can be counted exactly")
    scores: dict[str, list[float]] = {}
    for answer, score in zip(answers, right, strict=True):
        if answer is not None:
            scores.setdefault(answer, []).append(float(score))
    silent = n - sum(map(len, scores.values()))
    counts = [len(of_one) for of_one in scores.values()]
    total = 0.0
    ways: dict[int, float] = {}  # answers with equally many votes win in equally many ways
    for of_one in scores.values():
        if any(of_one):
            count = len(of_one)
            if count not in ways:
                rest = counts.copy()
                rest.remove(count)
                ways[count] = _ways_to_win(count, rest, silent, k)
            total += ways[count] * sum(of_one) / count
    return min(1.0, total / math.comb(n, k))


def _ways_to_win(count: int, others: list[int], silent: int, k: int) -> float:
    """Subsets of k in which an answer of `count` samples has most votes; a tie of t counts 1 / t."""
    won = 0.0
    for votes in range(1, min(count, k) + 1):
        most_ties = (k - votes) // votes
        ways = np.zeros((most_ties + 1, k - votes + 1))  # [other answers with as many votes, samples taken]
        ways[0] = [math.comb(silent, taken) for taken in range(k - votes + 1)]
        for other in others:
            fewer = [math.comb(other, taken) for taken in range(min(votes, other + 1))]
            added = np.zeros_like(ways)
            for taken, chosen in enumerate(fewer[: ways.shape[1]]):
                added[:, taken:] += chosen * ways[:, : ways.shape[1] - taken]
            if other >= votes and most_ties:
                added[1:, votes:] += math.comb(other, votes) * ways[:-1, : ways.shape[1] - votes]
            ways = added
        won += math.comb(count, votes) * float(np.sum(ways[:, -1] / np.arange(1, most_ties + 2)))
    return won


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the {n} samples of a question, got {k}: draw at least k samples")
