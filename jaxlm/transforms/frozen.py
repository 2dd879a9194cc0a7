# SPDX-License-Identifier: Apache-2.0
"""Whole parameters that do not train: no gradient work, no optimizer state."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.weights.names import label_by_path

TRAINED, FROZEN = "trained", "frozen"


def set_to_minus_zero() -> optax.GradientTransformation:
    """Updates of -0.0: adding one keeps every bit of a parameter, where +0.0 would turn -0.0 into 0.0."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def freeze(
    inner: optax.GradientTransformation, rules: Sequence[tuple[str, str]]
) -> optax.GradientTransformationExtraArgs:
    """`inner` on the trained leaves; the frozen ones never move and have no state.

    The train step sees that the update of a frozen leaf does not depend on its gradient and computes none. Whatever
    reads all gradients (a clip, a norm) belongs inside: outside it would bring the frozen leaves' backward pass back.

    Args:
      inner: the optimizer of the trained leaves.
      rules: `(pattern, "trained" | "frozen")`, the first whole match decides; they must cover every leaf and each
        must be used (`label_by_path`).
    Raises: ValueError for another label, and from `label_by_path` when the parameters are seen.

    >>> tx = freeze(optax.adam(1e-3), [("head/.*", "trained"), (".*", "frozen")])
    >>> state = tx.init({"head": {"kernel": jnp.ones(2)}, "embed": {"table": jnp.ones(5)}})
    >>> sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    4
    """
    if unknown := {label for _, label in rules} - {TRAINED, FROZEN}:
        raise ValueError(f"a rule of freeze says {TRAINED!r} or {FROZEN!r}, got {sorted(unknown)}")
    return optax.partition(
        {TRAINED: inner, FROZEN: set_to_minus_zero()}, lambda params: label_by_path(params, tuple(rules))
    )
