# SPDX-License-Identifier: Apache-2.0
"""Laws of the Pallas kernels of attention, interpreted on CPU, and their lowering for a TPU that is not there.

B batch, L tokens, N query heads, K key heads, H head width.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.kernels.blocked_attention import blocked_attention
from jaxlm.kernels.pallas_attention import pallas_attention
from jaxlm.kernels.tiled_attention import tiled_attention

NAMES = ("query", "key", "value")
L, TILE = 130, 32  # of the one program that most laws look at: five tiles, the last of two tokens

pytestmark = pytest.mark.usefixtures("quick_compiles")


def draw(length, *, rows=1, heads=2, kv_heads=1, width=16, dtype=jnp.float32):
    """Queries, keys and values, and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    *qkv, cotangent = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    return dict(zip(NAMES, qkv, strict=True)), cotangent


def spread(top, width=16, heads=1):
    """Rates over [0.05, 1] * top, slower from head to head."""
    return jnp.asarray(np.linspace(0.05, 1.0, width) * top * np.linspace(1.0, 0.5, heads)[:, None], jnp.float32)


def call(felt, *, attention=pallas_attention, traced_window=None, **options):
    options |= {} if traced_window is None else {"window": traced_window}
    arrays = {name: x for name, x in felt.items() if name not in NAMES}
    return attention(*(felt[name] for name in NAMES), **arrays, **options)


STATIC = ("attention", "scale", "softcap", "window", "tile", "interpret")
forward = jax.jit(call, static_argnames=STATIC)


@partial(jax.jit, static_argnames=STATIC)
def run(felt, cotangent, **options):
    """Output, and the gradient of everything in `felt`."""
    out, pull = jax.vjp(lambda felt: call(felt, **options), felt)
    return out, pull(cotangent)[0]


def everything(top=0.1, **changes):
    """Two rows with all that attention takes; what `changes` leaves out is there and does nothing."""
    felt, cotangent = draw(L, rows=2, heads=4, kv_heads=2)
    felt |= {"rates": spread(top, heads=2), "slopes": jnp.zeros(4), "sink": jnp.full(4, -jnp.inf, jnp.float32)}
    options = {
        "clock": np.broadcast_to(np.arange(L, dtype=np.int32), (2, L)),
        "segment_ids": np.ones((2, L), np.int32),
        "traced_window": np.int32(L),
    }
    felt |= {name: x for name, x in changes.items() if name in felt}
    options |= {name: x for name, x in changes.items() if name in options}
    return felt, cotangent, options | {"scale": 0.25, "tile": TILE}


def dense(felt, cotangent=None, *, scale, softcap=None, clock=None, segment_ids=None, window=None):
    """The same in float64, from whole tables: exponents of differences, gradients by hand."""
    felt = {name: np.asarray(x, np.float64) for name, x in felt.items()}
    q, k, v, d_out = *(felt[name] for name in NAMES), None if cotangent is None else np.asarray(cotangent, np.float64)
    (B, L, N, H), K = q.shape, k.shape[2]
    out, grads = np.zeros(q.shape), {name: np.zeros(x.shape) for name, x in felt.items()}
    clock, index = np.arange(L)[None] if clock is None else np.asarray(clock, np.int64), np.arange(L)
    for b in range(B):
        apart = np.maximum(clock[b % len(clock)][:, None] - clock[b % len(clock)][None, :], 0)
        seen = (index[:, None] >= index[None]) & (index[:, None] - index[None] < (window or L))
        if segment_ids is not None:
            seen &= segment_ids[b][:, None] == segment_ids[b][None]
        for n in range(N):
            h = n * K // N
            rates = felt["rates"][h % len(felt["rates"])] if "rates" in felt else np.zeros(H)
            decay = np.exp(-rates * apart[:, :, None])
            scores = scale * np.einsum("ic,jc,ijc->ij", q[b, :, n], k[b, :, h], decay, optimize=True)
            slope = 1.0
            if softcap is not None:
                slope = 1 - np.tanh(scores / softcap) ** 2
                scores = softcap * np.tanh(scores / softcap)
            if "slopes" in felt:
                scores = scores - felt["slopes"][n] * apart
            scores = np.where(seen, scores, -np.inf)
            sink = felt["sink"][n] if "sink" in felt else -np.inf
            top = np.maximum(scores.max(-1, keepdims=True), sink)
            total = np.exp(scores - top).sum(-1, keepdims=True) + np.exp(sink - top)
            weights = np.exp(scores - top) / total
            out[b, :, n] = weights @ v[b, :, h]
            if cotangent is None:
                continue
            inner = np.sum(out[b, :, n] * d_out[b, :, n], -1, keepdims=True)
            d_scores = weights * (d_out[b, :, n] @ v[b, :, h].T - inner)
            d_products = d_scores * slope * scale
            grads["value"][b, :, h] += weights.T @ d_out[b, :, n]
            grads["query"][b, :, n] += np.einsum("ij,ijc,jc->ic", d_products, decay, k[b, :, h], optimize=True)
            grads["key"][b, :, h] += np.einsum("ij,ijc,ic->jc", d_products, decay, q[b, :, n], optimize=True)
            if "rates" in felt:
                each = np.einsum("ij,ijc,ic,jc->c", d_products * apart, decay, q[b, :, n], k[b, :, h], optimize=True)
                grads["rates"][h % len(felt["rates"])] -= each
            if "slopes" in felt:
                grads["slopes"][n] -= np.sum(d_scores * apart)
            if "sink" in felt:
                grads["sink"][n] -= np.sum(np.exp(sink - top) / total * inner)
    return out, grads


