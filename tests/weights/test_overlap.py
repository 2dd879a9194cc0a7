# SPDX-License-Identifier: Apache-2.0
"""Overlaps of sets and the groups that follow from them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.weights import overlap
from jaxlm.weights.overlap import chance_jaccard, core_groups, jaccard, overlap_table


def sets_of(share, count, seed=0, size=1_000_000):
    draw = np.random.default_rng(seed)
    parts = size * 3 // 4, size // 4
    trees = []
    for _ in range(count):
        flat = np.zeros(size, bool)
        flat[draw.permutation(size)[: int(share * size)]] = True
        trees.append({"blocks": {"w": flat[: parts[0]].reshape(3, -1)}, "table": flat[parts[0] :].reshape(100, -1)})
    return trees


def test_overlap_is_the_shared_part_of_all_that_is_held():
    a, b = sets_of(0.3, 2, size=4000)
    flat_a, flat_b = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    assert jaccard(a, b) == (flat_a & flat_b).sum() / (flat_a | flat_b).sum()
    assert jaccard(a, a) == 1
    nothing = jax.tree.map(np.zeros_like, a)
    assert jaccard(nothing, nothing) == jaccard(a, nothing) == 0


@pytest.mark.parametrize(("share", "chance", "within"), [(0.01, 0.0050, 0.0004), (0.05, 0.0256, 0.0004)])
def test_random_sets_overlap_at_chance_level_and_group_with_nobody(share, chance, within):
    cores = sets_of(share, 6)
    table = overlap_table(cores)
    apart = table[np.triu_indices(6, 1)]
    assert abs(apart.mean() - chance) < within and apart.max() < 1.5 * chance
    assert abs(chance_jaccard(share) - chance) < 5e-5
    assert table.dtype == np.float64 and np.array_equal(table, table.T) and np.all(np.diag(table) == 1)
    assert core_groups(table) == core_groups(cores) == [[i] for i in range(6)]


def test_sets_joined_through_a_third_share_a_group():
    chain = np.array([[1, 0.2, 0, 0], [0.2, 1, 0.2, 0], [0, 0.2, 1, 0], [0, 0, 0, 1]])
    assert core_groups(chain) == [[0, 1, 2], [3]]
    assert core_groups(chain, threshold=0.2) == [[0, 1, 2], [3]], "an edge is at least the threshold"
    assert core_groups(chain, threshold=0.3) == [[0], [1], [2], [3]]
    assert core_groups(chain, mode="separate") == [[0], [1], [2], [3]]
    assert core_groups(chain, mode="joint") == [[0, 1, 2, 3]]


def test_permuting_tasks_permutes_groups():
    draw = np.random.default_rng(1)
    table = draw.random((5, 5)) * 0.12
    table = np.triu(table, 1) + np.triu(table, 1).T + np.eye(5)
    here = {frozenset(group) for group in core_groups(table)}
    for order in itertools.permutations(range(5)):
        there = core_groups(table[np.ix_(order, order)])
        assert {frozenset(order[i] for i in group) for group in there} == here
        assert there == sorted(there) and all(group == sorted(group) for group in there)


def test_counts_are_exact_beyond_31_bits():
    leaf = jnp.ones(2**20, bool)
    but_one = leaf.at[7].set(False)
    many = {f"w{i}": leaf for i in range(2100)}  # 2.2e9 entries out of one buffer
    other = many | {"w3": but_one}
    entries = 2100 * 2**20
    assert entries > 2**31
    assert jaccard(many, other) == (entries - 1) / entries
    counts = np.full(2**15, 2**31 - 1, np.int32)  # slices of one leaf, as large as a slice may be
    assert overlap._whole(jax.jit(overlap._limbs_of)(counts)) == 2**15 * (2**31 - 1)
    wide = jax.eval_shape(overlap._limbs, jax.ShapeDtypeStruct((151_936, 16_384), bool))
    assert wide.shape == (4,)


def test_counts_do_not_depend_on_the_layout():
    a, b = sets_of(0.1, 2, size=96_000)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    spread = [jax.tree.map(lambda leaf: jax.device_put(leaf[:, : leaf.shape[1] // 8 * 8], place), t) for t in (a, b)]
    whole = [jax.tree.map(np.asarray, tree) for tree in spread]
    assert jaccard(*spread) == jaccard(*whole)


def test_what_is_no_set_or_no_threshold_is_refused():
    a = {"w": np.ones(3, bool)}
    with pytest.raises(ValueError, match="set 1 holds float32 in 'w'"):
        jaccard(a, {"w": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"w is \(4,\) in set 2 and \(3,\) in set 0"):
        overlap_table([a, a, {"w": np.ones(4, bool)}])
    with pytest.raises(ValueError, match=r"got 0: every overlap is >= 0.*mode='joint'"):
        core_groups([a, a], threshold=0)
    with pytest.raises(ValueError, match=r"got 1\.5"):
        core_groups([a, a], threshold=1.5)
    with pytest.raises(ValueError, match="threshold, joint, separate, got 'chain'"):
        core_groups([a, a], mode="chain")
    with pytest.raises(ValueError, match=r"symmetric \[N, N\]"):
        core_groups(np.array([[1, 0.5], [np.nan, 1]]))
    with pytest.raises(ValueError, match="fraction must be"):
        chance_jaccard(1.2)
