# SPDX-License-Identifier: Apache-2.0
"""Verifiers of generated answers, and the statistics of many answers to one question."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Bin": "reliability",
        "Calibration": "reliability",
        "Check": "verifier",
        "ExactMatch": "matching",
        "GymMatch": "exercises",
        "MathMatch": "mathematics",
        "MultipleChoice": "choices",
        "NormalisedMatch": "matching",
        "NumericMatch": "numeric",
        "PlannedAnswer": "planned",
        "ProceduralMatch": "exercises",
        "Verifier": "verifier",
        "answer_text": "answers",
        "calibration": "reliability",
        "interval_of_mean": "resampled",
        "majority_at_k": "many_samples",
        "marked": "answers",
        "own_verifier": "exercises",
        "pass_at_k": "many_samples",
        "references": "verifier",
        "verify": "verifier",
    },
)
