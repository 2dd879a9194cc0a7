# SPDX-License-Identifier: Apache-2.0
"""Held entries keep every bit, whatever the optimizer does; free ones move as it says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.transforms.frozen import freeze
from jaxlm.transforms.isolation import isolate, nothing_held
from jaxlm.transforms.squares import squared_gradients

NUM_UPDATES = 100


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weights():
    """A nested dict with both zeros among its entries."""
    tree = {"embed": {"table": normal(0, 40, 8)}, "blocks": {"mlp": {"up": normal(1, 3, 8, 16)}}, "scale": normal(2, 8)}
    for leaf in jax.tree.leaves(tree):
        leaf.reshape(-1)[:6] = [-0.0, 0.0, -0.0, 0.0, -0.0, 0.0]
    return jax.tree.map(jnp.asarray, tree)


def random_mask(params, seed=5, share=0.5):
    draw = np.random.default_rng(seed)
    mask = jax.tree.map(lambda p: draw.random(p.shape) < share, params)
    for leaf in jax.tree.leaves(mask):
        leaf.reshape(-1)[0] = True  # a -0.0 is held in every leaf
    return jax.tree.map(jnp.asarray, mask)


def gradients(step, held, *, broken=False):
    """Of normal size, and not finite at one held entry of each leaf when broken."""

    def one(index, h):
        g = normal(1000 * index + step, *h.shape)
        if broken:
            g.reshape(-1)[np.flatnonzero(np.asarray(h).reshape(-1))[-1]] = np.nan
        return jnp.asarray(g)

    leaves, treedef = jax.tree.flatten(held)
    return jax.tree.unflatten(treedef, [one(i, h) for i, h in enumerate(leaves)])


def bits(x):
    return np.asarray(x).view(np.int32)


def moved(before, after, held):
    """How many held entries differ in any bit."""
    return sum(
        int(np.sum((bits(a) != bits(b)) & np.asarray(h)))
        for a, b, h in zip(*map(jax.tree.leaves, (before, after, held)), strict=True)
    )


def run(tx, params, held, *, num_updates=NUM_UPDATES, broken=True):
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(num_updates):
        updates, state = update(gradients(step, held, broken=broken), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "clip and adamw": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.1)),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "lion": lambda: optax.lion(1e-3, weight_decay=0.1),
    "a schedule": lambda: optax.adamw(optax.linear_schedule(1e-2, 0.0, 50)),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "finite inside": lambda: optax.apply_if_finite(optax.adamw(1e-2), 3),
}


@pytest.mark.parametrize("moments", ["selected", "dense"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_held_entries_keep_every_bit(name, moments):
    """Over decay, momentum, clips, and NaN among their gradients; both zeros are among the weights."""
    params = weights()
    held = random_mask(params)
    after, _ = run(isolate(OPTIMIZERS[name](), held, moments=moments), params, held)
    assert moved(params, after, held) == 0
    if not (moments == "dense" and "clip" in name):
        assert moved(params, after, jax.tree.map(jnp.logical_not, held)) > 0


def test_masking_gradients_holds_nothing():
    """The control: weight decay alone moves every entry that is not zero, and +0.0 in the update flips -0.0."""
    params = weights()
    held = random_mask(params)
    inner = optax.adamw(1e-2, weight_decay=0.1)

    def update(grads, state, params):
        return inner.update(jax.tree.map(lambda h, g: jnp.where(h, 0.0, g), held, grads), state, params)

    after, _ = run(optax.GradientTransformation(inner.init, update), params, held)
    zeros = sum(int(np.sum((np.asarray(p) == 0) & np.asarray(h))) for p, h in pairs(params, held))
    assert moved(params, after, held) >= sum(int(np.sum(h)) for h in jax.tree.leaves(held)) - zeros > 0


def pairs(*trees):
    return zip(*map(jax.tree.leaves, trees), strict=True)


def test_plus_zero_would_flip_a_sign():
    params = weights()
    held = random_mask(params)
    inner = isolate(optax.adamw(1e-2), held)

    def update(grads, state, params):
        updates, state = inner.update(grads, state, params)
        return jax.tree.map(lambda h, u: jnp.where(h, 0.0, u), held, updates), state

    after, _ = run(optax.GradientTransformation(inner.init, update), params, held, num_updates=1)
    assert moved(params, after, held) > 0


def test_free_entries_move_as_the_inner_optimizer_moves_them():
    """dense: inner sees the whole gradient. selected: a gradient and weights that are 0 where held."""
    params = weights()
    held = random_mask(params)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))

    def zero(tree):
        return jax.tree.map(lambda h, x: jnp.where(h, 0.0, x), held, tree)

    for moments, seen in (("dense", lambda tree: tree), ("selected", zero)):
        tx = isolate(inner, held, moments=moments)
        state, alone = tx.init(params), inner.init(params)
        for step in range(3):
            grads = gradients(step, held)
            updates, state = tx.update(grads, state, params)  # not compiled: fusions round in ways of their own
            expected, alone = inner.update(seen(grads), alone, seen(params))
            for u, e, h in pairs(updates, expected, held):
                np.testing.assert_array_equal(bits(u), np.where(h, bits(np.full(u.shape, -0.0, np.float32)), bits(e)))
        for a, b in pairs(state.inner, alone):
            np.testing.assert_array_equal(a, b)


def test_held_moments_stay_zero_and_are_forgotten_when_entries_change_sides():
    params = weights()
    held = random_mask(params)
    other = random_mask(params, seed=9)
    tx = isolate(optax.adam(1e-2), held)
    _, state = run(tx, params, held, num_updates=2)
    for moments in (state.inner[0].mu, state.inner[0].nu):
        for m, h in pairs(moments, held):
            assert np.all(np.asarray(m)[np.asarray(h)] == 0) and np.all(np.asarray(m)[~np.asarray(h)] != 0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, after = jax.jit(tx.update)(zeros, state, params, held=other)
    for m, h, o in pairs(after.inner[0].nu, held, other):
        h, o = np.asarray(h), np.asarray(o)
        assert np.all(np.asarray(m)[h != o] == 0) and np.all(np.asarray(m)[~h & ~o] != 0)
    assert all(np.array_equal(a, b) for a, b in pairs(after.held, other))


def test_a_mask_may_be_a_function_or_nothing():
    params = weights()
    state = isolate(optax.sgd(1.0), lambda p: jax.tree.map(lambda x: x == 0, p)).init(params)
    assert int(jnp.sum(state.held["scale"])) == 6
    grads = gradients(0, nothing_held(params))
    for mask in (None, nothing_held):
        tx = isolate(optax.sgd(1.0), mask)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert all(np.array_equal(u, -g) for u, g in pairs(updates, grads))


def test_optimizers_that_differ_in_init_share_one_update():
    inner = optax.adamw(1e-3)
    other = inner._replace(init=lambda params: inner.init(params))
    assert isolate(inner).update is isolate(other).update
    assert isolate(inner, moments="dense").update is not isolate(inner).update
    assert isolate(optax.adamw(1e-3)).update is not isolate(inner).update


@pytest.mark.parametrize(
    "tx",
    [
        optax.adafactor(1e-3),
        optax.lamb(1e-3),
        optax.lars(1e-3),
        optax.sm3(1e-3),
        optax.novograd(1e-3),
        optax.chain(optax.clip_by_block_rms(1.0), optax.adam(1e-3)),
        optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(1e-3)),
        optax.contrib.muon(1e-3),
        optax.contrib.schedule_free_adamw(1e-3),
        optax.contrib.prodigy(),
        optax.inject_hyperparams(optax.lamb)(learning_rate=1e-3),
        optax.partition({"a": optax.lamb(1e-3)}, "a"),
    ],
)
def test_optimizers_that_mix_entries_or_keep_a_second_point_are_refused(tx):
    with pytest.raises(ValueError, match="isolation needs an"):
        isolate(tx)


def test_masks_that_do_not_fit_are_refused_by_name():
    params = {"layers": {"mlp": {"up": jnp.ones((2, 3))}}, "scale": jnp.ones(2)}
    good = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), params)

    def start(mask):
        return isolate(optax.sgd(1.0), mask).init(params)

    with pytest.raises(ValueError, match="mask at layers/mlp/up is float32; give bool, True = held"):
        start(good | {"layers": {"mlp": {"up": jnp.ones((2, 3))}}})
    with pytest.raises(ValueError, match=r"mask at scale has shape \(3,\), the parameter \(2,\)"):
        start(good | {"scale": jnp.zeros(3, bool)})
    with pytest.raises(ValueError, match="mask has no leaf scale"):
        start({"layers": good["layers"]})
    with pytest.raises(ValueError, match="mask has a leaf bias"):
        start(good | {"bias": jnp.zeros(2, bool)})
    with pytest.raises(ValueError, match="moments is 'selected' or 'dense', got 'none'"):
        isolate(optax.sgd(1.0), moments="none")
    tx = isolate(optax.sgd(1.0), good)
    with pytest.raises(ValueError, match="mask at scale is float32"):
        tx.update(params, tx.init(params), params, held=good | {"scale": jnp.ones(2)})


def test_squares_are_summed_while_every_bit_stays():
    params = weights()
    held = nothing_held(params)
    after, state = run(squared_gradients(), params, held, num_updates=3, broken=False)
    assert moved(params, after, jax.tree.map(jnp.ones_like, held)) == 0
    expected = [sum(np.square(g) for g in three) for three in pairs(*(gradients(step, held) for step in range(3)))]
    assert int(state.num_updates) == 3
    for total, square in zip(jax.tree.leaves(state.total), expected, strict=True):
        np.testing.assert_allclose(total, square, rtol=1e-6)
    _, state = run(squared_gradients(), params, random_mask(params), num_updates=1)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.total))


def test_a_frozen_leaf_has_no_mask():
    params = weights()
    held = random_mask(params)
    tx = freeze(isolate(optax.adamw(1e-2), held), [("embed/.*", "frozen"), (".*", "trained")])
    after, _ = run(tx, params, held, num_updates=5)
    assert moved(params, after, held | {"embed": {"table": jnp.ones((40, 8), bool)}}) == 0
    assert sum(x.dtype == bool for x in jax.tree.leaves(tx.init(params))) == 2
