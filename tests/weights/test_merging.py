# SPDX-License-Identifier: Apache-2.0
"""Laws of the arc between models and of the fold along it."""

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.weights.merging import interpolate, slerp

DRAW = np.random.default_rng(0)


def model(seed, near=None, step=1.0):
    """Three stacked layers, a vector, a table; with `near`, that model a little further on."""
    draw = np.random.default_rng(seed)
    shapes = {"blocks": {"mlp": {"kernel": (3, 16, 24)}, "norm": {"scale": (3, 16)}}, "embed": {"table": (50, 16)}}
    tree = jax.tree.map(
        lambda s: step * draw.standard_normal(s, np.float32), shapes, is_leaf=lambda s: type(s) is tuple
    )
    return jax.tree.map(jnp.asarray, tree if near is None else jax.tree.map(np.add, near, tree))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def close(a, b, **within):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **within)


def unit(size, *, angle):
    """Two unit vectors that far apart, in radians."""
    a, b = np.linalg.qr(DRAW.standard_normal((size, 2)))[0].T
    return jnp.float32(a), jnp.float32(np.cos(angle) * a + np.sin(angle) * b)


@pytest.mark.parametrize("space", ["weights", "task_vectors"])
@pytest.mark.parametrize("far", [1.0, 1e-3])
def test_the_ends_of_the_arc_are_the_models_bit_for_bit(space, far):
    a = model(1)
    a["norm"] = jnp.array([-0.0, 0.0, 3.0])
    b = model(2, near=model(1), step=far) | {"norm": jnp.array([0.0, -0.0, 5.0])}
    origin = None if space == "weights" else model(3) | {"norm": jnp.ones(3)}
    assert bits(interpolate(a, [b], weight=0.0, space=space, origin=origin)) == bits(a)
    assert bits(interpolate(a, [b], weight=1.0, space=space, origin=origin)) == bits(b)
    for weight in (0.0, 0.3, 1.0):
        assert bits(interpolate(a, [a], weight=weight, space=space, origin=origin)) == bits(a)


def test_the_arc_is_the_same_from_both_ends():
    a, b = model(1), model(2)
    close(slerp(a, b, 0.3), slerp(b, a, 0.7), atol=1e-6)


def test_equal_norms_keep_the_norm_all_along_the_arc():
    for angle, weight in itertools.product((0.05, 0.5, 1.5, 2.5), (0.1, 0.5, 0.9)):
        a, b = unit(500, angle=angle)
        assert abs(float(jnp.linalg.norm(slerp(a, b, weight))) - 1) < 1e-6


def test_vectors_at_right_angles_keep_their_own_norms():
    a, b = jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])
    assert abs(float(jnp.linalg.norm(slerp(a, b, 0.5))) - 1.5811) < 5e-5


def test_nearly_collinear_vectors_are_merged_linearly_with_a_small_jump_at_the_border():
    border = np.arccos(0.9995)
    assert abs(np.degrees(border) - 1.81) < 0.005
    for angle, linear in ((border * 0.999, True), (border * 1.001, False), (np.pi - border * 0.999, True)):
        a, b = unit(300, angle=angle)
        straight = np.asarray(a) + 0.5 * (np.asarray(b) - np.asarray(a))
        jump = np.linalg.norm(slerp(a, b, 0.5) - straight) / np.linalg.norm(straight)
        assert jump < 1e-6 if linear else abs(jump - 1.25e-4) < 1e-6


def test_small_angles_keep_their_digits():
    """Where an arccos of float32 numbers reads 1.04e-3, 0 or worse."""
    for angle in (1e-5, 1.0e-3, 0.5, np.pi / 2, np.pi - 1e-3):
        seen = []
        a, b = unit(4096, angle=angle)
        interpolate(a, [7 * b], report=lambda number, path, angles, seen=seen: seen.append((number, path, angles[0])))
        (number, path, read), = seen  # fmt: skip
        assert (number, path) == (1, "") and abs(read - angle) < 2e-3 * min(angle, np.pi - angle) + 1e-7


