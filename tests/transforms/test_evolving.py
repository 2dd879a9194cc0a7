# SPDX-License-Identifier: Apache-2.0
"""Evolving isolation: what is held, when it changes, and that nothing else does."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.transforms.evolving import evolving_isolation
from jaxlm.transforms.frozen import freeze
from jaxlm.transforms.isolation import held_mask, isolation_metrics, with_fresh_inner
from jaxlm.weights import select
from jaxlm.weights.names import named_leaves
from jaxlm.weights.select import is_stacked, largest

COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **kwargs: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Most of the time of these tests would go into machine code that runs for milliseconds.

    Also one candidate a pass instead of fifteen: `tests/weights/test_select.py` tests those.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    bits, select.BITS = select.BITS, 1
    yield
    select.BITS = bits
    jax.config.update("jax_disable_most_optimizations", False)


def draw(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weights():
    """Two stacked leaves and two plain ones, both zeros among the entries."""
    tree = {"blocks": {"down": draw(0, (3, 16, 8)), "up": draw(1, (3, 8, 16))}, "embed": draw(2, (24, 8))}
    tree["scale"] = draw(3, (8,))
    for leaf in jax.tree.leaves(tree):
        leaf.reshape(-1)[:4] = [-0.0, 0.0, -0.0, 0.0]
    return jax.tree.map(jnp.asarray, tree)


D = 2 * 3 * 16 * 8 + 24 * 8 + 8
USUAL = {"fraction": 0.2, "warmup": 2, "refresh_every": 2, "decay": 0.5}  # tests that agree share a compilation


def gradients(step, params):
    """Heavy-tailed over entries, different at every step."""
    leaves, treedef = jax.tree.flatten(params)
    sizes = [np.exp(2 * draw(50 + i, leaf.shape)) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, [jnp.asarray(draw(1000 * i + step, s.shape) * s) for i, s in enumerate(sizes)])


@functools.cache
def adamw(**kwargs):
    return optax.adamw(1e-2, weight_decay=0.1, **kwargs)


def run(tx, num_updates, *, params=None, gradients=gradients, change=lambda step, g, state: g, **extra):
    """Parameters, states after each update, parameters after each."""
    params = weights() if params is None else params
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for step in range(1, num_updates + 1):
        updates, state = update(change(step, gradients(step, params), state), state, params, **extra)
        params = optax.apply_updates(params, updates)
        seen.append((params, state))
    return seen


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def flat(tree):
    return np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(tree)])


def lifted(step, params):
    """Gradients whose squares are far from 0, each layer's by as much as its name is long."""
    return jax.tree.map_with_path(
        lambda path, g: g + jnp.where(g < 0, -0.2, 0.2) * len(str(path)), gradients(step, params)
    )


def averages(num_updates, decay, params, gradients=gradients):
    s = jax.tree.map(lambda p: np.zeros(p.shape, np.float64), params)
    for step in range(1, num_updates + 1):
        s = jax.tree.map(lambda s, g: decay * s + (1 - decay) * np.square(np.float64(g)), s, gradients(step, params))
    return s


NORMALIZE = {
    "mean": lambda s: s / s.mean(),
    "max": lambda s: s / s.max(),
    "minmax": lambda s: (s - s.min()) / (s.max() - s.min()),
    "zscore": lambda s: (s - s.mean()) / s.std(),
    "tanh_z": lambda s: np.abs(np.tanh((s - s.mean()) / s.std())),
    "none": lambda s: s,
}


def by_slice(tree, function):
    """A function of one layer, on every slice of the stacked leaves."""
    return {
        path: np.stack([function(x) for x in leaf]) if is_stacked(path) else function(leaf)
        for path, leaf in named_leaves(tree).items()
    }


@pytest.mark.parametrize("normalizer", NORMALIZE)
def test_the_held_set_is_the_top_share_of_the_normalized_average(normalizer):
    """In float64, up to entries within 1e-5 of the cut."""
    tx = evolving_isolation(adamw(), fraction=0.1, warmup=4, refresh_every=3, decay=0.8, normalizer=normalizer)
    seen = run(tx, 8, gradients=lifted)
    for t, last in ((1, 0), (3, 0), (4, 4), (6, 4), (7, 7), (8, 7)):
        held = flat(held_mask(seen[t - 1][1]))
        if last == 0:
            assert held.sum() == 0
            continue
        r = flat(by_slice(averages(last, 0.8, weights(), lifted), NORMALIZE[normalizer]))
        k = int(0.1 * D)
        cut = np.sort(r)[-k]
        assert held.sum() == k
        near = 1e-5 * abs(cut)
        assert np.all(held[r > cut + near]) and not np.any(held[r < cut - near])


