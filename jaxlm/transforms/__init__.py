# SPDX-License-Identifier: Apache-2.0
"""Gradient transformations that compose with those of optax."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "evolving_isolation": "evolving",
        "freeze": "frozen",
        "held_mask": "isolation",
        "isolate": "isolation",
        "isolation_metrics": "isolation",
        "nothing_held": "isolation",
        "pull": "elastic",
        "squared_gradients": "squares",
        "with_fresh_inner": "isolation",
    },
)