def relative(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / max(np.linalg.norm(expected), 1e-30)


TOPS = (0.0, 1e-6, 0.1, 2.0, 20.0)


@pytest.mark.parametrize("length", [1, 63, 64, 512])
def test_values_are_those_of_single_scores_in_float64(length):
    felt, _ = draw(length, heads=1, width=64)
    for top in TOPS:
        given = felt | {"rates": spread(top, 64)}
        assert np.abs(forward(given, scale=0.125) - dense(given, scale=0.125)[0]).max() <= 5e-6


def test_so_are_gradients():
    felt, cotangent = draw(257, heads=1, width=64)
    for top in TOPS:
        given = felt | {"rates": spread(top, 64)}
        out, grads = run(given, cotangent, scale=0.125)
        right, d_right = dense(given, cotangent, scale=0.125)
        assert np.abs(out - right).max() <= 5e-6
        for name in NAMES:
            assert relative(grads[name], d_right[name]) <= 1e-5
        assert top > 2 or relative(grads["rates"], d_right["rates"]) <= 5e-5  # beyond, it is what rounding leaves
        through = [np.sum(np.asarray(felt[n]) * np.asarray(grads[n]), axis=(0, 1, 2)) for n in ("query", "key")]
        np.testing.assert_allclose(*through, atol=1e-4)  # each channel gives as much through queries as through keys


SEGMENTS = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], [37, 44, 30, 19], axis=1).astype(np.int32)  # borders inside tiles
UNEVEN = np.cumsum(np.random.default_rng(0).integers(0, 4, (2, L)), axis=1).astype(np.int32)  # gaps and repeats
BIAS = {"slopes": jnp.asarray([0.5, 0.1, 0.01, 0.3]), "sink": jnp.asarray([0.5, -1.0, 2.0, 0.3])}


@pytest.mark.parametrize(
    "changes",
    [
        {"segment_ids": SEGMENTS, "clock": UNEVEN},
        {"top": 2.0, "traced_window": np.int32(20)},
        {"top": 20.0, "segment_ids": SEGMENTS, "traced_window": np.int32(50)},
        {"segment_ids": SEGMENTS, "clock": UNEVEN, "traced_window": np.int32(50), **BIAS},
    ],
    ids=["segments", "window", "fast", "all"],
)
def test_everything_combines_and_equals_the_tiles_without_pallas(changes):
    felt, cotangent, options = everything(**changes)
    ours, theirs = run(felt, cotangent, **options), run(felt, cotangent, attention=tiled_attention, **options)
    options.pop("tile")
    expected = dense(felt, cotangent, window=options.pop("traced_window"), **options)
    assert relative(ours[0], np.asarray(theirs[0])) <= 1e-6
    if changes.get("top", 0) > 2:
        expected[1].pop("rates")
    for name, right in {"out": expected[0], **expected[1]}.items():
        found, other = (out if name == "out" else grads[name] for out, grads in (ours, theirs))
        np.testing.assert_allclose(found, right, atol=2e-5 * max(1.0, np.abs(right).max()), err_msg=name)
        np.testing.assert_allclose(found, other, atol=2e-5 * max(1.0, np.abs(right).max()), err_msg=name)


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"window": 40}], ids=["cap", "static window"])
def test_nothing_of_it_has_to_be_there(options):
    felt, cotangent = draw(L, kv_heads=2)
    felt |= {"rates": spread(0.3)} if "softcap" in options else {name: x[:2] for name, x in BIAS.items()}
    expected = dense(felt, cotangent, scale=0.25, **options)
    found = run(felt, cotangent, scale=0.25, tile=TILE, **options)
    for ours, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, right, atol=2e-5 * max(1.0, np.abs(right).max()))