@pytest.mark.parametrize("moments", ["dense", "selected"])
def test_held_entries_keep_every_bit_while_they_are_held(moments):
    """100 updates with decay, momentum and a clip; one held entry's gradient is NaN; the set changes every 10."""
    inner = optax.chain(optax.clip(5.0), adamw())
    kwargs = {"warmup": 10, "refresh_every": 10, "decay": 0.8, "moments": moments}
    tx = evolving_isolation(inner, fraction=0.3, **kwargs)

    def poison(step, grads, state):
        if step % 10 != 5 or step < 10:
            return grads
        held = np.asarray(held_mask(state)["embed"])
        broken = np.array(grads["embed"])
        broken[tuple(np.argwhere(held)[0])] = np.nan
        return grads | {"embed": jnp.asarray(broken)}

    before, changed, was = weights(), 0, None
    for params, state in run(tx, 100, change=poison):
        held = flat(held_mask(state))
        assert np.array_equal(flat(before).view(np.int32)[held], flat(params).view(np.int32)[held])
        moved = flat(before).view(np.int32)[~held] != flat(params).view(np.int32)[~held]
        assert moved.mean() > 0.95 or int(state.step) == 1
        changed += was is not None and not np.array_equal(was, held)
        before, was = params, held
    assert changed == 10 and int(state.skipped) == 9


def test_masking_gradients_instead_fails_the_same_assertion():
    params = weights()
    held = largest(jax.tree.map(jnp.square, gradients(1, params)), 0.3)
    inner = adamw()

    def update(grads, state, params):
        return inner.update(jax.tree.map(lambda h, g: jnp.where(h, 0.0, g), held, grads), state, params)

    after = run(optax.GradientTransformation(inner.init, update), 3)[-1][0]
    mask, moved = flat(held), flat(params).view(np.int32) != flat(after).view(np.int32)
    assert moved[mask & (flat(params) != 0)].all()


@pytest.mark.parametrize("kwargs", [{"fraction": 0.0}, {"fraction": 0.3, "apply": False}])
def test_holding_nothing_reproduces_the_unwrapped_run(kwargs):
    inner = optax.chain(optax.clip_by_global_norm(1.0), adamw())
    ours = run(evolving_isolation(inner, warmup=2, refresh_every=2, **kwargs), 6)[-1]
    alone = run(inner, 6)[-1]
    assert bits(ours[0]) == bits(alone[0]) and bits(ours[1].inner) == bits(alone[1])
    assert float(isolation_metrics(ours[1])["isolation/held"]) == pytest.approx(kwargs["fraction"], abs=1 / D)


def test_free_entries_and_moments_are_those_of_the_inner_optimizer():
    """Fed the same gradients, not compiled: fusions round in ways of their own."""
    params, inner = weights(), optax.chain(optax.clip_by_global_norm(1.0), adamw())
    tx = evolving_isolation(inner, fraction=0.3, warmup=1, refresh_every=2)
    state, alone = tx.init(params), inner.init(params)
    for step in range(2):
        grads = gradients(step, params)
        updates, state = tx.update(grads, state, params)
        expected, alone = inner.update(grads, alone, params)
        held = flat(held_mask(state))
        assert np.array_equal(flat(updates)[~held], flat(expected)[~held])
        assert np.all(np.signbit(flat(updates)[held])) and np.all(flat(updates)[held] == 0)
        assert bits(state.inner) == bits(alone)


