# SPDX-License-Identifier: Apache-2.0
"""What a run carries from update to update, born divided over the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.train.mesh import replicated


class State(NamedTuple):
    """All that an update reads and writes.

    Attributes:
      step: int32 scalar, updates done so far.
      params: float32 masters, a nested dict.
      opt_state: of the phase's `tx`.
      rng: typed PRNG key of the run; it never changes, each update folds its step in.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array


def make_state(params: Any, tx: optax.GradientTransformation, rng: jax.Array) -> State:
    """The state before the first update. Pure: compile it with `out_shardings=state_shardings(...)`."""
    return State(jnp.zeros((), jnp.int32), params, tx.init(params), rng)


def state_shardings(tx: optax.GradientTransformation, shapes: Any, shardings: Any, mesh: jax.sharding.Mesh) -> State:
    """Shardings of the whole state: optimizer leaves made like a parameter lie where the parameter lies.

    Args:
      tx: the optimizer.
      shapes: the parameters as `ShapeDtypeStruct`s.
      shardings: a sharding for every parameter (`mesh.shardings`).
      mesh: of those shardings; every other leaf lies whole on each of its devices.
    """
    whole = replicated(mesh)

    def like(leaf: Any, shape: Any, sharding: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        return sharding if leaf.shape == shape.shape else whole  # factored moments have shapes of their own

    opt_state = optax.tree.map_params(
        tx,
        like,
        jax.eval_shape(tx.init, shapes),
        shapes,
        shardings,
        transform_non_params=lambda _: whole,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    return State(whole, shardings, opt_state, whole)  # type: ignore[arg-type]  # a State of shardings
