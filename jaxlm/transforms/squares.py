# SPDX-License-Identifier: Apache-2.0
"""Sums of squared gradients, taken while nothing moves: the diagonal that EWC weighs its pull with."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class SquaredGradientsState(NamedTuple):
    """State of `squared_gradients`.

    Attributes:
      num_updates: int32, gradients seen.
      total: float32, like the parameters: the sum of their squares.
    """

    num_updates: jax.Array
    total: Any


def squared_gradients() -> optax.GradientTransformationExtraArgs:
    """Moves nothing and sums the squares of the gradients it is given; `total / num_updates` is their mean.

    Updates are -0.0, so every bit of the parameters stays. A square that is not finite is left out of its sum. These
    are squares of the gradient of a batch: with one example a batch their mean is the empirical Fisher diagonal.

    >>> tx = squared_gradients()
    >>> _, state = tx.update({"w": jnp.array([3.0, -1.0])}, tx.init({"w": jnp.ones(2)}))
    >>> state.total["w"].tolist(), int(state.num_updates)
    ([9.0, 1.0], 1)
    """

    def init(params: Any) -> SquaredGradientsState:
        total = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
        return SquaredGradientsState(jnp.zeros((), jnp.int32), total)

    def update(
        updates: Any, state: SquaredGradientsState, params: Any = None, **extra: Any
    ) -> tuple[Any, SquaredGradientsState]:
        def add(total: jax.Array, gradient: jax.Array) -> jax.Array:
            square = jnp.square(gradient.astype(jnp.float32))
            return jnp.where(jnp.isfinite(square), total + square, total)

        total = jax.tree.map(add, state.total, updates)
        still = jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)
        return still, SquaredGradientsState(optax.safe_increment(state.num_updates), total)

    return optax.GradientTransformationExtraArgs(init, update)