def test_opposite_and_zero_vectors_are_merged_linearly_and_logged(caplog):
    a, zero = jnp.array([3.0, 4.0]), jnp.zeros(2)
    with caplog.at_level(logging.WARNING, "jaxlm.weights"):
        np.testing.assert_allclose(slerp(a, -a, 0.25), 0.5 * a, atol=1e-6)
        np.testing.assert_allclose(slerp({"w": zero}, {"w": a}, 0.25)["w"], 0.25 * a, atol=1e-6)
        np.testing.assert_allclose(slerp(zero, zero, 0.25), zero)
        tiny = slerp(jnp.array([1e-30, 0.0]), jnp.array([0.0, 1e-30]), 0.5)
    opposite, first, second = caplog.messages
    assert "1 of 1 vectors of b point away from a" in opposite
    assert first == "w: 1 of 1 vectors are zero in a or b; merged linearly" and "zero" in second
    np.testing.assert_allclose(
        tiny / 1e-30, np.sqrt(0.5), rtol=1e-5, err_msg="squares of small weights must not vanish"
    )


def test_the_mean_of_near_models_is_their_mean_in_any_order():
    base = model(0)
    models = [model(i, near=base, step=1e-3) for i in (1, 2, 3)]
    mean = jax.tree.map(lambda *leaves: np.mean(np.float64(leaves), axis=0), base, *models)
    for order in itertools.permutations(models):
        merged = interpolate(base, iter(order))
        for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(mean), strict=True):
            assert np.max(np.abs(x - y)) <= 1e-6 * np.max(np.abs(y))


def test_weights_a_thousandth_apart_have_no_arc_worth_the_name():
    a = model(0)
    b = model(1, near=a, step=1e-3)
    straight = jax.tree.map(lambda x, y: x + 0.3 * (y - x), a, b)
    close(slerp(a, b, 0.3), straight, atol=1e-6)
    close(slerp(a, b, 0.3, eps=1e-9), straight, atol=1e-6)


def test_a_stack_of_layers_merges_as_its_layers_do():
    a, b, c = model(0), model(1), model(2)
    merged = interpolate(a, [b, c], weight=0.4)
    for layer in range(3):
        here, x, y, z = (
            jax.tree.map(lambda leaf, layer=layer: leaf[layer], tree["blocks"]) for tree in (merged, a, b, c)
        )
        close(here, interpolate(x, [y, z], weight=0.4), atol=1e-6)
    close(
        interpolate(a["blocks"], [b["blocks"], c["blocks"]], weight=0.4, stacked=["mlp/.*", "norm/.*"]),
        merged["blocks"],
        atol=1e-6,
    )
    whole = slerp(a["blocks"]["mlp"]["kernel"].ravel(), b["blocks"]["mlp"]["kernel"].ravel(), 0.4)
    assert np.max(np.abs(whole - slerp(a, b, 0.4)["blocks"]["mlp"]["kernel"].ravel())) > 1e-3


def test_rows_are_the_weights_of_one_output():
    a, b = model(0), model(1)
    merged = slerp(a, b, 0.4, rows=True)
    kernel, table = merged["blocks"]["mlp"]["kernel"], merged["embed"]["table"]
    column = slerp(a["blocks"]["mlp"]["kernel"][1, :, 5], b["blocks"]["mlp"]["kernel"][1, :, 5], 0.4)
    np.testing.assert_allclose(kernel[1, :, 5], column, atol=1e-6)
    np.testing.assert_allclose(table[7], slerp(a["embed"]["table"][7], b["embed"]["table"][7], 0.4), atol=1e-6)


def test_task_vectors_are_differences_from_the_origin():
    origin, a, b = model(0), model(1), model(2)
    merged = interpolate(a, [b], weight=0.4, space="task_vectors", origin=origin)
    x, y = (jax.tree.map(jnp.subtract, tree, origin) for tree in (a, b))
    close(merged, jax.tree.map(jnp.add, origin, slerp(x, y, 0.4)), atol=1e-6)


