# SPDX-License-Identifier: Apache-2.0
"""Laws of attention whose channels decay with distance, on every implementation that a CPU has.

B batch, L tokens, N heads, K key heads, H head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels.tiled_attention import tiled_attention
from jaxlm.nn import hope_attention, relative_clock
from jaxlm.nn.attention import attend

B, N, K, H = 2, 4, 2, 64
IMPLEMENTATIONS = ("tiled", "xla")

pytestmark = pytest.mark.usefixtures("quick_compiles")


def draw(length, *, seed=0, heads=(N, K, K), width=H, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(B, length, n, width) for n in (*heads, heads[0])]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def spread(top, heads=None, width=H):
    """Rates over [0.05, 1] * top; with heads, slower from head to head."""
    rates = np.linspace(0.05, 1.0, width) * top
    rates = rates if heads is None else rates * np.linspace(1.0, 0.5, heads)[:, None]
    return jnp.asarray(rates, jnp.float32)


def reaches(implementation, top, length):
    return implementation != "xla" or top * (length - 1) <= 80


@partial(jax.jit, static_argnames=("implementation", "window", "softcap"))
def gradients(args, cotangent, *, implementation, segment_ids=None, **options):
    length = cotangent.shape[1]  # a bound that folding reaches; whoever passes larger rates gets NaN

    def attention(q, k, v, extra):
        return attend(
            q, k, v, max_rate=80 / length, implementation=implementation, segment_ids=segment_ids, **extra, **options
        )

    out, pull = jax.vjp(attention, *args)
    return out, pull(cotangent)


def run(implementation, q, k, v, extra, cotangent, **options):
    """Output and gradients."""
    return jax.tree.map(np.asarray, gradients((q, k, v, extra), cotangent, implementation=implementation, **options))


def relative(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / max(np.linalg.norm(expected), 1e-30)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("top", [0.0, 1e-6, 0.1, 2.0, 20.0])
@pytest.mark.parametrize("length", [1, 63, 64, 257])
def test_values_and_gradients_are_those_of_single_scores_in_float64(implementation, top, length, oracle):
    if not reaches(implementation, top, length):
        pytest.skip("out of the reach of folded factors: refused, as another test shows")
    *qkv, cotangent = draw(length)
    extra = {"rates": spread(top)}
    out, (dq, dk, dv, d_extra) = oracle(*qkv, extra, cotangent)
    ours, (gq, gk, gv, g_extra) = run(implementation, *qkv, extra, cotangent)
    assert np.abs(ours - out).max() <= 5e-6
    if length > 1:
        assert relative(gq, dq) <= 1e-5 and relative(gk, dk) <= 1e-5
        assert top > 2 or relative(g_extra["rates"], d_extra["rates"]) <= 5e-5
    assert relative(gv, dv) <= 1e-5


CASES = [
    {"rates": 0.1, "heads": K, "segments": True},
    {"rates": 0.1, "heads": N},
    {"rates": 2.0, "heads": K, "segments": True, "window": 20},
    {"rates": 0.1, "slopes": True, "sink": True, "softcap": 3.0, "segments": True, "window": 90},
    {"slopes": True, "window": 40},
    {"sink": True, "softcap": 2.0},
    {"segments": True, "window": 17},
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bias_sink_cap_window_segments_and_head_rates_combine(implementation, case, oracle):
    length = 150
    if not reaches(implementation, case.get("rates", 0.0), length):
        pytest.skip("out of the reach of folded factors")
    *qkv, cotangent = draw(length, width=16)
    extra = {}
    if "rates" in case:
        extra["rates"] = spread(case["rates"], case.get("heads"), width=16)
    if "slopes" in case:
        extra["slopes"] = jnp.asarray([0.5, 0.1, 0.01, 0.3])
    if "sink" in case:
        extra["sink"] = jnp.asarray([0.5, -1.0, 2.0, 0.3])
    options = {name: case[name] for name in ("window", "softcap") if name in case}
    if "segments" in case:  # borders inside tiles
        options["segment_ids"] = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [37, 54, 40, 19], axis=1).astype(np.int32)
    expected = oracle(*qkv, extra, cotangent, **options)
    ours = run(implementation, *qkv, extra, cotangent, **options)
    for found, right in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, right, atol=2e-5 * max(1.0, np.abs(right).max()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_decay_it_is_plain_attention(implementation):
    q, k, v, _ = draw(257)
    plain = attend(q, k, v, implementation="xla")
    still = attend(q, k, v, rates=jnp.zeros(H), implementation=implementation)
    np.testing.assert_allclose(still, plain, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("top", [0.02, 2.0])
def test_only_differences_of_positions_matter(implementation, top):
    length = 40 if implementation == "xla" else 200
    q, k, v, _ = draw(length)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (B, length))
    options = {"implementation": implementation}
    near = hope_attention(q, k, v, spread(top), positions=positions, **options)
    far = hope_attention(q, k, v, spread(top), positions=positions + 1_000_000, **options)
    assert jnp.array_equal(near, far)
    assert jnp.array_equal(near, hope_attention(q, k, v, spread(top), **options))


def test_positions_with_gaps_and_repeats_count_as_they_stand(oracle):
    *qkv, cotangent = draw(130, width=16)
    positions = np.cumsum(np.random.default_rng(0).integers(0, 4, (B, 130)), axis=1).astype(np.int32)
    expected, _ = oracle(*qkv, {"rates": spread(0.1, width=16)}, cotangent, clock=positions)
    for implementation in IMPLEMENTATIONS:
        found = hope_attention(
            *qkv, spread(0.1, width=16), positions=jnp.asarray(positions), implementation=implementation
        )
        np.testing.assert_allclose(found, expected, atol=5e-6)
    jumps = positions + np.where(np.arange(130) > 70, 10_000, 0).astype(np.int32)
    expected, _ = oracle(*qkv, {"rates": spread(0.1, width=16)}, cotangent, clock=jumps)
    found = hope_attention(*qkv, spread(0.1, width=16), positions=jnp.asarray(jumps), implementation="tiled")
    np.testing.assert_allclose(found, expected, atol=5e-6)
    folded = hope_attention(*qkv, spread(0.1, width=16), positions=jnp.asarray(jumps), implementation="xla")
    assert jnp.all(jnp.isnan(folded))  # what folded factors cannot reach is told, never silently wrong


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_rows_equal_rows_of_their_own(implementation):
    q, k, v, _ = draw(200)
    parts = [slice(0, 70), slice(70, 71), slice(71, 200)]
    segment_ids = jnp.asarray(np.repeat([[1, 2, 3]] * B, [70, 1, 129], axis=1), jnp.int32)
    places = np.concatenate([np.arange(part.stop - part.start) for part in parts]).astype(np.int32)
    positions = jnp.broadcast_to(jnp.asarray(places), (B, 200))
    rates = spread(0.1)
    packed = hope_attention(q, k, v, rates, positions=positions, segment_ids=segment_ids, implementation=implementation)
    for part in parts:
        alone = hope_attention(q[:, part], k[:, part], v[:, part], rates, implementation=implementation)
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_flows_from_the_future(implementation):
    q, k, v, _ = draw(140, width=16)
    rates = spread(0.5, width=16)

    def early(q, k, v):
        return jnp.sum(attend(q, k, v, rates=rates, max_rate=0.5, implementation=implementation)[:, :77])

    for gradient in jax.jit(jax.grad(early, argnums=(0, 1, 2)))(q, k, v):
        assert not np.any(gradient[:, 77:]) and np.any(gradient[:, :77])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reach", [1.0, 10.0, 80.0])
def test_bfloat16_errs_hardly_more_than_without_decay(implementation, reach, oracle):
    length = 256
    *qkv, cotangent = draw(length, dtype=jnp.bfloat16)
    rates = spread(reach / length)
    plain = np.asarray(attend(*qkv, implementation="xla"), np.float64) - oracle(*qkv, {}, cotangent)[0]
    ours = attend(*qkv, rates=rates, implementation=implementation)
    assert ours.dtype == jnp.bfloat16
    error = np.asarray(ours, np.float64) - oracle(*qkv, {"rates": rates}, cotangent)[0]
    assert np.sqrt(np.mean(error**2)) <= 1.5 * np.sqrt(np.mean(plain**2))
    assert np.abs(error).max() <= 2 * np.abs(plain).max()


def test_each_channel_gives_as_much_through_queries_as_through_keys():
    *qkv, cotangent = draw(200, width=16)
    _, (dq, dk, _, _) = run("tiled", *qkv, {"rates": spread(0.3, width=16)}, cotangent)
    q, k = np.asarray(qkv[0]), np.asarray(qkv[1])
    both = np.sum(q * dq, axis=(0, 1, 2)), np.sum(k * dk, axis=(0, 1, 2))
    np.testing.assert_allclose(*both, atol=1e-4 * np.abs(q * dq).sum(axis=(0, 1, 2)).max())


def test_tiles_of_any_size_give_the_same():
    *qkv, _ = draw(300, width=16)
    rates = spread(0.3, width=16)[None]
    outs = [tiled_attention(*qkv, scale=0.25, rates=rates, tile=tile) for tile in (16, 64, 128, 300)]
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_eight_devices_give_what_one_gives(implementation):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (4, 150, 4, 16)) for key in keys)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "tensor"))

    def loss(q, k, v, rates):
        return jnp.sum(jnp.sin(attend(q, k, v, rates=rates, max_rate=0.3, implementation=implementation)))

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    rates = spread(0.3, width=16)
    alone = run(q, k, v, rates)
    spread_out = run(*(jax.device_put(x, sharding) for x in (q, k, v)), rates)
    for one, eight in zip(alone[:3], spread_out[:3], strict=True):
        np.testing.assert_allclose(eight, one, atol=1e-6)
    np.testing.assert_allclose(spread_out[3], alone[3], rtol=1e-3, atol=1e-4 * np.abs(alone[3]).max())


@pytest.mark.parametrize("top", [0.0041, 0.041, 2.0])
def test_distances_of_131072_are_exact(top, oracle):
    """The last 64 positions, and 300 keys spread over all before them."""
    *qkv, cotangent = draw(364)
    before = np.sort(np.random.default_rng(0).choice(131_008, (B, 300), replace=False), axis=1)
    before[:, 0] = 0
    positions = np.concatenate([before, np.tile(np.arange(131_008, 131_072), (B, 1))], axis=1).astype(np.int32)
    expected, _ = oracle(*qkv, {"rates": spread(top)}, cotangent, clock=positions)
    found = hope_attention(*qkv, spread(top), positions=jnp.asarray(positions), implementation="tiled")
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_a_row_of_131072_tokens_is_finite_in_bfloat16_and_equals_its_last_keys():
    length, seen = 131_072, 300
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, length, 1, 16), jnp.bfloat16) for key in keys)
    positions = jnp.arange(length, dtype=jnp.int32)[None] + 1_000_000
    rates = spread(0.041, width=16)
    out = jax.jit(
        lambda q, k, v: hope_attention(q, k, v, rates, positions=positions, window=seen, implementation="tiled")
    )(q, k, v)
    assert jnp.all(jnp.isfinite(out))
    tail = [x[:, -2 * seen :] for x in (q, k, v)]
    expected = hope_attention(*tail, rates, window=seen, implementation="tiled")
    np.testing.assert_allclose(
        np.asarray(out[:, -seen:], np.float32), np.asarray(expected[:, -seen:], np.float32), atol=0.02
    )


def test_what_folding_cannot_reach_is_refused_with_the_remedy_and_auto_goes_on():
    q, k, v, _ = draw(257)
    with pytest.raises(ValueError, match=r"max rate x span <= 80, got 2 x 256 = 512.0; use 'auto' or 'tiled'"):
        attend(q, k, v, rates=spread(2.0), implementation="xla")
    auto = attend(q, k, v, rates=spread(2.0))
    assert jnp.array_equal(auto, attend(q, k, v, rates=spread(2.0), implementation="tiled"))
    with pytest.raises(ValueError, match="learned without a bound"):
        jax.jit(lambda r: attend(q, k, v, rates=r, implementation="xla"))(spread(0.1))
    with pytest.raises(ValueError, match=r"float16 ends at exp\(11\)"):
        attend(*(x.astype(jnp.float16) for x in (q, k, v)), rates=spread(0.1), implementation="xla")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": jnp.full(H, -0.0012)}, r"finite and >= 0, got -0.0012 at channel 0: the score would grow"),
        ({"rates": jnp.full((3, H), 0.1)}, r"rates must be \[64\], \[2, 64\] or \[4, 64\].*got \[3, 64\]"),
        ({"causal": False}, "HoPE is causal"),
        ({"positions": jnp.zeros((B, 3), jnp.int32)}, r"positions must be \[2, 9\].*got \[2, 3\]"),
        (
            {"positions": jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * B, jnp.int32)},
            "must not decrease inside a segment: 3 then 0 at index 4 of row 0",
        ),
    ],
)
def test_bad_input_is_refused_with_its_value_and_a_remedy(change, message):
    q, k, v, _ = draw(9)
    with pytest.raises(ValueError, match=message):
        hope_attention(q, k, v, **({"rates": spread(0.1)} | change))


def test_segments_may_start_their_positions_anew():
    positions = jnp.asarray([[5, 6, 7, 0, 1, 0]], jnp.int32)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 3]], jnp.int32)
    np.testing.assert_array_equal(relative_clock(positions, segments), [[0, 1, 2, 3, 4, 5]])
