# SPDX-License-Identifier: Apache-2.0
"""What samples of held-out records come to: accuracy, pass@k, majority@k, calibration, with intervals over questions.

Q questions of a task, n samples of each, N answers whose confidence is known.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.evaluation_samples import Answered
from jaxlm.resampling import Interval
from jaxlm.rewards.many_samples import majority_at_k, pass_at_k
from jaxlm.rewards.reliability import Calibration, calibration
from jaxlm.rewards.resampled import interval_of_mean

Confidence = Literal["votes", "likelihood"]
CONFIDENCE: Mapping[Confidence | None, str] = {
    "votes": "the share of a record's samples that gave its most frequent answer; right is the score of that answer",
    "likelihood": "exp of the mean log-prob of a sample's tokens, of the model itself, before temperature and filters",
    None: "not known: the engine told no log-probs",
}


class Measured(NamedTuple):
    """One task's numbers; each interval is of 95 %, over questions.

    Attributes:
      task: its name.
      verifier: who judged, as text.
      questions, samples: Q and n.
      accuracy: share of samples whose score is 1, a mean over questions of each one's share.
      score: the mean score, above accuracy where a verifier gives part marks.
      pass_at: k -> pass@k, unbiased.
      majority_at: k -> majority@k, exact over all subsets; empty where the verifier reads no answer to vote with.
      cut_off: share of samples that the length limit ended; their text is judged all the same.
      tokens: mean of a sample, its end token included.
      confidence: what is compared with success, a key of CONFIDENCE.
      calibration: how far they lie apart; None where no confidence is known.
    """

    task: str
    verifier: str
    questions: int
    samples: int
    accuracy: Interval
    score: Interval
    pass_at: Mapping[int, Interval]
    majority_at: Mapping[int, Interval]
    cut_off: float
    tokens: float
    confidence: Confidence | None
    calibration: Calibration | None


def measure(answered: Answered, ks: Sequence[int], *, resamples: int = 10_000) -> Measured:
    """The numbers of one task.

    Args:
      answered: the task's samples.
      ks: of pass@k and majority@k.
      resamples: of the bootstrap; where only the means are wanted 1 will do.
    """
    asked, completions, scores, answers = answered
    right = scores == 1

    def over_questions(values: Sequence[float] | np.ndarray) -> Interval:
        return interval_of_mean(np.asarray(values, np.float64), resamples=resamples)

    votes = hasattr(asked.verifier, "answer")
    found = list(zip(answers, scores.tolist(), strict=True))
    kind, claimed = _claims(answered, votes)
    return Measured(
        task=asked.task,
        verifier=repr(asked.verifier),
        questions=len(scores),
        samples=scores.shape[1],
        accuracy=over_questions(right.mean(axis=1)),
        score=over_questions(scores.mean(axis=1)),
        pass_at={k: over_questions(pass_at_k(right.sum(axis=1), scores.shape[1], k=k)) for k in ks},
        majority_at={k: over_questions([majority_at_k(*pair, k=k) for pair in found]) for k in ks} if votes else {},
        cut_off=float(np.mean([c.finish_reason == "length" for group in completions for c in group])),
        tokens=float(np.mean([len(c.tokens) for group in completions for c in group])),
        confidence=kind,
        calibration=calibration(*claimed, resamples=resamples) if claimed else None,
    )


def overall(answered: Sequence[Answered], *, resamples: int = 10_000) -> Interval:
    """The accuracy over the questions of all tasks, each question weighing the same."""
    return interval_of_mean(np.concatenate([(a.scores == 1).mean(axis=1) for a in answered]), resamples=resamples)


def flat(measured: Sequence[Measured]) -> dict[str, float]:
    """The means under names as held-out metrics have them, `accuracy/<task>`."""
    found: dict[str, float] = {}
    for m in measured:
        numbers: dict[str, float] = {"accuracy": m.accuracy.mean, "score": m.score.mean}
        numbers |= {f"pass_at_{k}": value.mean for k, value in m.pass_at.items()}
        numbers |= {f"majority_at_{k}": value.mean for k, value in m.majority_at.items()}
        numbers |= {"cut_off": m.cut_off, "completion_tokens": m.tokens}
        if m.calibration is not None:
            numbers |= {"calibration_error": m.calibration.error.mean, "brier": m.calibration.brier.mean}
        found |= {f"{name}/{m.task}": value for name, value in numbers.items()}
    return found


def as_json(measured: Measured) -> dict[str, Any]:
    """All numbers as JSON values; an interval is {"mean", "low", "high"}, what is not known null."""
    values = measured._asdict() | {"confidence_means": CONFIDENCE[measured.confidence]}
    return {name: _plain(value) for name, value in values.items()}


def _claims(answered: Answered, votes: bool) -> tuple[Confidence | None, tuple[np.ndarray, ...] | None]:
    """Confidence [N], score [N] and question [N] of each answer whose confidence is known."""
    scores, n = answered.scores, answered.scores.shape[1]
    if votes and n > 1:
        most = [max(Counter(a for a in group if a is not None).values(), default=0) for group in answered.answers]
        pairs = zip(answered.answers, scores.tolist(), strict=True)
        right = [majority_at_k(group, of_group, k=n) for group, of_group in pairs]
        return "votes", (np.array(most) / n, np.array(right), np.arange(len(scores)))
    means = [float(np.mean(c.raw_log_probs, dtype=np.float64)) for group in answered.completions for c in group]
    if not all(map(math.isfinite, means)):
        return None, None
    return "likelihood", (np.exp(np.minimum(means, 0.0)), scores.ravel(), np.repeat(np.arange(len(scores)), n))


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(inner) for name, inner in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
