# SPDX-License-Identifier: Apache-2.0
"""Laws of entries taken over from their owners."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.weights.merging import interpolate
from jaxlm.weights.transplanting import transplant

DRAW = np.random.default_rng(0)
SHAPES = {"blocks": {"kernel": (3, 8, 6)}, "table": (20, 8)}
ORIGIN = jax.tree.map(lambda s: DRAW.standard_normal(s, np.float32), SHAPES, is_leaf=lambda s: type(s) is tuple)
MODELS = [jax.tree.map(lambda x: x + DRAW.standard_normal(x.shape, np.float32), ORIGIN) for _ in range(3)]
CORES = [jax.tree.map(lambda x: DRAW.random(x.shape) < 0.4, ORIGIN) for _ in range(3)]
SIZES = [jax.tree.map(lambda x, y: np.abs(x - y), model, ORIGIN) for model in MODELS]
BASE = jax.tree.map(lambda x: DRAW.standard_normal(x.shape, np.float32), ORIGIN)
BASE["table"][0, 0] = -0.0


def flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def bits(tree):
    return flat(tree).view(np.int32)


OWNERS = np.stack([flat(core) for core in CORES])
FLAT = np.stack([flat(model) for model in MODELS])
MOVED = np.stack([flat(size) for size in SIZES])


@pytest.mark.parametrize("overlap", ["largest", "mean", "last", "group"])
def test_entries_of_one_core_are_that_models_and_entries_of_none_the_bases_bit_for_bit(overlap):
    groups = [[2], [0, 1]]
    merged = bits(transplant(BASE, MODELS, CORES, sizes=SIZES, overlap=overlap, groups=groups))
    count = OWNERS.sum(0)
    assert np.array_equal(merged[count == 0], bits(BASE)[count == 0])
    for owner, model in zip(OWNERS, MODELS, strict=True):
        assert np.array_equal(merged[(count == 1) & owner], bits(model)[(count == 1) & owner])


@pytest.mark.parametrize("overlap", ["largest", "mean", "last", "group"])
def test_entries_of_several_cores_go_by_the_rule(overlap):
    groups, place = [[2], [0, 1]], [2, 2, 1]
    merged = flat(transplant(BASE, MODELS, CORES, sizes=SIZES, overlap=overlap, groups=groups))
    for entry in range(merged.size):
        owners = np.flatnonzero(OWNERS[:, entry])
        if len(owners) < 2:
            continue
        largest = max(owners, key=lambda i: MOVED[i, entry])
        last = max(owners, key=lambda i: (place[i], MOVED[i, entry]))
        alone = len({place[i] for i in owners}) == 1
        expected = {
            "largest": FLAT[largest, entry],
            "mean": np.float32(sum(FLAT[i, entry] for i in owners)) / np.float32(len(owners)),
            "last": FLAT[last, entry],
            "group": flat(BASE)[entry] if alone else FLAT[largest, entry],
        }[overlap]
        assert merged[entry] == expected or (overlap == "mean" and abs(merged[entry] - expected) < 1e-6)


def test_equal_sizes_go_to_the_lowest_number_and_models_without_groups_go_in_their_order():
    equal = [jax.tree.map(np.ones_like, SIZES[0])] * 3
    everywhere = [jax.tree.map(lambda c: np.ones(c.shape, bool), CORES[0])] * 3
    assert np.array_equal(bits(transplant(BASE, MODELS, everywhere, sizes=equal)), bits(MODELS[0]))
    assert np.array_equal(bits(transplant(BASE, MODELS, everywhere, overlap="last")), bits(MODELS[2]))


def test_empty_cores_leave_the_interpolation_alone():
    empty = [jax.tree.map(np.zeros_like, core) for core in CORES]
    fused = interpolate(BASE, MODELS)
    assert np.array_equal(bits(transplant(fused, MODELS, empty, sizes=SIZES)), bits(fused))


def test_a_core_of_all_entries_but_one_gives_the_model_but_for_that_entry():
    core = jax.tree.map(lambda c: np.ones(c.shape, bool), CORES[0])
    core["table"][3, 4] = False
    merged = bits(transplant(BASE, MODELS[:1], [core], overlap="mean"))
    assert np.flatnonzero(merged != bits(MODELS[0])).tolist() == np.flatnonzero(~flat(core)).tolist()


def test_models_come_one_at_a_time_and_leaves_stay_divided():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, "fsdp")
    layout = jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, spec), BASE)
    merged = transplant(jax.device_put(BASE, layout), iter(MODELS), iter(CORES), sizes=iter(SIZES))
    assert jax.tree.map(lambda leaf: leaf.sharding, merged) == layout
    assert np.array_equal(bits(merged), bits(transplant(BASE, MODELS, CORES, sizes=SIZES)))
    inside = jax.jit(lambda *given: transplant(*given[:3], sizes=given[3]))(BASE, MODELS, CORES, SIZES)
    assert np.array_equal(bits(inside), bits(merged))


def test_bfloat16_entries_keep_their_bits():
    half = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree) for tree in (BASE, *MODELS)]
    for overlap in ("largest", "mean"):
        merged = transplant(half[0], half[1:], CORES, sizes=SIZES, overlap=overlap)
        wide = [jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (merged, half[1])]
        alone = OWNERS[0] & ~OWNERS[1] & ~OWNERS[2]
        assert jax.tree.leaves(merged)[0].dtype == jnp.bfloat16
        assert np.array_equal(*(bits(tree)[alone] for tree in wide))


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match="overlap='largest' needs sizes"):
        transplant(BASE, MODELS, CORES)
    with pytest.raises(ValueError, match="largest, mean, last, group, got 'first'"):
        transplant(BASE, MODELS, CORES, overlap="first")
    with pytest.raises(ValueError, match="overlap='group' needs groups"):
        transplant(BASE, MODELS, CORES, sizes=SIZES, overlap="group")
    with pytest.raises(ValueError, match=r"core 2 lacks table, which the base has"):
        transplant(BASE, MODELS, [CORES[0], {"blocks": CORES[1]["blocks"]}, CORES[2]], sizes=SIZES)
    with pytest.raises(ValueError, match=r"core 1 holds float32 in 'blocks/kernel'"):
        transplant(BASE, MODELS, MODELS, sizes=SIZES)
    with pytest.raises(ValueError, match=r"model 1 is 2 times in groups"):
        transplant(BASE, MODELS, CORES, sizes=SIZES, groups=[[0, 1], [1, 2]])
    with pytest.raises(ValueError, match=r"groups number 4 models, got 3"):
        transplant(BASE, MODELS, CORES, sizes=SIZES, groups=[[0, 1], [2, 3]])
    with pytest.raises(ValueError, match=r"got \[3, 2, 3\] models, cores and sizes"):
        transplant(BASE, MODELS, CORES[:2], sizes=SIZES)
    poor = {**MODELS[1], "table": np.full((20, 8), np.nan, np.float32)}
    with pytest.raises(ValueError, match="table of model 2, or its sizes, holds a NaN"):
        transplant(BASE, [MODELS[0], poor, MODELS[2]], CORES, sizes=SIZES)
