# SPDX-License-Identifier: Apache-2.0
"""Array functions that exist for speed or memory: each has a plain form in its docstring and a test that they agree."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {"NllResult": "cross_entropy", "token_log_probs": "cross_entropy", "weighted_nll": "cross_entropy"},
)
