# SPDX-License-Identifier: Apache-2.0
"""Gradient transformations that compose with those of optax."""

from jaxlm._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {"freeze": "frozen", "isolate": "isolation", "nothing_held": "isolation", "squared_gradients": "squares"},
)
