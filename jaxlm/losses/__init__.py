# SPDX-License-Identifier: Apache-2.0
"""Losses: arrays in, terms out. A term is a sum and the weight it is to be divided by; only the step divides."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "Term": "term",
        "capsule_loss": "capsule",
        "kept_tokens": "policy",
        "next_token_terms": "next_token",
        "policy_terms": "policy",
        "preference_loss": "preference",
        "preference_terms": "preference",
        "reconstruction_loss": "capsule",
        "reconstruction_terms": "capsule",
        "support_log_probs": "policy",
    },
)
