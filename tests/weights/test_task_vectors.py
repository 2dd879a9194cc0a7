# SPDX-License-Identifier: Apache-2.0
"""Sums of models and of task vectors: laws, and the results of mergekit 0.1.5 (`make_golden.py`)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlm.weights import task_vectors
from jaxlm.weights.merging import slerp
from jaxlm.weights.task_vectors import dare, dare_ties, linear, soup, task_arithmetic, ties

GOLDEN = load_file(Path(__file__).parent / "golden" / "mergekit.safetensors")
NAMES = ("kernel", "scale", "table")
MODELS, WEIGHTS = ("one", "two", "three"), (0.7, 0.5, -0.2)
DRAW = np.random.default_rng(0)


def golden(case):
    return {name: GOLDEN[f"{case}/{name}"] for name in NAMES}


def close(a, b, **within):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, err_msg=str(path), **within)


def tree(seed, size=1.0):
    draw = np.random.default_rng(seed)
    shapes = {"blocks": {"w": (3, 8, 12)}, "table": (40, 8)}
    return jax.tree.map(
        lambda s: size * draw.standard_normal(s, np.float32), shapes, is_leaf=lambda s: type(s) is tuple
    )


BASE = tree(0)
TUNED = [jax.tree.map(np.add, BASE, tree(seed, 0.1)) for seed in (1, 2, 3)]


@pytest.mark.parametrize(
    ("case", "ours"),
    [
        ("linear", lambda base, models: linear(models, weights=WEIGHTS)),
        ("sum", lambda base, models: linear(iter(models), weights=WEIGHTS, normalize=False)),
        ("slerp", lambda base, models: slerp(models[0], models[2], 0.3)),
        ("slerp_near", lambda base, models: slerp(base, models[0], 0.3)),
        ("task_arithmetic", lambda base, models: task_arithmetic(base, iter(models), weights=WEIGHTS, scale=1.5)),
        ("ties", lambda base, models: ties(base, models, weights=WEIGHTS, density=0.4)),
        ("ties_sum", lambda base, models: ties(base, models, weights=WEIGHTS, density=0.4, normalize=False)),
        ("dare_linear", lambda base, models: dare(base, models, weights=WEIGHTS, density=0.6, rescale="norm")),
        ("dare_ties", lambda base, models: dare_ties(base, models, weights=WEIGHTS, density=0.6, rescale="norm")),
    ],
)
def test_merges_are_mergekits(case, ours, monkeypatch):
    """DARE is handed the entries that mergekit drew."""

    def drawn(path, shape, stacked, seed, density):
        return jnp.asarray(GOLDEN[f"kept/{MODELS[seed - 1]}/{path}"])

    monkeypatch.setattr(task_vectors, "_dropped", drawn)
    close(ours(golden("base"), [golden(model) for model in MODELS]), golden(case), atol=1e-6, rtol=0)


def test_a_mean_is_a_mean_and_a_soup_an_even_one():
    mean = jax.tree.map(lambda *x: np.mean(np.float64(x), axis=0), *TUNED)
    close(soup(iter(TUNED)), mean, atol=1e-6)
    close(linear(TUNED, weights=[2, 2, 2]), mean, atol=1e-6)
    close(linear(TUNED[:1], normalize=False), TUNED[0], atol=0)


def test_adding_and_taking_away_a_task_leaves_the_base():
    close(task_arithmetic(BASE, [TUNED[0], TUNED[0]], weights=[1, -1]), BASE, atol=0)
    close(task_arithmetic(BASE, TUNED[:1]), TUNED[0], atol=1e-6)
    close(task_arithmetic(BASE, TUNED, normalize=True), soup(TUNED), atol=1e-6)


def test_trimming_keeps_exactly_the_share_of_each_layer_or_of_the_whole():
    moved = [np.abs(np.subtract(*pair)) for pair in zip(jax.tree.leaves(TUNED[0]), jax.tree.leaves(BASE), strict=True)]
    merged = ties(BASE, TUNED[:1], density=0.25)
    changed = [np.asarray(x) != y for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(BASE), strict=True)]
    assert [int(c.sum()) for c in changed[0]] == [24, 24, 24] and changed[1].sum() == 80
    for slices, kept in ((moved[0], changed[0]), (moved[1][None], changed[1][None])):
        for size, keep in zip(slices, kept, strict=True):
            assert size[keep].min() >= size[~keep].max()
    merged = ties(BASE, TUNED[:1], density=0.25, scope="global")
    pairs = zip(jax.tree.leaves(merged), jax.tree.leaves(BASE), strict=True)
    keep = np.concatenate([(np.asarray(x) != y).ravel() for x, y in pairs])
    size = np.concatenate([x.ravel() for x in moved])
    assert keep.sum() == size.size // 4 and size[keep].min() >= size[~keep].max()


def test_entries_move_with_the_sign_that_has_more_weight():
    base = {"w": jnp.zeros(5)}
    models = [{"w": jnp.array(x)} for x in ([3.0, 1, 1, 0, 2], [-1.0, -2, 1, 0, -2], [2.0, 0.5, -4, 0, 0])]
    close(ties(base, models, density=1), {"w": jnp.array([2.5, -2, -4, 0, 2])}, atol=1e-7)
    close(ties(base, models, density=1, weights=[1, 3, 1]), {"w": jnp.array([2.5, -2, 1, 0, -2])}, atol=1e-6)
    close(ties(base, models, density=1, normalize=False, scale=2), {"w": jnp.array([10.0, -4, -8, 0, 4])}, atol=1e-6)


def test_dropping_keeps_the_share_scales_up_the_rest_and_differs_by_model_layer_and_seed():
    base, one = (
        {"blocks": {"w": np.zeros((2, 50_000), np.float32)}},
        {"blocks": {"w": np.ones((2, 50_000), np.float32)}},
    )
    merged = np.asarray(dare(base, [one], density=0.3)["blocks"]["w"])
    kept = merged != 0
    np.testing.assert_allclose(kept.mean(axis=1), 0.3, atol=4 * np.sqrt(0.21 / 50_000))
    np.testing.assert_allclose(merged[kept], 1 / 0.3, rtol=1e-6)
    close(dare(base, [one], density=0.3, rescale="none")["blocks"]["w"], kept.astype(np.float32), atol=0)
    level = np.asarray(dare(base, [one], density=0.3, rescale="norm")["blocks"]["w"]).sum(axis=1)
    np.testing.assert_allclose(level, 50_000, rtol=1e-5, err_msg="norm keeps the sum of sizes of each layer")
    seeds = [np.asarray(dare(base, [one], density=0.3, seed=seed)["blocks"]["w"]) != 0 for seed in (0, 0, 9)]
    assert np.array_equal(seeds[0], seeds[1])
    second = (np.asarray(dare(base, [base, one], density=0.3)["blocks"]["w"]) != 0)[0]
    for other in (seeds[2][0], kept[1], second):
        assert abs((kept[0] & other).mean() - 0.09) < 4 * np.sqrt(0.09 * 0.91 / 50_000), "as sets that know nothing"
    close(dare(BASE, TUNED, density=1), task_arithmetic(BASE, TUNED), atol=0)
    close(dare_ties(BASE, TUNED, density=1), ties(BASE, TUNED, density=1, normalize=False), atol=0)


@pytest.mark.parametrize(
    "merge",
    [
        lambda base, models: linear(models, weights=WEIGHTS),
        lambda base, models: ties(base, models, density=0.3),
        lambda base, models: dare_ties(base, models, density=0.3, rescale="norm"),
    ],
)
def test_leaves_stay_divided_and_the_layout_changes_nothing(merge):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    spread = [jax.device_put(model, place) for model in (BASE, *TUNED)]
    merged = merge(spread[0], spread[1:])
    assert all(leaf.sharding == place for leaf in jax.tree.leaves(merged))
    close(merged, merge(BASE, TUNED), atol=1e-6)


def test_a_stack_of_layers_is_trimmed_as_its_layers_are():
    merged = ties(BASE, TUNED, density=0.3)
    for layer in range(3):
        base, *tuned = ({"w": model["blocks"]["w"][layer]} for model in (BASE, *TUNED))
        close(ties(base, tuned, density=0.3)["w"], merged["blocks"]["w"][layer], atol=1e-6)


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match="model 2 lacks table, which model 1 has"):
        linear([BASE, {"blocks": BASE["blocks"]}])
    with pytest.raises(ValueError, match=r"table is \(41, 8\) in model 1 and \(40, 8\) in the base"):
        ties(BASE, [{**BASE, "table": np.ones((41, 8), np.float32)}])
    with pytest.raises(ValueError, match="got 2 weights for"):
        task_arithmetic(BASE, TUNED, weights=[1, 1])
    with pytest.raises(ValueError, match="got 4 weights for 3 models"):
        ties(BASE, TUNED, weights=[1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"add up to 0: nothing to divide by; say normalize=False"):
        linear(TUNED[:2], weights=[1, -1])
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 0"):
        dare(BASE, TUNED, density=0)
    with pytest.raises(ValueError, match="share, norm, none, got 'l2'"):
        dare(BASE, TUNED, density=0.5, rescale="l2")
    with pytest.raises(ValueError, match="no model to merge"):
        soup([])
    with pytest.raises(ValueError, match="table holds a NaN or an infinity in model 2"):
        linear([BASE, {**BASE, "table": np.full((40, 8), np.nan, np.float32)}])
    with pytest.raises(ValueError, match="table holds a NaN or an infinity"):
        ties(BASE, [{**BASE, "table": np.full((40, 8), np.inf, np.float32)}])
