# SPDX-License-Identifier: Apache-2.0
"""Isolation under the train step: micro-batches, eight devices, the links of optax around it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.train.step import make_train_step
from jaxlm.transforms.evolving import evolving_isolation
from jaxlm.transforms.isolation import held_mask, isolate

KWARGS = {"fraction": 0.1, "warmup": 2, "refresh_every": 2, "decay": 0.5}


def run(tiny, tx, params, *, mesh=None, num_parts=1, num_updates=4):
    mesh = tiny.mesh() if mesh is None else mesh
    state, places = tiny.start(tx, mesh, params)
    step = make_train_step(tiny.phase(tx), mesh=mesh, shardings=places, num_parts=num_parts)
    seen = []
    for seed in range(num_updates):
        state, metrics = jax.block_until_ready(step(state, tiny.on_device(tiny.make_batch(seed))))
        seen.append(jax.tree.map(np.asarray, (state.params, held_mask(state.opt_state))))
    return seen, state, places, metrics


def flat(tree):
    return np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(tree)])


def bits(tree):
    return flat(tree).view(np.int32)


@pytest.mark.parametrize("num_parts", [1, 4])
def test_held_entries_keep_every_bit_under_the_steps_accumulation(tiny, params, num_parts):
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
    seen, _, _, metrics = run(tiny, evolving_isolation(inner, **KWARGS), params, num_parts=num_parts)
    for (before, _), (after, held) in itertools.pairwise(seen):
        assert np.array_equal(bits(before)[flat(held)], bits(after)[flat(held)])
    assert float(metrics["isolation/held"]) == pytest.approx(0.1, rel=1e-3) and flat(seen[0][1]).sum() == 0


def test_parts_and_devices_choose_the_same_sets(tiny, params):
    """Gradients agree to rounding, so do the sets: all but entries at the very cut."""
    one = run(tiny, evolving_isolation(optax.adamw(1e-3), **KWARGS), params)[0]
    for mesh, num_parts in (({"data": 2, "fsdp": 2, "tensor": 2}, 1), ({"data": 1}, 4)):
        tx = evolving_isolation(optax.adamw(1e-3), **KWARGS)
        other, state, places, _ = run(tiny, tx, params, mesh=tiny.mesh(**mesh), num_parts=num_parts)
        for (_, a), (_, b) in zip(one, other, strict=True):
            assert flat(a).sum() == flat(b).sum() and np.sum(flat(a) != flat(b)) <= 4
        marks, like = state.opt_state.marks, places.params
        assert all(
            m.sharding.is_equivalent_to(p, m.ndim) for m, p in zip(*map(jax.tree.leaves, (marks, like)), strict=True)
        )


def test_it_works_inside_the_links_of_optax(tiny, params):
    """chain, inject_hyperparams and apply_if_finite outside: held entries keep their bits, -0.0 as long as no update
    is skipped, because a skipped one is +0.0.
    """
    mask = jax.tree.map(lambda p: np.random.default_rng(p.size).random(p.shape) < 0.3, params)
    inside = {
        "inject_hyperparams": optax.inject_hyperparams(lambda rate: isolate(optax.adamw(rate), mask))(rate=1e-2),
        "apply_if_finite": optax.apply_if_finite(isolate(optax.adamw(1e-2), mask), 3),
        "evolving in a chain": optax.chain(
            optax.clip_by_global_norm(1.0), evolving_isolation(optax.adamw(1e-2), **KWARGS)
        ),
    }
    for name, tx in inside.items():
        seen, *_ = run(tiny, tx, params, num_updates=3)
        (before, _), (after, held) = seen[-2:]
        assert np.array_equal(bits(before)[flat(held)], bits(after)[flat(held)]), name
        assert np.mean(bits(before)[~flat(held)] != bits(after)[~flat(held)]) > 0.5, name


def test_the_set_changes_without_a_compilation(tiny, params):
    tx = evolving_isolation(optax.adamw(1e-3), **KWARGS)
    mesh = tiny.mesh()
    state, places = tiny.start(tx, mesh, params)
    step = make_train_step(tiny.phase(tx), mesh=mesh, shardings=places)
    batches = [tiny.on_device(tiny.make_batch(seed)) for seed in range(5)]
    state, _ = step(state, batches[0])
    with tiny.count_compiles() as seen:
        for batch in batches[1:]:
            state, _ = jax.block_until_ready(step(state, batch))
    assert seen == []


def test_a_bare_loop_needs_nothing_of_ours():
    params = {"w": jnp.linspace(-1.0, 1.0, 64), "b": jnp.full(4, -0.0)}
    tx = evolving_isolation(optax.adamw(1e-2), fraction=0.25, warmup=1, refresh_every=5)
    state, grads = tx.init(params), jax.grad(lambda p: jnp.sum(jnp.square(p["w"] * 3 - 1)) + jnp.sum(p["b"]) ** 3)
    update = jax.jit(tx.update)
    for _ in range(10):
        updates, state = update(grads(params), state, params)
        after = optax.apply_updates(params, updates)
        held = flat(held_mask(state))
        assert held.sum() == 17 and np.array_equal(bits(params)[held], bits(after)[held])
        params = after