def quadratic(refresh_every, decay, num_updates=700, change=300):
    """Held sets after each update; 50 of 1000 entries are steep, others from the change on."""

    def grads_at(step, params):
        steep = (jnp.arange(1000) // 50) == (0 if step <= change else 7)
        target = -1.0 if step % 2 else 1.0
        return {"w": jnp.where(steep, 10.0, 1.0) * (params["w"] - target)}

    tx = evolving_isolation(
        optax.adamw(1e-3), fraction=0.05, warmup=1, refresh_every=refresh_every, decay=decay, normalizer="mean"
    )
    params = {"w": jnp.zeros(1000)}
    return [np.asarray(held_mask(state)["w"]) for _, state in run(tx, num_updates, params=params, gradients=grads_at)]


@pytest.mark.parametrize("decay", [0.95, 0.99])
def test_a_change_of_what_matters_is_followed_within_one_refresh_and_the_averages_memory(decay):
    lag = math.ceil(math.log(2) / -math.log(decay))
    held = quadratic(10, decay, num_updates=420)
    new = np.arange(1000) // 50 == 7
    assert np.array_equal(held[299], np.arange(1000) // 50 == 0)
    first = next(t for t in range(301, 421) if t >= 300 + lag and (t - 1) % 10 == 0)
    assert all(np.array_equal(x, new) for x in held[first - 1 :])
    assert first <= 300 + 10 + 1 / (1 - decay)


def test_a_static_set_never_recovers():
    held = quadratic(None, 0.95, num_updates=420)
    assert held[0].sum() == 50 and all(np.array_equal(x, held[0]) for x in held)
    assert not np.any(held[-1] & (np.arange(1000) // 50 == 7))


@pytest.mark.parametrize("normalizer", ["max", "mean"])
def test_blocks_choose_the_same_set_stacked_or_apart(normalizer):
    params = weights()
    apart = {"embed": params["embed"], "scale": params["scale"]}
    for name, leaf in params["blocks"].items():
        apart |= {f"{name}{i}": leaf[i] for i in range(3)}

    def split(tree):
        new = {"embed": tree["embed"], "scale": tree["scale"]}
        return new | {f"{name}{i}": leaf[i] for name, leaf in tree["blocks"].items() for i in range(3)}

    kwargs = USUAL | {"normalizer": normalizer}
    stacked = held_mask(run(evolving_isolation(adamw(), **kwargs), 4)[-1][1])
    tx = evolving_isolation(adamw(), **kwargs)
    alone = held_mask(run(tx, 4, params=apart, gradients=lambda step, _: split(gradients(step, params)))[-1][1])
    assert np.array_equal(flat(split(stacked)), flat(alone))


def test_the_scale_of_one_slice_is_no_advantage():
    """Under statistics of the whole stack it would be; `normalizer='none'` shows that the test can tell."""

    def louder(step, params):
        grads = gradients(step, params)
        up = grads["blocks"]["up"].at[2].multiply(2.0**5)
        return grads | {"blocks": grads["blocks"] | {"up": up}}

    for normalizer, equal in (("mean", True), ("none", False)):
        tx = evolving_isolation(adamw(), **USUAL, normalizer=normalizer)
        masks = [flat(held_mask(run(tx, 4, gradients=g)[-1][1])) for g in (gradients, louder)]
        assert np.array_equal(*masks) == equal


def test_a_block_is_one_layer_across_its_leaves():
    tx = evolving_isolation(adamw(), **USUAL, layer="block")
    held = flat(held_mask(run(tx, 2)[-1][1]))
    s = averages(2, 0.5, weights())
    means = [np.concatenate([s["blocks"][n][i].reshape(-1) for n in ("down", "up")]).mean() for i in range(3)]
    shape = np.array(means).reshape(3, 1, 1)
    r = {"blocks": {name: leaf / shape for name, leaf in s["blocks"].items()}}
    r = flat(r | {name: s[name] / s[name].mean() for name in ("embed", "scale")})
    assert held.sum() == int(0.2 * D) and r[held].min() >= r[~held].max() * (1 - 1e-5)


def test_a_scaled_stream_of_gradients_changes_no_set():
    tx = evolving_isolation(adamw(), **USUAL)

    def scaled(step, params):
        return jax.tree.map(lambda g: g * 2.0**-20, gradients(step, params))

    a, b = (run(tx, 4, gradients=g)[-1][1] for g in (gradients, scaled))
    assert bits(a.marks) == bits(b.marks)


def test_adams_second_moment_is_the_average_when_decays_agree():
    kwargs = {"fraction": 0.1, "warmup": 3, "refresh_every": 2}
    own = run(evolving_isolation(adamw(b2=0.9), decay=0.9, **kwargs), 7)[-1][1]
    adam = run(evolving_isolation(adamw(b2=0.9), importance_source="adam_nu", **kwargs), 7)[-1][1]
    assert adam.importance == ()
    for s, nu in zip(jax.tree.leaves(own.importance), jax.tree.leaves(adam.inner[0].nu), strict=True):
        np.testing.assert_allclose(s, nu, rtol=1e-6)
    assert bits(own.marks) == bits(adam.marks)


def test_a_bfloat16_average_does_not_stall():
    """5,000 updates of decay 0.99 towards a gradient of 1: plain rounding would stop far below."""
    params = {"w": jnp.zeros((64, 64))}
    ones = jax.tree.map(jnp.ones_like, params)
    tx = evolving_isolation(optax.sgd(0.0), importance_dtype="bfloat16", warmup=10**6, decay=0.99)

    @jax.jit
    def many(state):
        return jax.lax.fori_loop(0, 300, lambda _, s: tx.update(ones, s, params)[1], state)

    state = many(tx.init(params))
    s = np.asarray(state.importance["w"].astype(jnp.float32))
    assert state.importance["w"].dtype == jnp.bfloat16
    assert abs(s.mean() - (1 - 0.99**300)) < 2e-3 and 0 < s.std() < 0.05
    plain = 0.0
    for _ in range(300):
        plain = float(jnp.asarray(0.99 * plain + 0.01, jnp.bfloat16))
    assert plain < 0.95 * (1 - 0.99**300)


def test_what_is_not_finite_leaves_importance_alone_and_is_counted():
    def broken(step, params):
        grads = gradients(step, params)
        return grads | {"scale": grads["scale"].at[:3].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))}

    state = run(evolving_isolation(adamw(), **USUAL), 2, gradients=broken)[-1][1]
    assert np.all(np.asarray(state.importance["scale"])[:3] == 0) and int(state.skipped) == 6
    assert np.all(np.isfinite(flat(state.importance))) and np.all(np.asarray(state.importance["scale"])[4:] > 0)


def test_entries_never_seen_are_never_held():
    def sparse(step, params):
        return jax.tree.map(lambda g: g.at[..., 2:].set(0.0), gradients(step, params))

    for normalizer in ("mean", "zscore"):
        tx = evolving_isolation(adamw(), **USUAL | {"fraction": 0.5}, normalizer=normalizer)
        state = run(tx, 2, gradients=sparse)[-1][1]
        held, known = flat(held_mask(state)), flat(sparse(1, weights())) != 0
        assert np.array_equal(held, known) if normalizer == "mean" else held.any() and not np.any(held & ~known)


def test_each_task_has_an_average_and_the_largest_share_counts():
    """Task 0 moves only `down`, task 1 only `up`; a single average would forget the first."""
    tx = evolving_isolation(adamw(), fraction=0.3, warmup=60, decay=0.5, tasks=2, refresh_every=60)
    params = weights()
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(1, 61):
        task = 0 if step <= 30 else 1
        grads = gradients(step, params)
        name = ("down", "up")[task]
        grads = jax.tree.map(jnp.zeros_like, grads) | {
            "blocks": {n: g * (n == name) for n, g in grads["blocks"].items()}
        }
        _, state = update(grads, state, params, task=jnp.int32(task))
    held = held_mask(state)["blocks"]
    assert np.sum(held["down"]) > 50 and np.sum(held["up"]) > 50
    assert np.all(np.asarray(state.importance[0]["blocks"]["up"]) == 0)
    with pytest.raises(ValueError, match="tasks=2: give update the index of the gradient's task, task="):
        tx.update(params, state, params)


def test_held_entries_leave_only_below_the_share_of_release():
    kwargs = {"fraction": 0.1, "warmup": 1, "refresh_every": 1, "decay": 0.0}
    seen, was = run(evolving_isolation(adamw(), release_fraction=0.4, **kwargs), 5), np.zeros(D, bool)
    for t, (_, state) in enumerate(seen, 1):
        r = flat(by_slice(jax.tree.map(np.square, gradients(t, weights())), NORMALIZE["mean"]))
        narrow, wide = (r >= np.sort(r)[-int(share * D)] for share in (0.1, 0.4))
        was = narrow | (was & wide)
        assert np.array_equal(was, flat(held_mask(state)))


@pytest.mark.parametrize("control", ["bottom", "random"])
def test_controls_hold_as_many(control):
    tx = evolving_isolation(adamw(), **USUAL, select=control, seed=3)
    seen, best = run(tx, 6)[1::2], run(evolving_isolation(adamw(), **USUAL), 6)[1::2]
    masks = [flat(held_mask(state)) for _, state in seen]
    assert [mask.sum() for mask in masks] == 3 * [int(0.2 * D)]
    common = [(a & flat(held_mask(state))).sum() for a, (_, state) in zip(masks, best, strict=True)]
    assert max(common) == 0 if control == "bottom" else 0 < sum(common) < 3 * 0.3 * 0.2 * D
    assert control == "bottom" or not np.array_equal(masks[0], masks[1])


def test_drift_is_counted_exactly():
    tx = evolving_isolation(adamw(), **USUAL)
    masks, shares = [np.zeros(D, bool)], None
    for step, (_, state) in enumerate(run(tx, 8), 1):
        metrics = {name.removeprefix("isolation/"): float(x) for name, x in isolation_metrics(state).items()}
        if step == 1:
            assert metrics["choices"] == metrics["held"] == metrics["overlap_first"] == 0
        if step % 2:
            continue
        held = flat(held_mask(state))
        was, k = masks[-1], held.sum()
        masks.append(held)
        left = (was & ~held).sum() / k
        expected = {
            "held": k / D, "choices": step // 2, "chance": (k / D) / (2 - k / D), "left": left, "skipped": 0,
            "overlap_first": (held & masks[1]).sum() / (held | masks[1]).sum(),
            "overlap_previous": (held & was).sum() / (held | was).sum(),
            "entered": (held & ~was).sum() / k, "stay": min(1 / max(left, 1e-9), step // 2),
        }  # fmt: skip
        shares = {path: float(np.sum(leaf)) / k for path, leaf in named_leaves(held_mask(state)).items()}
        expected |= {"held/down": shares["blocks/down"], "held/up": shares["blocks/up"]}
        expected |= {"held/embedding": shares["embed"], "held/other": shares["scale"]}
        assert metrics == pytest.approx(expected, rel=1e-5)
    counts = np.asarray(state.drift.counts)[..., 1]
    assert np.array_equal(counts[1], [np.sum(x) for x in held_mask(state)["blocks"]["up"]])
    assert np.array_equal(counts[2], [np.sum(held_mask(state)["embed"]), 0, 0])


@pytest.mark.parametrize("source", ["gradient", "adam_nu"])
def test_a_model_of_more_entries_than_an_int32_counts_is_traced(source):
    tx = evolving_isolation(optax.adamw(1e-3), fraction=0.3, refresh_every=1, warmup=0, importance_source=source)
    params = {name: {"kernel": jax.ShapeDtypeStruct((40_000, 40_000), jnp.float32)} for name in ("up", "down")}
    state = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(jax.eval_shape(tx.update, params, state, params)[1]) == jax.tree.structure(state)


def test_excluded_leaves_are_never_held_and_frozen_ones_have_no_marks():
    kwargs = {"fraction": 0.25, "warmup": 1, "normalizer": "none"}
    state = run(evolving_isolation(adamw(), exclude=("embed", "scale"), **kwargs), 1)[-1][1]
    held = held_mask(state)
    assert np.sum(held["embed"]) == np.sum(held["scale"]) == 0 and np.sum(flat(held)) == 2 * 3 * 16 * 8 // 4
    tx = freeze(evolving_isolation(adamw(), **kwargs), [("embed", "frozen"), (".*", "trained")])
    after, state = run(tx, 2)[-1]
    assert bits(after["embed"]) == bits(weights()["embed"])
    assert flat(held_mask(state)).size == D - 24 * 8


def test_a_change_of_the_set_never_recompiles_and_resuming_equals_not_stopping():
    tx = evolving_isolation(adamw(), fraction=0.2, warmup=2, refresh_every=2, importance_dtype="bfloat16")
    params = weights()
    given = [gradients(step, params) for step in range(9)]
    state, update = tx.init(params), jax.jit(tx.update)
    _, state = update(given[0], state, params)
    saved, before = None, len(COMPILED)
    for step in range(1, 9):
        _, state = update(given[step], state, params)
        if step == 4:
            saved = jax.tree.map(np.asarray, state)
    assert len(COMPILED) == before
    for step in range(5, 9):
        _, saved = update(given[step], saved, params)
    assert bits(saved) == bits(state)


def test_a_stage_may_start_a_fresh_optimizer_and_keep_what_is_held():
    tx = optax.chain(evolving_isolation(adamw(), fraction=0.2, warmup=1))
    old = run(tx, 3)[-1][1]
    new = with_fresh_inner(old, tx.init(weights()))
    assert bits(held_mask(new)) == bits(held_mask(old)) and int(new[0].step) == 3
    assert int(new[0].inner[0].count) == 0 and bits(new[0].importance) == bits(old[0].importance)
    plain = adamw().init(weights())
    assert with_fresh_inner(plain, plain) is not None and isolation_metrics(plain) == {}


def test_equal_arguments_share_one_update():
    inner = adamw()
    other = inner._replace(init=lambda params: inner.init(params))
    assert evolving_isolation(inner, decay=0.9).update is evolving_isolation(other, decay=0.9).update
    assert evolving_isolation(inner, decay=0.9).update is not evolving_isolation(inner, decay=0.8).update


REFUSED = {
    "fraction must be in [0, 1), got 1: holding every entry leaves nothing to train": {"fraction": 1},
    "refresh_every must be at least 1 update, or None for one choice, got 0": {"refresh_every": 0},
    "decay must be in [0, 1), got 1": {"decay": 1},
    "warmup must be at least 0 updates, got -1": {"warmup": -1},
    "normalizer is one of mean, max, minmax, zscore, tanh_z, none, got 'z_score'; did you mean 'zscore'?": {
        "normalizer": "z_score"
    },
    "select is one of top, bottom, random, got 'tops'; did you mean 'top'?": {"select": "tops"},
    "a bfloat16 average with decay 0.999 stalls; use float32": {"decay": 0.999, "importance_dtype": "bfloat16"},
    "release_fraction must be in [fraction, 1) = [0.2, 1), got 0.1": {"fraction": 0.2, "release_fraction": 0.1},
    "tasks must be a number of tasks, or None for one average, got 0": {"tasks": 0},
    "adam_nu is one average over all tasks": {"tasks": 2, "importance_source": "adam_nu"},
    "moments='selected' zeroes the second moment": {"moments": "selected", "importance_source": "adam_nu"},
    "exclude is a tuple of patterns, got 'embed'": {"exclude": "embed"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_arguments_that_make_no_sense_are_refused(message):
    with pytest.raises(ValueError) as error:
        evolving_isolation(adamw(), **REFUSED[message])
    assert message in str(error.value)


def test_parameters_that_do_not_fit_are_refused():
    params = weights()
    for kwargs, message in (
        ({"stacked": ("layers/.*",)}, "stacked pattern 'layers/.*' matches no path"),
        ({"exclude": ("head",)}, "exclude pattern 'head' matches no path"),
        ({"stacked": ("blocks/.*|embed",), "layer": "block"}, "but blocks/down has 3 and embed 24"),
    ):
        with pytest.raises(ValueError, match=message):
            evolving_isolation(adamw(), **kwargs).init(params)
    for inner, number in ((optax.sgd(0.1), 0), (optax.chain(adamw(), adamw()), 2)):
        with pytest.raises(ValueError, match=f"found {number} second-moment trees; use importance_source='gradient'"):
            evolving_isolation(inner, importance_source="adam_nu").init(params)
    with pytest.raises(ValueError, match="parameter embed is bfloat16: evolving isolation needs float32 masters"):
        evolving_isolation(adamw()).init(params | {"embed": params["embed"].astype(jnp.bfloat16)})
    with pytest.raises(ValueError, match="isolation needs an element-wise optimizer"):
        evolving_isolation(optax.lamb(1e-3))
