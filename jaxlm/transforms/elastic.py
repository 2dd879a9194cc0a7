# SPDX-License-Identifier: Apache-2.0
"""A pull back to where earlier tasks were solved, entry by entry as strong as it mattered to them: EWC."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.transforms.isolation import ByUpdate


class PullState(NamedTuple):
    """State of `pull`; leaves like the parameters, float32.

    Attributes:
      weight: sum over the earlier tasks of their weights F_i.
      anchor: sum over the earlier tasks of F_i * theta_i.
      inner: of the wrapped optimizer.
    """

    weight: Any
    anchor: Any
    inner: optax.OptState


def pull(inner: optax.GradientTransformation, *, strength: float) -> optax.GradientTransformationExtraArgs:
    """`inner` on the gradient of the loss plus a quadratic penalty around the solutions of earlier tasks.

        penalty = strength / 2 * sum_i sum_j F_ij (theta_j - theta_ij)^2
        its gradient = strength * (weight * theta - anchor),  weight = sum_i F_i,  anchor = sum_i F_i theta_i

    One pair of trees stands for any number of tasks, exactly. Both are zero at first; put others in with
    `state._replace(weight=..., anchor=...)`, which never recompiles. Calls with the same `inner.update` and `strength`
    share one `update` function.

    Args:
      inner: any optax optimizer; a clip inside sees the pull too.
      strength: >= 0.
    Raises: ValueError for a negative strength, or an update without `params`.

    >>> tx = pull(optax.sgd(1.0), strength=0.5)
    >>> params = {"w": jnp.array([3.0, 3.0])}
    >>> state = tx.init(params)._replace(weight={"w": jnp.array([1.0, 0.0])}, anchor={"w": jnp.array([1.0, 0.0])})
    >>> tx.update({"w": jnp.ones(2)}, state, params)[0]["w"].tolist()
    [-2.0, -1.0]

    Source: Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3, with a penalty for each earlier task.
    """
    if strength < 0:
        raise ValueError(f"strength must be >= 0, got {strength}")

    def init(params: Any) -> PullState:
        def zeros() -> Any:
            return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)

        return PullState(zeros(), zeros(), inner.init(params))

    return optax.GradientTransformationExtraArgs(init, _pulled_update(ByUpdate(inner), strength))


@functools.lru_cache(maxsize=64)
def _pulled_update(key: ByUpdate, strength: float) -> Any:
    inner = optax.with_extra_args_support(key.tx)

    def update(updates: Any, state: PullState, params: Any = None, **extra: Any) -> tuple[Any, PullState]:
        if params is None:
            raise ValueError("pull needs params: call update(gradients, state, params)")

        def pulled(g: jax.Array, p: jax.Array, weight: jax.Array, anchor: jax.Array) -> jax.Array:
            return g + (strength * (weight * p - anchor)).astype(g.dtype)

        updates = jax.tree.map(pulled, updates, params, state.weight, state.anchor)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        return updates, state._replace(inner=inner_state)

    return update
