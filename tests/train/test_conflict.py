# SPDX-License-Identifier: Apache-2.0
"""Laws of gradient conflict: known angles, no dependence on batches or devices, honesty about noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.losses.term import Term
from jaxlm.train.conflict import gradient_conflict, summed_gradient

PARAMS = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}


def linear_gradient(params, batch):
    """Of sum over rows of <row, params>: the rows themselves, summed."""
    return {"a": batch["a"].sum(0), "b": batch["b"].sum(0)}, len(batch["a"])


def task(a, b=((0, 0), (0, 0)), *, num=32, noise=0.0, seed=0):
    draw = np.random.default_rng(seed)
    rows = [np.asarray(x) + noise * draw.normal(size=(num, *np.shape(x))) for x in (a, b)]
    return [{"a": rows[0].astype(np.float32), "b": rows[1].astype(np.float32)}]


def off(cosines):
    return cosines.cos[0, 1]


def test_one_loss_opposite_losses_and_orthogonal_ones_have_the_cosines_one_minus_one_and_zero():
    one = task((1, 2, 3), ((4, 5), (6, 7)), noise=0.1)
    assert off(gradient_conflict(linear_gradient, PARAMS, {"x": one, "y": one}).whole) == pytest.approx(1, abs=1e-6)
    other = [jax.tree.map(lambda x: -x, one[0])]
    found = gradient_conflict(linear_gradient, PARAMS, {"x": one, "y": other})
    assert off(found.whole) == pytest.approx(-1, abs=1e-6)
    assert found.whole.conflict == found.whole.negative == 1 and found.whole.mean_cos == off(found.whole)
    tasks = {"x": task((1, 0, 0)), "y": task((0, 1, 0)), "z": task((0, 0, 0), ((1, 0), (0, 0)))}
    found = gradient_conflict(linear_gradient, PARAMS, tasks)
    np.testing.assert_allclose(found.whole.cos, np.eye(3), atol=1e-6)
    assert found.tasks == ("x", "y", "z") and found.whole.conflict == 0
    np.testing.assert_allclose(found.norms, 1, rtol=1e-6)


def test_held_and_free_entries_have_cosines_of_their_own():
    tasks = {"x": task((1, 1, 0), ((1, 0), (0, 0))), "y": task((1, -1, 0), ((1, 0), (0, 5)))}
    mask = {"a": np.array([True, False, False]), "b": np.zeros((2, 2), bool)}
    found = gradient_conflict(linear_gradient, PARAMS, tasks, mask=mask)
    assert off(found.held) == pytest.approx(1)
    assert off(found.free) == pytest.approx(0, abs=1e-6)
    assert off(found.whole) == pytest.approx(1 / np.sqrt(3 * 28))
    assert off(gradient_conflict(linear_gradient, PARAMS, tasks).whole) == pytest.approx(off(found.whole), abs=1e-7)


def test_the_cosine_over_no_entries_is_undefined():
    tasks = {"x": task((1, 1, 0)), "y": task((1, -1, 0))}
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, bool), PARAMS)
    found = gradient_conflict(linear_gradient, PARAMS, tasks, mask=nothing)
    assert np.isnan(found.held.cos).all() and np.isnan(found.held.mean_cos) and np.isnan(found.held.conflict)
    np.testing.assert_allclose(found.free.cos, found.whole.cos)


def test_noise_is_told_from_orthogonality():
    """Two tasks with one direction under noise as large as it: the cosine is half, corrected it is 1."""
    wide = {"a": jnp.zeros(3), "b": jnp.zeros((30, 30))}
    x, y = (task((1, 0, 0), np.zeros((30, 30)), num=512, noise=0.75, seed=seed) for seed in (0, 1))
    found = gradient_conflict(linear_gradient, wide, {"x": x, "y": y}).whole
    assert off(found) < 0.6 and found.corrected[0, 1] == pytest.approx(1, abs=0.1)
    assert found.negative == found.conflict == 0 and np.all(found.reliability < 0.6)
    turned = [{"a": y[0]["a"] * np.float32([-1, 1, 1]), "b": y[0]["b"]}]
    found = gradient_conflict(linear_gradient, wide, {"x": x, "y": turned}).whole
    assert found.corrected[0, 1] == pytest.approx(-1, abs=0.1) and found.conflict == 1


def test_noise_alone_is_no_conflict():
    pure = {name: task((0, 0, 0), noise=1.0, seed=seed) for seed, name in enumerate("xyzuvw")}
    found = gradient_conflict(linear_gradient, PARAMS, pure).whole
    assert found.negative > 0.2 > found.conflict, "noise has negative cosines, but few that count"
    lost = found.reliability <= 0.05
    assert lost.any() and np.isnan(found.corrected[lost]).all() and np.isnan(found.corrected[:, lost]).all()


def test_the_interval_covers_the_true_cosine():
    """Gradients of known angle under noise that hardly shortens them."""
    covered = []
    for seed in range(60):
        pair = {"x": task((1, 0, 0), noise=1.0, num=256, seed=2 * seed)}
        pair["y"] = task((0.6, 0.8, 0), noise=1.0, num=256, seed=2 * seed + 1)
        found = gradient_conflict(linear_gradient, PARAMS, pair, resamples=300).whole
        covered.append(found.low[0, 1] <= 0.6 <= found.high[0, 1])
    assert 0.8 <= np.mean(covered) <= 0.99


@pytest.fixture(scope="module")
def phase(tiny):
    return tiny.phase(optax.sgd(1.0))


def of_tiny(tiny, seed, parts=1):
    """32 rows with a record each, cut into parts."""
    batch = tiny.make_batch(seed, rows=32)
    return [{name: x[start : start + 32 // parts] for name, x in batch.items()} for start in range(0, 32, 32 // parts)]


def test_cosines_do_not_depend_on_how_rows_come_in_batches(tiny, phase, params):
    grad_fn = summed_gradient(phase.loss_fn)
    expected = None
    for parts in (1, 2, 4, 16):
        batches = {"x": of_tiny(tiny, 1, parts), "y": of_tiny(tiny, 2, parts)}
        found = gradient_conflict(grad_fn, params, batches, samples=32, blocks=8)
        expected = expected or found
        for name in ("cos", "low", "high", "reliability", "corrected"):
            np.testing.assert_allclose(getattr(found.whole, name), getattr(expected.whole, name), atol=1e-6)
        np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-6)
    assert found.num_rows == 32


def test_cosines_are_those_of_the_whole_gradients(tiny, phase, params):
    """Of the mean loss over all rows at once, flattened, in float64."""

    def mean_loss(p, batch):
        term = phase.loss_fn(p, batch, jax.random.key(0))["loss"]
        return term.total / term.weight

    whole = [jax.jit(jax.grad(mean_loss))(params, tiny.on_device(tiny.make_batch(seed, rows=32))) for seed in (1, 2)]
    x, y = (np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(g)]) for g in whole)
    tasks = {"x": of_tiny(tiny, 1), "y": of_tiny(tiny, 2)}
    found = gradient_conflict(summed_gradient(phase.loss_fn), params, tasks, blocks=4)
    assert off(found.whole) == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)
    np.testing.assert_allclose(found.norms, [np.linalg.norm(x), np.linalg.norm(y)], rtol=1e-5)


def test_eight_devices_find_what_one_finds(tiny, phase, params):
    mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
    _, places = tiny.shapes(phase.tx, mesh, params)
    mask = jax.tree.map(lambda x: np.random.default_rng(x.size).random(x.shape) < 0.3, params)
    tasks = {"x": of_tiny(tiny, 1, 2), "y": of_tiny(tiny, 2, 2)}
    one = gradient_conflict(summed_gradient(phase.loss_fn), params, tasks, mask=mask, blocks=16)
    sharded = jax.device_put(params, places.params)
    held = jax.device_put(mask, places.params)
    eight = gradient_conflict(summed_gradient(phase.loss_fn, mesh=mesh), sharded, tasks, mask=held, blocks=16)
    for part in ("whole", "held", "free"):
        np.testing.assert_allclose(getattr(eight, part).cos, getattr(one, part).cos, atol=1e-6)
    np.testing.assert_allclose(eight.norms, one.norms, rtol=1e-5)


def test_what_has_no_gradient_is_refused(tiny, phase, params):
    few = task((1, 0, 0), num=10)
    with pytest.raises(ValueError, match="task 'x' has 10 rows for 16 blocks"):
        gradient_conflict(linear_gradient, PARAMS, {"x": few, "y": task((1, 0, 0))})
    found = gradient_conflict(linear_gradient, PARAMS, {"x": few, "y": few}, blocks=1, halves=False)
    assert off(found.whole) == pytest.approx(1)
    assert np.isnan(found.whole.low).all() and np.isnan(found.whole.corrected).all() and np.isnan(found.whole.conflict)
    with pytest.raises(ValueError, match="even for halves; got 3"):
        gradient_conflict(linear_gradient, PARAMS, {"x": few}, blocks=3)
    with pytest.raises(ValueError, match="a task without batches"):
        gradient_conflict(linear_gradient, PARAMS, {"x": []})
    silent = [batch | {"loss_weights": 0 * batch["loss_weights"]} for batch in of_tiny(tiny, 1)]
    with pytest.raises(ValueError, match="task 'x' has no weighted token in 32 rows"):
        gradient_conflict(summed_gradient(phase.loss_fn), params, {"x": silent})


def test_a_loss_of_two_terms_asks_which(params):
    def loss_fn(params, batch, rng):
        return {"loss": Term(jnp.sum(params["a"]), jnp.float32(1)), "z": Term(jnp.sum(params["b"]), jnp.float32(1))}

    with pytest.raises(ValueError, match="name one term of the loss, term=; it has loss, z"):
        summed_gradient(loss_fn)(PARAMS, {"x": np.zeros((4, 1))})
    gradient, weight = summed_gradient(loss_fn, term="z")(PARAMS, {"x": np.zeros((4, 1))})
    assert weight == 1 and not gradient["a"].any() and gradient["b"].all()