def test_entries_that_take_no_part_keep_their_bits_and_belong_to_no_vector():
    a, b = model(0), model(1)
    where = jax.tree.map(lambda leaf: DRAW.random(leaf.shape) < 0.5, a)
    merged = interpolate(a, [b], weight=0.4, where=where)
    wild = jax.tree.map(lambda leaf, w: jnp.where(w, leaf, 1e3 * leaf), b, where)
    assert bits(interpolate(a, [wild], weight=0.4, where=where)) == bits(merged)
    for x, y, w in zip(*map(jax.tree.leaves, (merged, a, where)), strict=True):
        assert np.asarray(x)[~w].tobytes() == np.asarray(y)[~w].tobytes()
    x, w = merged["embed"]["table"], where["embed"]["table"]
    np.testing.assert_allclose(x[w], slerp(a["embed"]["table"][w], b["embed"]["table"][w], 0.4), atol=1e-6)


def test_leaves_stay_divided_as_they_were_and_the_layout_changes_nothing():
    a, b = model(0), model(1)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    layout = {"blocks": {"mlp": {"kernel": spec(None, None, "fsdp")}, "norm": {"scale": spec(None, "fsdp")}}}
    layout["embed"] = {"table": spec(None, "fsdp")}
    layout = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), layout)
    spread = jax.device_put(a, layout)
    merged = slerp(spread, jax.tree.map(np.asarray, b), 0.4)  # the second model comes from the host
    assert jax.tree.map(lambda leaf: leaf.sharding, merged) == layout
    close(merged, slerp(a, b, 0.4), atol=1e-6)


def test_it_works_inside_jit():
    a, b = model(0), model(1)
    close(jax.jit(lambda a, b: slerp(a, b, 0.4))(a, b), slerp(a, b, 0.4), atol=1e-6)


def test_bfloat16_models_merge_in_float32_and_stay_bfloat16():
    a, b = (jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model(i)) for i in (0, 1))
    merged = slerp(a, b, 0.4)
    wide = slerp(*(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree) for tree in (a, b)), 0.4)
    assert bits(merged) == bits(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide))


def test_what_does_not_fit_is_refused_by_name():
    a, b = model(0), model(1)
    lacking = {**b, "blocks": {"mlp": b["blocks"]["mlp"]}}
    with pytest.raises(ValueError, match="model 2 lacks blocks/norm/scale, which the base has"):
        interpolate(a, [b, lacking])
    with pytest.raises(ValueError, match="model 1 has extra, which the base lacks"):
        interpolate(a, [b | {"extra": jnp.ones(1)}])
    with pytest.raises(ValueError, match=r"vocabularies differ: 51 tokens in b, 50 in a \(embed/table\)"):
        slerp(a, b | {"embed": {"table": jnp.ones((51, 16))}}, 0.5)
    with pytest.raises(ValueError, match=r"embed/table is \(50, 8\) in b and \(50, 16\) in a"):
        slerp(a, b | {"embed": {"table": jnp.ones((50, 8))}}, 0.5)
    with pytest.raises(ValueError, match="embed/table is bfloat16 in b and float32 in a"):
        slerp(a, b | {"embed": {"table": jnp.ones((50, 16), jnp.bfloat16)}}, 0.5)
    with pytest.raises(ValueError, match="embed/table holds a NaN or an infinity in model 2"):
        interpolate(a, [b, b | {"embed": {"table": b["embed"]["table"].at[3, 2].set(jnp.nan)}}])
    with pytest.raises(ValueError, match=r"weight must be 'mean' or in \[0, 1\], got 1.5"):
        slerp(a, b, 1.5)
    with pytest.raises(ValueError, match=r"eps must be in \(0, .1\], got 0"):
        slerp(a, b, 0.5, eps=0)
    with pytest.raises(ValueError, match="got 'angles'"):
        interpolate(a, [b], space="angles")
    with pytest.raises(ValueError, match="give both or neither"):
        interpolate(a, [b], space="task_vectors")
    with pytest.raises(ValueError, match="the base task vector is zero"):
        interpolate(a, [b], space="task_vectors", origin=a)
    with pytest.raises(ValueError, match=r"stacked pattern 'layers/.\*' matches no path"):
        slerp(a, b, 0.5, stacked=["layers/.*"])
