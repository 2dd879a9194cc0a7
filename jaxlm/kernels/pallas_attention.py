# SPDX-License-Identifier: Apache-2.0
"""Decaying causal attention as Pallas kernels for TPU: the same function as `tiled_attention`.

B batch, L tokens, P tokens with padding, N query heads, K key heads, G = N / K, H head width; n tiles of T tokens.
Queries lie as [B, N, P, H], keys and values as [B, K, P, H]; a number a query as [B, N, n, 1, T], because a last
dimension of 1 would fill 128 lanes.  In a kernel b, h, i, j are row, query head, query tile, key tile.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlm.kernels.blocked_attention import MASKED, SAVED
from jaxlm.kernels.decay import REACH, first_tiles, from_the_middle, rate_gradient
from jaxlm.kernels.pallas_tiles import (
    dot,
    down,
    finish,
    own,
    own_pull_key,
    own_pull_query,
    past,
    pulled,
    store_down,
    turned,
)

SUBLANES = 16  # rows of a bfloat16 register: tiles are multiples of it


class _Plan(NamedTuple):
    """What a kernel is compiled for."""

    scale: float
    softcap: float | None
    tile: int
    interpret: bool


class _Arrays(NamedTuple):
    """What the tiles are cut from, beside queries, keys and values; None where there is none."""

    rates: jax.Array | None  # float32 [1 or K, 1, H]
    slopes: jax.Array | None  # float32 [N]
    sink: jax.Array | None  # float32 [N]
    clock: jax.Array  # int32 [B or 1, P]
    segments: jax.Array | None  # int32 [B, P]
    window: jax.Array | None  # int32 [1]


def pallas_attention(
    query_BLNH: jax.Array,
    key_BLKH: jax.Array,
    value_BLKH: jax.Array,
    *,
    scale: float,
    rates: jax.Array | None = None,
    slopes: jax.Array | None = None,
    clock: jax.Array | None = None,
    sink: jax.Array | None = None,
    softcap: float | None = None,
    segment_ids: jax.Array | None = None,
    window: int | jax.Array | None = None,
    tile: int = 128,
    interpret: bool | None = None,
) -> jax.Array:
    """softmax(cap(scale * s) - slope (clock_i - clock_j)) v,  s_ij = sum_c exp(-rate_c (clock_i - clock_j)) q_ic k_jc.

    Over keys j <= i, i - j < window, of the segment of i: what `tiled_attention` computes, in one kernel forward and
    two backward (queries; keys and values).  Factors, scores and statistics are float32; products of tiles take their
    operands in the input's dtype.  Keys are faded towards the end of their tile once, outside; a pair of tiles then
    needs one factor a channel.  Pairs outside the window, the segments and the past are neither fetched nor computed.

    A mesh: XLA refuses to divide a kernel (NotImplementedError).  Call it inside `jax.shard_map(..., check_vma=False)`
    over rows and heads, K divided as N is, as are rates of K heads; a row's tokens stay whole.

    Args:
      query_BLNH: [B, L, N, H].
      key_BLKH: [B, L, K, H], K divides N; head n reads key head n // G.
      value_BLKH: [B, L, K, H].
      scale: of the scores, before the cap.
      rates: float32 [1 or K, H], >= 0, 1/token; None: nothing decays.
      slopes: float32 [N] >= 0; None: no bias.
      clock: [B or 1, L] int32, never decreasing; None: indices.
      sink: float32 [N], a score of each head that takes weight and gives nothing; None: none.
      softcap: s becomes softcap * tanh(s / softcap), after the scale; None leaves it.
      segment_ids: [B, L] int32, each segment one run; None: one segment.
      window: tokens seen, itself included, an int or a traced int32 scalar; None: all.
      tile: tokens, the sides of a tile, a multiple of 16.  A tile whose span times the largest rate exceeds 80 meets
        itself channel by channel, which is slow: smaller tiles avoid it.
      interpret: run in plain XLA, to test; None: unless the default backend is a TPU.
    Returns: [B, L, N, H] in the dtype of the query.
    Raises: ValueError if `tile` is not a multiple of 16.

    >>> x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    >>> print(pallas_attention(x, x, x, scale=1.0, rates=jnp.full((1, 8), 0.1)).shape)
    (1, 5, 2, 8)

    Source: as `tiled_attention`.
    """
    if tile < SUBLANES or tile % SUBLANES:
        raise ValueError(
            f"tile must be a multiple of {SUBLANES} tokens, got {tile}: a TPU reads {SUBLANES} rows at once"
        )
    L = query_BLNH.shape[1]
    tile = min(tile, L + -L % SUBLANES)
    pad = ((0, 0), (0, -L % tile))
    clock = jnp.arange(L, dtype=jnp.int32)[None] if clock is None else clock
    arrays = _Arrays(
        rates=None if rates is None else rates.astype(jnp.float32)[:, None],
        slopes=None if slopes is None else slopes.astype(jnp.float32),
        sink=None if sink is None else sink.astype(jnp.float32),
        clock=jnp.pad(clock, pad, mode="edge"),
        segments=None if segment_ids is None else jnp.pad(segment_ids, pad, mode="edge"),
        window=None if window is None else jnp.asarray(window, jnp.int32).reshape(1),
    )
    interpret = jax.default_backend() != "tpu" if interpret is None else interpret
    laid = (jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), *pad, (0, 0))) for x in (query_BLNH, key_BLKH, value_BLKH))
    return _attend(*laid, arrays, _Plan(scale, softcap, tile, interpret))[:, :, :L].transpose(0, 2, 1, 3)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, arrays, plan):
    return _forward(query, key, value, arrays, plan)[0]


def _forward(query, key, value, arrays, plan):
    query, key, value = (checkpoint_name(x, SAVED) for x in (query, key, value))
    B, N, P, H = query.shape
    T = plan.tile
    out, log_sum = _launch(
        _forward_kernel,
        plan,
        arrays,
        {"query": query, **_keys(key, arrays, plan), "value": value},
        {
            "out": jax.ShapeDtypeStruct(query.shape, query.dtype),
            "log_sum": jax.ShapeDtypeStruct((B, N, P // T, 1, T), jnp.float32),
        },
        {"top": (T, 1), "total": (T, 1), "mixed": (T, H), "down": (T, H)},
    )
    out, log_sum = checkpoint_name(out, SAVED), checkpoint_name(log_sum, SAVED)
    return out, (query, key, value, arrays, out, log_sum)


def _backward(plan, saved, d_out):
    query, key, value, arrays, out, log_sum = saved
    B, _, _, H = query.shape
    K, T = key.shape[1], plan.tile
    inner = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).reshape(log_sum.shape)
    common = {"query": query, "value": value, "d_out": d_out, "log_sum": log_sum, "inner": inner}
    unrounded = arrays.rates is not None  # the rates' gradient lives on what rounding would take
    like_query, like_key = (jax.ShapeDtypeStruct(x.shape, jnp.float32 if unrounded else x.dtype) for x in (query, key))
    outputs = {"d_query": like_query}
    if arrays.slopes is not None:
        outputs["fall"] = jax.ShapeDtypeStruct(log_sum.shape, jnp.float32)
    d_query, *fall = _launch(
        _query_kernel,
        plan,
        arrays,
        common | _keys(key, arrays, plan),
        outputs,
        {"log_sum": (T, 1), "inner": (T, 1), "fall": (T, 1), "down": (T, H), "d_down": (T, H)},
    )
    d_key, d_value = _launch(
        _key_kernel,
        plan,
        arrays,
        common | {"key": key},
        {"d_key": like_key, "d_value": jax.ShapeDtypeStruct(value.shape, value.dtype)},
        {"d_faded": (T, H), "d_own": (T, H), "d_mixed": (T, H), "fade": (T, H)},
    )
    d_rates = d_sink = None
    if arrays.rates is not None:
        place = from_the_middle(arrays.clock, arrays.segments)
        rows = [x.reshape(1, B, K, -1, H) for x in (query, key, d_query, d_key)]  # the heads of a key one after another
        d_rates = rate_gradient(*rows, place[None], place[None], shared=arrays.rates.shape[0] == 1)[:, None]
    if arrays.sink is not None:
        share = jnp.exp(arrays.sink[None, :, None, None, None] - log_sum)
        d_sink = -jnp.sum(share * inner, axis=(0, 2, 3, 4))
    d_slopes = -jnp.sum(fall[0], axis=(0, 2, 3, 4)) if fall else None
    d_arrays = _Arrays(d_rates, d_slopes, d_sink, None, None, None)
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value, d_arrays


_attend.defvjp(_forward, _backward)


def _keys(key, arrays, plan):
    """The keys as past tiles' queries see them, in their own dtype, and those that the tile itself sees."""
    if arrays.rates is None:
        return {"key": key}
    P, T = key.shape[2], plan.tile
    clock = arrays.clock.reshape(-1, P // T, T)
    left = (clock[:, :, -1:] - clock).astype(jnp.float32).reshape(-1, 1, P, 1)
    faded = (key.astype(jnp.float32) * jnp.exp(-arrays.rates[None] * left)).astype(key.dtype)
    return {"key": faded, "own": key}


# Launching: what every kernel is given, and how it is cut.


class _Scalars(NamedTuple):
    """Numbers a tile, prefetched, because they decide what is fetched; [B or 1, n] unless said."""

    starts: Any  # int32, first clock
    ends: Any  # int32, last clock
    near: Any  # int32, 1 where centred factors reach over the tile
    first: Any  # int32, the first key tile that a query tile may see
    last: Any  # int32, the last query tile that may see a key tile
    window: Any  # int32 [1]
    slopes: Any  # float32 [N]
    sink: Any  # float32 [N]

    def of(self, name, b, i):
        rows = getattr(self, name)
        return rows[b if rows.shape[0] > 1 else 0, i]


def _scalars(arrays, tile):
    P = arrays.clock.shape[1]
    starts, ends = arrays.clock[:, ::tile], arrays.clock[:, tile - 1 :: tile]
    near = jnp.ones(starts.shape, jnp.int32)
    if arrays.rates is not None:
        near = ((ends - starts).astype(jnp.float32) * jnp.max(arrays.rates) <= REACH).astype(jnp.int32)
    first = first_tiles(arrays.segments, None if arrays.window is None else arrays.window[0], P, tile)
    tiles = jnp.arange(P // tile, dtype=jnp.int32)
    last = jnp.sum(first[:, None, :] <= tiles[None, :, None], axis=2, dtype=jnp.int32) - 1  # `first` never falls
    return _Scalars(starts, ends, near, first, last, arrays.window, arrays.slopes, arrays.sink)


def _launch(kernel: Callable, plan: _Plan, arrays: _Arrays, inputs: dict, outputs: dict, scratch: dict) -> list[Any]:
    """Runs a kernel over all pairs of tiles; keys' tiles move fastest, for `_key_kernel` those of queries."""
    (B, N, P, H), K, T = inputs["query"].shape, inputs["key"].shape[1], plan.tile
    G, count = N // K, P // T

    # A pair that is not computed names the blocks of its neighbour, so that nothing is fetched for it.
    def by_query(b, h, i, j, scalars):
        return b, h, i, jnp.clip(j, scalars.of("first", b, i), i)

    def by_key(b, k, j, g, i, scalars):
        return b, k * G + g, jnp.clip(i, j, scalars.of("last", b, j)), j

    keys_first = kernel is _key_kernel
    tiles = by_key if keys_first else by_query

    def spec(shape, index):
        return pl.BlockSpec(shape, lambda *place: index(*tiles(*place)))

    def of_tokens(rows, shape, of_key):  # a number a token: the same of every head
        return spec((None, None, *shape), lambda b, h, i, j: (b if rows > 1 else 0, j if of_key else i, 0, 0))

    of_queries = spec((None, None, T, H), lambda b, h, i, j: (b, h, i, 0))
    of_keys = spec((None, None, T, H), lambda b, h, i, j: (b, jax.lax.div(h, G), j, 0))
    of_own = spec((None, None, T, H), lambda b, h, i, j: (b, jax.lax.div(h, G), i, 0))
    of_rows = spec((None, None, None, 1, T), lambda b, h, i, j: (b, h, i, 0, 0))
    specs = dict.fromkeys(("query", "d_out", "out", "d_query"), of_queries)
    specs |= dict.fromkeys(("key", "value", "d_key", "d_value"), of_keys)
    specs |= {"own": of_own} | dict.fromkeys(("log_sum", "inner", "fall"), of_rows)

    inputs = dict(inputs)
    if arrays.rates is not None:
        each = arrays.rates.shape[0] > 1
        inputs["rates"] = arrays.rates
        specs["rates"] = spec((None, 1, H), lambda b, h, i, j: (jax.lax.div(h, G) if each else 0, 0, 0))
    for name, x in (("clock", arrays.clock), ("segments", arrays.segments)):
        if x is not None:
            inputs[f"{name}_queries"] = x.reshape(-1, count, T, 1)
            inputs[f"{name}_keys"] = x.reshape(-1, count, 1, T)
            specs[f"{name}_queries"] = of_tokens(x.shape[0], (T, 1), of_key=False)
            specs[f"{name}_keys"] = of_tokens(x.shape[0], (1, T), of_key=True)
    over = (G, count) if keys_first else (count,)  # what is summed over in scratch, in this order
    made = pl.pallas_call(
        partial(kernel, plan, (G, count)),
        out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K if keys_first else N, count, *over),
            in_specs=[{name: specs[name] for name in inputs}],
            out_specs={name: specs[name] for name in outputs},
            scratch_shapes=[{name: pltpu.VMEM(shape, jnp.float32) for name, shape in scratch.items()}],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.PARALLEL,) * 3 + (pltpu.ARBITRARY,) * len(over)
        ),
        interpret=plan.interpret,
        name=kernel.__name__.strip("_"),
    )(_scalars(arrays, T), inputs)
    return [made[name] for name in outputs]


