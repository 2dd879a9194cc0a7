# SPDX-License-Identifier: Apache-2.0
"""The largest entries, against sorting in NumPy; ties, layouts, counts beyond int32."""

import math
import re
import zlib
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.weights import select
from jaxlm.weights.names import named_leaves
from jaxlm.weights.select import largest, num_held, random_entries


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Most of the time of these tests would go into machine code that runs for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


SHAPES = {"blocks": {"norm": (3, 8), "up": (3, 16, 24)}, "embed": (48, 16), "head": (16, 40), "scale": (8,), "temp": ()}
D = 24 + 3 * 16 * 24 + 48 * 16 + 16 * 40 + 8 + 1


def tree_of(draw):
    return jax.tree.map(lambda shape: draw(shape).astype(np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def inputs():
    rng = np.random.default_rng(0)
    few = np.array([0.0, 1.0, 1.0, 2.0, 5.0])
    return {
        "random": tree_of(lambda s: rng.random(s)),
        "constant": tree_of(lambda s: np.full(s, 0.125)),
        "all zero": tree_of(np.zeros),
        "heavy-tailed": tree_of(lambda s: np.exp(12 * rng.normal(size=s))),
        "tied": tree_of(lambda s: few[rng.integers(0, 5, s)]),
        "sparse": tree_of(lambda s: rng.random(s) * (rng.random(s) < 0.01)),
        "subnormal": tree_of(lambda s: rng.integers(0, 400, s).astype(np.int32).view(np.float32).reshape(s)),
        "signed": tree_of(lambda s: rng.normal(size=s)),
        "signed zeros": tree_of(lambda s: np.array([-1.0, -0.0, 0.0, 1.0])[rng.integers(0, 4, s)]),
    }


INPUTS = inputs()
COUNTS = {"0": 0, "1": 1, "17": 17, "1 %": D // 100, "half": D // 2, "all but one": D - 1}


def mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def listed(scores):
    """Every entry as (-score, hash of its place, leaf, slice, place), by leaf."""
    found = []
    for index, (path, leaf) in enumerate(named_leaves(scores).items()):
        slices = leaf if path.startswith("blocks/") else leaf[None]
        for i, slice_ in enumerate(slices):
            salt = mix((zlib.crc32(path.encode()) + i * 0x9E3779B9) & 0xFFFFFFFF)
            for place, score in enumerate(np.ravel(slice_).tolist()):
                found.append((-score, mix(place ^ salt), index, i, place))
    return found


def sorted_masks(scores, chosen):
    masks = [np.zeros(np.shape(x), bool) for x in jax.tree.leaves(scores)]
    stacked = [path.startswith("blocks/") for path in named_leaves(scores)]
    for _, _, index, i, place in chosen:
        mask = masks[index]
        (mask[i].reshape(-1) if stacked[index] else mask.reshape(-1))[place] = True
    return jax.tree.unflatten(jax.tree.structure(scores), masks)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def held(masks):
    return sum(int(np.sum(x)) for x in jax.tree.leaves(masks))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", INPUTS)
def test_the_set_is_that_of_sorting_with_ties_by_hash(name, count):
    scores, k = INPUTS[name], COUNTS[count]
    masks = largest(scores, Fraction(k, D))
    assert held(masks) == k
    assert same(masks, sorted_masks(scores, sorted(listed(scores))[:k]))


@pytest.mark.parametrize("name", ["random", "tied", "signed zeros"])
def test_a_cut_in_every_layer_is_that_of_sorting_there(name):
    scores, chosen, slices = INPUTS[name], [], {}
    for entry in listed(scores):
        slices.setdefault(entry[2:4], []).append(entry)
    for entries in slices.values():
        chosen += sorted(entries)[: int(Fraction("0.29") * len(entries))]
    assert same(largest(scores, 0.29, scope="layer"), sorted_masks(scores, chosen))


SENT = r"= \w+\[([\d,]+)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)\("


def layouts():
    devices = jax.devices()
    auto = {"axis_types": (AxisType.Auto, AxisType.Auto)}
    flat = jax.make_mesh((8, 1), ("a", "b"), devices=devices, **auto)
    grid = jax.make_mesh((2, 4), ("a", "b"), devices=devices, **auto)

    def placed(mesh, table):
        def one(x):
            names = table.get(np.ndim(x), ())
            fits = all(n is None or size % mesh.shape[n] == 0 for n, size in zip(names, np.shape(x), strict=False))
            return NamedSharding(mesh, P(*names) if fits else P())

        return one

    return {
        "rows over 8": placed(flat, {1: ("a",), 2: ("a",), 3: (None, "a")}),
        "columns over 4": placed(grid, {2: (None, "b"), 3: (None, None, "b")}),
        "2 x 4": placed(grid, {1: ("b",), 2: ("a", "b"), 3: (None, "a", "b")}),
        "4 x 2, turned": placed(grid, {1: ("a",), 2: ("b", "a"), 3: (None, "b", "a")}),
    }


@pytest.mark.parametrize("layout", ["rows over 8", "columns over 4", "2 x 4", "4 x 2, turned"])
def test_eight_devices_choose_what_one_chooses_and_leave_masks_where_scores_are(layout):
    place = layouts()[layout]
    scope = "layer" if layout == "2 x 4" else "global"
    for name in ("random", "tied", "constant"):
        scores = INPUTS[name]
        there = jax.tree.map(lambda x: jax.device_put(x, place(x)), scores)
        masks = jax.block_until_ready(largest(there, 0.3, scope=scope))
        assert same(masks, largest(scores, 0.3, scope=scope))
        for mask, x in zip(jax.tree.leaves(masks), jax.tree.leaves(there), strict=True):
            assert mask.sharding.is_equivalent_to(x.sharding, x.ndim)
    if layout != "rows over 8":
        return
    text = jax.jit(lambda x: largest(x, 0.3)).lower(there).compile().as_text()
    sent = [math.prod(map(int, dims.split(","))) for dims in re.findall(SENT, text)]
    assert sent and max(sent) <= 15 * 3 * 8, "devices exchange counts, never scores"


def test_it_can_be_compiled_and_agrees_with_itself():
    scores = INPUTS["tied"]
    assert same(jax.jit(lambda x: largest(x, 0.3))(scores), largest(scores, 0.3))


def test_counts_beyond_int32_add_up_exactly():
    """2^15 slices of 2^31 - 1 entries, and made-up counts around the carries."""
    full = jnp.full((1, 2**15), 2**31 - 1, jnp.int32)
    value = lambda x: (np.asarray(x.high).astype(object) * 2**16 + np.asarray(x.low).astype(object)).tolist()  # noqa: E731
    assert value(select.limbs(full)) == [2**15 * (2**31 - 1)]
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 2**31, (5, 4, 300)).astype(np.int32)
    counts[..., :9] = [0, 1, 65535, 65536, 65537, 131071, 131072, 2**31 - 1, 2**31 - 2]
    sums = counts.astype(object).sum(axis=2)
    assert value(select.limbs(jnp.asarray(counts))) == sums.tolist()
    totals = select.together(select.limbs(jnp.asarray(counts)))
    total = sums.sum(axis=1)
    assert value(totals) == np.repeat(total[:, None], 4, axis=1).tolist()
    assert value(select.minus(select.host_limbs([2**16]), select.host_limbs([1]))) == [2**16 - 1]
    for k in (0, int(total[0]) - 1, int(total[0]), int(total[0]) + 1):
        most = select.host_limbs([k] * 4)
        assert np.asarray(select.more(totals, most))[0].tolist() == [total[0] > k] * 4
        if k <= total[0]:
            assert value(select.minus(select.Limbs(*(x[0] for x in totals)), most)) == [total[0] - k] * 4


def test_slices_too_large_for_one_count_are_counted_in_pieces(monkeypatch):
    scores = INPUTS["tied"]
    expected = largest(scores, 0.3)
    monkeypatch.setattr(select.piece_axis, "__kwdefaults__", {"most": 100})
    assert select.piece_axis((48, 16), False) == 1
    assert same(jax.jit(lambda x: largest(x, 0.3))(scores), expected)
    with pytest.raises(ValueError, match="too many entries to count"):
        select.piece_axis((101, 101, 101), False)


def test_random_entries_are_exact_in_number_and_change_with_the_seed():
    scores = INPUTS["random"]
    first, second = random_entries(scores, 0.25, seed=1), random_entries(scores, 0.25, seed=2)
    assert held(first) == held(second) == D // 4
    both = held(jax.tree.map(np.logical_and, first, second))
    assert abs(both - D / 16) < 5 * (D * 15 / 256) ** 0.5
    assert same(first, random_entries(jax.tree.map(np.zeros_like, scores), 0.25, seed=1))
    assert same(first, jax.jit(lambda seed: random_entries(scores, 0.25, seed=seed))(1))


def test_excluded_leaves_are_not_marked_and_do_not_count():
    masks = largest(INPUTS["random"], 0.5, exclude=("embed", "blocks/.*"))
    assert held(masks["embed"]) == held(masks["blocks"]) == 0
    assert held(masks) == (16 * 40 + 8 + 1) // 2


def test_which_leaves_are_stacked_is_a_rule_over_paths():
    """Without a stack a leaf is one slice: a cut in every layer is then a cut in every leaf."""
    scores = INPUTS["random"]
    leaves = {"a": np.stack([scores["embed"], 9 + scores["embed"]]), "b": scores["head"]}
    apart = largest({"a0": leaves["a"][0], "a1": leaves["a"][1], "b": leaves["b"]}, 0.3, scope="layer")
    stacked = largest(leaves, 0.3, scope="layer", stacked=("a",))
    whole = largest(leaves, 0.3, scope="layer", stacked=())
    assert same([apart["a0"], apart["a1"]], list(stacked["a"])) and not same(stacked, whole)


def test_shares_are_read_as_decimals():
    assert num_held(0.29, 100) == 29 and num_held(1e-05, 10**6) == 10 and num_held(0.1, 1_500_000_000) == 150_000_000


def test_what_cannot_be_chosen_is_refused():
    scores = {"a": jnp.ones(3)}
    for fraction, message in ((1, r"got 1: holding every entry"), (-0.1, r"got -0\.1")):
        with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), " + message):
            largest(scores, fraction)
    with pytest.raises(ValueError, match="scope is 'global' or 'layer', got 'leaf'"):
        largest(scores, 0.5, scope="leaf")
    with pytest.raises(ValueError, match="stacked pattern 'blocks' matches no path; paths look like 'a'"):
        largest(scores, 0.5, stacked=("blocks",))
    with pytest.raises(ValueError, match="exclude pattern 'b' matches no path"):
        largest(scores, 0.5, exclude=("b",))
    with pytest.raises(ValueError, match=r"exclude is a tuple of patterns, got 'a': write \('a',\)"):
        largest(scores, 0.5, exclude="a")
    with pytest.raises(ValueError, match="scores at a are int32; give floating numbers"):
        largest({"a": jnp.ones(3, jnp.int32)}, 0.5)