@pytest.mark.parametrize("top", [0.1, 20.0])
def test_only_differences_of_clocks_matter(top):
    felt, cotangent, options = everything(top, clock=UNEVEN)
    near = run(felt, cotangent, **options)
    far = run(felt, cotangent, **options | {"clock": UNEVEN + 1_000_000})
    jax.tree.map(np.testing.assert_array_equal, near, far)


def test_packed_rows_equal_rows_of_their_own():
    length = L // 2
    felt, cotangent, options = everything(segment_ids=np.repeat([[1, 2]] * 2, length, axis=1).astype(np.int32))
    packed, _ = run(felt, cotangent, **options)
    alone = {name: x.reshape(4, length, *x.shape[2:]) if name in NAMES else x for name, x in felt.items()}
    np.testing.assert_allclose(packed, forward(alone, scale=0.25, tile=TILE).reshape(packed.shape), atol=1e-6)


def test_a_length_that_tiles_do_not_divide_is_that_of_the_padded_row():
    felt, cotangent, options = everything()
    longer = {name: jnp.pad(x, ((0, 0), (0, 30), (0, 0), (0, 0))) if name in NAMES else x for name, x in felt.items()}
    found = forward(longer, scale=0.25, tile=TILE)[:, :L]
    np.testing.assert_allclose(run(felt, cotangent, **options)[0], found, atol=1e-7)


@pytest.mark.parametrize("top", [0.1, 20.0])
def test_nothing_flows_from_the_future(top):
    felt, cotangent, options = everything(top, **BIAS)
    _, grads = run(felt, cotangent.at[:, 77:].set(0.0), **options)
    for name in NAMES:
        assert not np.any(grads[name][:, 77:]) and np.all(np.any(grads[name][:, :77], axis=-1))


@pytest.mark.parametrize(
    "outside",
    [{"traced_window": np.int32(33)}, {"segment_ids": np.repeat([[1, 2]] * 2, [32, L - 32], axis=1).astype(np.int32)}],
    ids=["window", "segment"],
)
def test_tiles_that_cannot_be_seen_are_not_even_read(outside):
    """Select alone would not keep their NaN out of weights @ values."""
    felt, cotangent, options = everything(**outside)
    felt |= {name: felt[name].at[:, :32].set(jnp.nan) for name in ("key", "value")}
    out, grads = run(felt, cotangent.at[:, :64].set(0.0), **options)
    assert np.all(np.isfinite(out[:, 64:])) and np.all(np.isnan(out[:, :32]))
    assert np.all(np.isfinite(grads["query"][:, 64:])) and np.all(np.isfinite(grads["key"][:, 64:]))
    out, _ = run(felt, cotangent, **everything()[2])
    assert np.all(np.isnan(out)), "this test looks for the wrong thing"


def test_shared_key_heads_equal_repeated_ones():
    felt, cotangent, options = everything()
    repeated = {name: jnp.repeat(x, 2, axis=2) if name in ("key", "value") else x for name, x in felt.items()}
    repeated["rates"] = jnp.repeat(felt["rates"], 2, axis=0)
    found = forward({name: repeated[name] for name in (*NAMES, "rates")}, scale=0.25, tile=TILE)
    np.testing.assert_allclose(run(felt, cotangent, **options)[0], found, atol=1e-6)


