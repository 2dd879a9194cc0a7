# SPDX-License-Identifier: Apache-2.0
"""The optimizer: the schedule's shape, what decays, and that it is AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.train.optimizer import learning_rate, make_optimizer
from jaxlm.train.options import AdamW

PARAMS = {
    "embed": {"table": jnp.ones((4, 2))},
    "blocks": {"mlp": {"up": {"kernel": jnp.full((2, 3), -2.0), "bias": jnp.ones(3)}}, "norm": {"scale": jnp.ones(2)}},
}


def rates(**numbers):
    steps = numbers.pop("steps", 100)
    rate = learning_rate(AdamW(**{"learning_rate": 2.0, "warmup": 0.1, "final": 0.1} | numbers), steps)
    return np.array([rate(step) for step in range(steps)])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_every_schedule_warms_up_to_its_peak(schedule):
    found = rates(schedule=schedule)
    np.testing.assert_allclose(found[:10], 2.0 * np.arange(1, 11) / 10)
    assert found.max() == pytest.approx(2.0) and (np.diff(found[10:]) <= 1e-12).all() and found.min() > 0


def test_the_schedules_end_where_they_should():
    assert rates(schedule="constant")[-1] == 2.0
    for schedule in ("linear", "cosine", "wsd"):
        assert rates(schedule=schedule)[-1] == pytest.approx(0.2, abs=0.1)
        assert learning_rate(AdamW(schedule=schedule, learning_rate=2.0), 100)(500) == pytest.approx(0.2)


def test_wsd_is_stable_until_its_decay():
    found = rates(schedule="wsd", decay=0.2)
    assert (found[10:81] == 2.0).all() and (np.diff(found[80:]) < 0).all()


def test_cosine_is_half_way_down_in_the_middle():
    assert rates(schedule="cosine", warmup=0.0, final=0.0)[50] == pytest.approx(1.0)


def test_no_warm_up_begins_at_the_peak():
    assert rates(schedule="linear", warmup=0.0)[0] == 2.0


def test_the_rate_reported_on_the_host_is_the_rate_of_the_update():
    options = AdamW(learning_rate=0.5, schedule="cosine", clip_norm=None)
    tx = make_optimizer(options, 10)
    params, rate = {"kernel": jnp.zeros(2)}, learning_rate(options, 10)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(10):
        updates, state = update({"kernel": jnp.ones(2)}, state, params)
        told = optax.tree.get_all_with_path(state, "learning_rate")[0][1]
        assert float(told) == pytest.approx(rate(step), rel=1e-6)
        # The moments of a gradient that never changes give steps of the rate itself.
        np.testing.assert_allclose(updates["kernel"], -rate(step), rtol=1e-5)


def test_it_is_optax_adamw_with_a_clip():
    options = AdamW(learning_rate=0.1, schedule="linear", weight_decay=0.3, clip_norm=0.5, decayed=(".*",))
    rate = learning_rate(options, 20, xp=jnp)
    ours = make_optimizer(options, 20)
    theirs = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.3))

    def walk(tx):
        def step(carry, key):
            params, state = carry
            grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), jax.random.split(jax.random.key(0), 20))[0][0])

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), walk(ours)(PARAMS), walk(theirs)(PARAMS))


def test_only_the_matching_paths_decay():
    tx = make_optimizer(AdamW(weight_decay=0.5, learning_rate=1.0, schedule="constant", warmup=0.0), 10)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(PARAMS), PARAMS)
    moved = {
        jax.tree_util.keystr(p, simple=True, separator="/") for p, u in jax.tree.leaves_with_path(updates) if u.any()
    }
    assert moved == {"embed/table", "blocks/mlp/up/kernel"}
    np.testing.assert_allclose(updates["blocks"]["mlp"]["up"]["kernel"], 1.0)


def test_decay_that_reaches_nothing_is_refused():
    tx = make_optimizer(AdamW(weight_decay=0.1, decayed=("kernel",)), 10)
    with pytest.raises(ValueError, match=r"matches none of the trained parameters .*'blocks/mlp/up/bias'"):
        tx.init(PARAMS)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"warmup": 3.0}, r"warmup is a fraction in \[0, 1\], got 3.0"),
        ({"learning_rate": -1.0}, "learning_rate >= 0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, or None"),
        ({"schedule": "cosin"}, "constant, linear, cosine or wsd, got 'cosin'"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(AdamW(**numbers), 10)