# The kernels.  `s` are the scalars, `x` the inputs, `y` the outputs, `z` the scratch: references by name.


def _forward_kernel(plan, sizes, s, x, y, z):
    b, h, i, j = (pl.program_id(axis) for axis in range(4))

    @pl.when(j == 0)
    def _():
        z["top"][...] = jnp.full_like(z["top"], MASKED)
        z["total"][...] = jnp.zeros_like(z["total"])
        z["mixed"][...] = jnp.zeros_like(z["mixed"])
        store_down(s, x, z, b, i)

    def add(products, itself):
        scores = finish(plan, s, x, h, i, j, products, itself)[0]
        top = z["top"][...]
        higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
        weights, shrink = jnp.exp(scores - higher), jnp.exp(top - higher)
        z["total"][...] = z["total"][...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        z["mixed"][...] = z["mixed"][...] * shrink + dot(weights, x["value"][...], 1, 0)
        z["top"][...] = higher

    @pl.when((s.of("first", b, i) <= j) & (j < i))
    def _():
        add(past(s, x, z, b, i, j)[0], itself=False)

    @pl.when(j == i)  # last, as it shows every query a key: that wipes out what masked tiles have left
    def _():
        add(own(s, x, b, i), itself=True)
        top, total, mixed = z["top"][...], z["total"][...], z["mixed"][...]
        if s.sink is not None:
            higher = jnp.maximum(top, s.sink[h])
            shrink = jnp.exp(top - higher)
            top, total, mixed = higher, total * shrink + jnp.exp(s.sink[h] - higher), mixed * shrink
        y["out"][...] = (mixed / total).astype(y["out"].dtype)
        y["log_sum"][...] = turned(top + jnp.log(total))


def _query_kernel(plan, sizes, s, x, y, z):
    b, h, i, j = (pl.program_id(axis) for axis in range(4))

    @pl.when(j == 0)
    def _():
        z["log_sum"][...], z["inner"][...] = turned(x["log_sum"][...]), turned(x["inner"][...])
        z["fall"][...] = jnp.zeros_like(z["fall"])
        z["d_down"][...] = jnp.zeros_like(z["d_down"])
        store_down(s, x, z, b, i)

    def of_products(products, itself):
        _, d_products, fall = pulled(plan, s, x, h, i, j, products, z["log_sum"][...], z["inner"][...], itself)
        if fall is not None:
            z["fall"][...] += fall
        return d_products

    @pl.when((s.of("first", b, i) <= j) & (j < i))
    def _():
        products, between = past(s, x, z, b, i, j)
        d_left = dot(of_products(products, itself=False), x["key"][...], 1, 0)
        z["d_down"][...] += d_left if between is None else d_left * between

    @pl.when(j == i)
    def _():
        d_products = of_products(own(s, x, b, i), itself=True)
        d_past = z["d_down"][...] if "rates" not in x else z["d_down"][...] * down(s, x, b, i)
        y["d_query"][...] = (d_past + own_pull_query(s, x, b, i, d_products)).astype(y["d_query"].dtype)
        if "fall" in y:
            y["fall"][...] = turned(z["fall"][...])


def _key_kernel(plan, sizes, s, x, y, z):
    G, count = sizes
    b, k, j, g, i = (pl.program_id(axis) for axis in range(5))
    h = k * G + g

    @pl.when((g == 0) & (i == 0))
    def _():
        for name in ("d_faded", "d_own", "d_mixed"):
            z[name][...] = jnp.zeros_like(z[name])
        if "rates" in x:
            left = turned((s.of("ends", b, j) - x["clock_keys"][...]).astype(jnp.float32))
            z["fade"][...] = jnp.exp(-x["rates"][...] * left)

    def of_products(products, itself):
        log_sum, inner = turned(x["log_sum"][...]), turned(x["inner"][...])
        weights, d_products, _ = pulled(plan, s, x, h, i, j, products, log_sum, inner, itself)
        z["d_mixed"][...] += dot(weights, x["d_out"][...], 0, 0)
        return d_products

    @pl.when((j < i) & (i <= s.of("last", b, j)))
    def _():
        query, key = x["query"][...], x["key"][...]
        if "rates" in x:  # both factors of the queries at once
            gap = (x["clock_queries"][...] - s.of("ends", b, j)).astype(jnp.float32)
            query = (query.astype(jnp.float32) * jnp.exp(-x["rates"][...] * gap)).astype(key.dtype)
            key = (key.astype(jnp.float32) * z["fade"][...]).astype(key.dtype)
        d_products = of_products(dot(query, key, 1, 1), itself=False)
        z["d_faded"][...] += dot(d_products, query, 0, 0)

    @pl.when(i == j)
    def _():
        d_products = of_products(own(s, x, b, i), itself=True)
        z["d_own"][...] += own_pull_key(s, x, b, i, d_products)

    @pl.when((g == G - 1) & (i == count - 1))
    def _():
        d_past = z["d_faded"][...] if "rates" not in x else z["d_faded"][...] * z["fade"][...]
        y["d_key"][...] = (d_past + z["d_own"][...]).astype(y["d_key"].dtype)
        y["d_value"][...] = z["d_mixed"][...].astype(y["d_value"].dtype)