def test_bfloat16_errs_hardly_more_than_without_decay():
    felt, cotangent = draw(256, heads=1, width=64, dtype=jnp.bfloat16)
    plain = jax.jit(partial(blocked_attention, scale=0.125))(*felt.values())
    plain = np.asarray(plain, np.float64) - dense(felt, scale=0.125)[0]
    for reach in (1.0, 10.0, 80.0):
        given = felt | {"rates": spread(reach / 256, 64)}
        out, grads = run(given, cotangent, scale=0.125)
        assert out.dtype == grads["query"].dtype == grads["key"].dtype == grads["value"].dtype == jnp.bfloat16
        right, d_right = dense(given, cotangent, scale=0.125)
        error = np.asarray(out, np.float64) - right
        assert np.sqrt(np.mean(error**2)) <= 1.5 * np.sqrt(np.mean(plain**2))
        assert np.abs(error).max() <= 2 * np.abs(plain).max()
        assert all(relative(grads[name], d_right[name]) <= 0.005 for name in grads)


def test_large_scores_stay_finite_under_a_cap():
    """A tile's products with its future reach exp(80) times those with its past, and overflow before the select."""
    felt, cotangent = draw(L, kv_heads=2)
    felt = {name: x * 1e3 for name, x in felt.items()} | {"rates": spread(80 / (TILE - 1))}
    made = run(felt, cotangent, scale=0.25, softcap=2.0, tile=TILE)  # the cap's slope, too, would be NaN
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(made))


def test_devices_that_share_out_rows_and_heads_give_what_one_gives():
    felt, cotangent, options = everything()
    felt = {name: felt[name] for name in (*NAMES, "rates")}
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows = P("data", None, "tensor")
    place = {name: rows if name in NAMES else P("tensor") for name in felt}
    divided = jax.shard_map(
        partial(call, scale=0.25, tile=TILE), mesh=mesh, in_specs=(place,), out_specs=rows, check_vma=False
    )

    @jax.jit
    def both(felt, cotangent):
        out, pull = jax.vjp(divided, felt)
        return out, pull(cotangent)[0]

    found = both({name: jax.device_put(x, NamedSharding(mesh, place[name])) for name, x in felt.items()}, cotangent)
    expected = run(*everything()[:2], **options)
    np.testing.assert_allclose(jax.block_until_ready(found)[0], expected[0], atol=1e-6)
    for name, x in found[1].items():
        np.testing.assert_allclose(x, expected[1][name], rtol=1e-3, atol=2e-5, err_msg=name)


def test_the_interpreter_of_tpu_memory_gives_the_same():
    """It copies blocks between memories as a TPU does, and notices reads outside of them."""
    felt, cotangent = draw(24, heads=1)
    felt |= {"rates": spread(8.0), "sink": jnp.asarray([0.3])}
    with pltpu.force_tpu_interpret_mode():
        found = jax.block_until_ready(run(felt, cotangent, scale=0.25, tile=16, interpret=False))
    expected = dense(felt, cotangent, scale=0.25)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-6), found, expected)


@pytest.mark.parametrize(("width", "dtype"), [(64, jnp.bfloat16), (128, jnp.float32)])
def test_it_lowers_for_a_tpu_forward_and_backward(width, dtype):
    def shape(*size, of=dtype):
        return jax.ShapeDtypeStruct(size, of)

    felt = {name: shape(2, 512, n, width) for name, n in zip(NAMES, (4, 2, 2), strict=True)}
    felt |= {"rates": shape(2, width, of=jnp.float32)} | {n: shape(4, of=jnp.float32) for n in ("slopes", "sink")}
    given = {"segment_ids": shape(2, 512, of=jnp.int32), "traced_window": shape(of=jnp.int32)}
    step = jax.jit(lambda felt, d, given: run(felt, d, scale=0.1, softcap=30.0, interpret=False, **given))
    made = export.export(step, platforms=["tpu"])(felt, shape(2, 512, 4, width), given)
    assert made.mlir_module().count("tpu_custom_call") == 3  # one forward, two backward


def test_a_tile_that_a_tpu_cannot_cut_is_refused():
    felt, _ = draw(60)
    for tile in (0, 20):
        with pytest.raises(ValueError, match=f"multiple of 16 tokens, got {tile}"):
            pallas_attention(*felt.values(), scale=1.0, tile=tile)
