# SPDX-License-Identifier: Apache-2.0
"""Frozen leaves: no state, and every bit stays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.transforms.frozen import freeze

PARAMS = {"head": {"kernel": jnp.ones((3, 2))}, "embed": {"table": jnp.array([-0.0, 0.0, 1.5, -7.0])}}
RULES = [("head/.*", "trained"), (".*", "frozen")]


def test_frozen_leaves_have_no_optimizer_state():
    state = freeze(optax.adam(1e-3), RULES).init(PARAMS)
    assert [x.shape for x in jax.tree.leaves(state) if x.ndim] == [(3, 2), (3, 2)]


def test_frozen_leaves_keep_every_bit_and_the_others_move_as_the_inner_optimizer_moves_them():
    """Under decay and momentum, with a gradient that is NaN where it is frozen."""
    inner = optax.adamw(1e-2, weight_decay=0.5)
    tx, alone = freeze(inner, RULES), {"head": PARAMS["head"]}
    params, state, alone_state = PARAMS, tx.init(PARAMS), inner.init(alone)
    grads = {"head": {"kernel": jnp.full((3, 2), 0.3)}, "embed": {"table": jnp.full(4, jnp.nan)}}
    for _ in range(5):
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, alone_state = jax.jit(inner.update)({"head": grads["head"]}, alone_state, alone)
        alone = optax.apply_updates(alone, updates)
    assert np.asarray(params["embed"]["table"]).tobytes() == np.asarray(PARAMS["embed"]["table"]).tobytes()
    np.testing.assert_array_equal(params["head"]["kernel"], alone["head"]["kernel"])


def test_extra_arguments_reach_the_inner_optimizer():
    def scale(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda u: factor * u, updates), state

    tx = freeze(optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), scale), RULES)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, factor=3.0)
    np.testing.assert_array_equal(updates["head"]["kernel"], 3.0)
    np.testing.assert_array_equal(updates["embed"]["table"], 0.0)


def test_rules_must_cover_all_and_all_be_used():
    with pytest.raises(ValueError, match=r"no rule matches parameter 'embed/table'"):
        freeze(optax.sgd(1.0), [("head/.*", "trained")]).init(PARAMS)
    with pytest.raises(ValueError, match=r"match no parameter first: \['blocks/.*'\]"):
        freeze(optax.sgd(1.0), [("blocks/.*", "frozen"), (".*", "trained")]).init(PARAMS)
    with pytest.raises(ValueError, match=r"'trained' or 'frozen', got \['held'\]"):
        freeze(optax.sgd(1.0), [(".*", "held")])
