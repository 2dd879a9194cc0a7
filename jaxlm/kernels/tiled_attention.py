# SPDX-License-Identifier: Apache-2.0
"""Causal attention tile by tile: memory linear in the length, decaying channels exact at any range.

B batch, L queries, M keys (the same tokens, unless `at` says which of them), N query heads, K key heads, G = N / K,
H head width; n tiles of Q tokens.  Whole arrays lie as [n, B, K, G * Q, H] (queries) and [n, B, K, Q, H] (keys,
values), so that a tile is one slice.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.kernels.blocked_attention import MASKED, SAVED
from jaxlm.kernels.decay import REACH, first_tiles, from_the_middle, rate_gradient
from jaxlm.kernels.products import contract

_EXACT = jax.lax.Precision.HIGHEST  # of float32 products: some devices would round their operands


class _Options(NamedTuple):
    scale: float
    softcap: float | None


class _Arrays(NamedTuple):
    """What the tiles are cut from, beside queries, keys and values; None where there is none."""

    rates_KH: jax.Array | None  # float32 [1 or K, H]
    slopes_KG: jax.Array | None
    sink_KG: jax.Array | None
    clock: jax.Array  # int32 [n, B or 1, Q]
    indices: jax.Array  # int32 [n, Q]
    segments: jax.Array | None  # int32 [n, B, Q]
    window: jax.Array | None  # int32 scalar
    first: jax.Array  # int32 [n], the first tile of keys that any query of a tile may see
    near: jax.Array  # bool [n], whether centred factors reach over the tile
    at: jax.Array | None  # int32, the tile of keys that each tile of queries is; None: the same one


def tiled_attention(
    query_BLNH: jax.Array,
    key_BMKH: jax.Array,
    value_BMKH: jax.Array,
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
    at: jax.Array | None = None,
) -> jax.Array:
    """softmax(cap(scale * s) - slope (clock_i - clock_j)) v,  s_ij = sum_c exp(-rate_c (clock_i - clock_j)) q_ic k_jc.

    Over keys j <= i, i - j < window, of the segment of i.  Between two tiles the anchor of the factors is the last key,
    so every exponent is <= 0; inside a tile it is the middle, or, where rates are too fast for that, every channel is
    summed by itself.  Online softmax in float32; the backward pass makes the scores again from the log-sum-exp.

    The rates' gradient needs no scores: d rate_c = -sum_t clock_t (q_tc dq_tc - k_tc dk_tc), clocks counted from the
    middle of the segment, gradients before they are rounded.

    Args:
      query_BLNH: [B, L, N, H].
      key_BMKH: [B, M, K, H], K divides N; head n reads key head n // G.
      value_BMKH: [B, M, K, H].
      scale: of the scores, before the cap.
      rates: float32 [1 or K, H], >= 0, 1/token; None: nothing decays.
      slopes: float32 [N] >= 0; None: no bias.
      clock: [B or 1, M] int32, never decreasing; None: indices.
      sink: float32 [N], a score of each head that takes weight and gives nothing; None: none.
      softcap: s becomes softcap * tanh(s / softcap), after the scale; None leaves it.
      segment_ids: [B, M] int32, each segment one run; None: one segment.
      window: tokens seen, itself included, an int or a traced int32 scalar; None: all.  Tiles outside are skipped.
      tile: tokens, the sides of a tile.
      at: int32 [L / tile], for queries that are a part of the tokens: tile i of theirs is tile `at[i]` of the keys.
        Under remat the keys and values are then made again (gathered again) and not kept.  None: L = M, in order.
    Returns: [B, L, N, H] in the dtype of the query.
    Raises: ValueError for an `at` whose tiles do not divide queries and keys.

    Source: the tiles as in arXiv:2205.14135; the anchors as in gated linear attention (arXiv:2312.06635, section 4).
    """
    B, L, N, H = query_BLNH.shape
    M, K = key_BMKH.shape[1:3]
    G, tile = N // K, min(tile, L)
    if at is not None and (L % tile or M % tile or at.shape != (L // tile,)):
        raise ValueError(f"tiles of {tile} tokens, of {at.shape} places, do not divide {L} queries and {M} keys")
    pad = -M % tile
    count = (M + pad) // tile

    def cut(x: jax.Array, mode: str = "constant") -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)), mode=mode)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, tile, *x.shape[2:]), 1, 0)

    clock = jnp.arange(M, dtype=jnp.int32)[None] if clock is None else clock
    whole = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, pad)), mode="edge")
    segments = None if segment_ids is None else cut(segment_ids, "edge")
    arrays = _Arrays(
        rates_KH=None if rates is None else rates.astype(jnp.float32),
        slopes_KG=None if slopes is None else slopes.astype(jnp.float32).reshape(K, G),
        sink_KG=None if sink is None else sink.astype(jnp.float32).reshape(K, G),
        clock=cut(clock, "edge"),
        indices=jnp.arange(count * tile, dtype=jnp.int32).reshape(count, tile),
        segments=segments,
        window=None if window is None else jnp.asarray(window, jnp.int32),
        first=jnp.min(first_tiles(whole, window, count * tile, tile), axis=0),
        near=jnp.ones(count, bool),
        at=at,
    )
    if arrays.rates_KH is not None:
        span = jnp.max(arrays.clock[..., -1] - arrays.clock[..., 0], axis=1)
        arrays = arrays._replace(near=span.astype(jnp.float32) * jnp.max(arrays.rates_KH) <= REACH)
    query = cut(query_BLNH.reshape(B, L, K, G, H)).transpose(0, 1, 3, 4, 2, 5).reshape(-1, B, K, G * tile, H)
    key, value = (cut(x).transpose(0, 1, 3, 2, 4) for x in (key_BMKH, value_BMKH))
    out = _attend(query, key, value, arrays, _Options(scale, softcap))
    out = out.reshape(-1, B, K, G, tile, H).transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, N, H)
    return out[:, :L]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query, key, value, arrays, options):
    return _forward(query, key, value, arrays, options)[0]


def _forward(query, key, value, arrays, options):
    query = checkpoint_name(query, SAVED)
    if arrays.at is None:
        key, value = checkpoint_name(key, SAVED), checkpoint_name(value, SAVED)
    faded = _faded_keys(key, arrays)

    def one_tile(turn):
        q, i = query[turn], _tile_of(turn, arrays)
        q_down = _down(q, arrays, i)

        def add(carry, scores, v):
            top, total, mixed = carry
            higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - higher), jnp.exp(top - higher)
            total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            return higher, total, mixed * shrink + contract("bkqm,bkmh->bkqh", weights, v)

        def past(j, carry):
            scores = _finish(_past(q_down, faded, arrays, i, j)[0], arrays, i, j, options)[0]
            return add(carry, scores, value[j])

        column = (*q.shape[:-1], 1)
        empty = (jnp.full(column, MASKED), jnp.zeros(column), jnp.zeros(q.shape, jnp.float32))
        # The tile itself comes last: it shows every query a key, which wipes out what masked tiles have left.
        carry = jax.lax.fori_loop(arrays.first[i], i, past, empty)
        top, total, mixed = add(carry, _finish(_own(q, key[i], arrays, i), arrays, i, i, options)[0], value[i])
        if arrays.sink_KG is not None:
            sink = _by_row(arrays.sink_KG, q)
            higher = jnp.maximum(top, sink)
            shrink = jnp.exp(top - higher)
            top, total, mixed = higher, total * shrink + jnp.exp(sink - higher), mixed * shrink
        return (mixed / total).astype(q.dtype), top + jnp.log(total)

    out, log_sum = jax.lax.map(one_tile, jnp.arange(query.shape[0], dtype=jnp.int32))
    out, log_sum = checkpoint_name(out, SAVED), checkpoint_name(log_sum, SAVED)
    return out, (query, key, value, arrays, out, log_sum)


def _backward(options, saved, d_out):
    query, key, value, arrays, out, log_sum = saved
    faded = _faded_keys(key, arrays)

    def one_tile(carry, turn):
        q, d, i = query[turn], d_out[turn], _tile_of(turn, arrays)
        q_down = _down(q, arrays, i)
        inner = jnp.sum(out[turn].astype(jnp.float32) * d.astype(jnp.float32), axis=-1, keepdims=True)

        def of_scores(carry, products, j):
            """Gradient of the products q k of one tile; adds to those of values and slopes."""
            d_key, d_value, d_slopes = carry
            scores, slope = _finish(products, arrays, i, j, options)
            weights = jnp.exp(scores - log_sum[turn])
            d_scores = weights * (contract("bkqh,bkmh->bkqm", d, value[j]) - inner)
            d_value = d_value.at[j].add(contract("bkqm,bkqh->bkmh", weights, d))
            if arrays.slopes_KG is not None:
                G = arrays.slopes_KG.shape[1]
                distance = _distance(arrays, i, j)[:, None, None]
                d_slopes = d_slopes - jnp.sum(_by_head(d_scores, G) * distance, axis=(0, 3, 4))
            return (d_key, d_value, d_slopes), d_scores * (options.scale if slope is None else options.scale * slope)

        def past(j, carry):
            d_q, carry = carry
            products, left, k = _past(q_down, faded, arrays, i, j)
            carry, d_products = of_scores(carry, products, j)
            d_left = contract("bkqm,bkmh->bkqh", d_products, k)
            d_k = contract("bkqm,bkqh->bkmh", d_products, left)
            if arrays.rates_KH is not None:
                d_left = d_left * _between(arrays, i, j)
                d_k = d_k * _fade(arrays, j)
            return d_q + d_left, (carry[0].at[j].add(d_k), *carry[1:])

        d_down, carry = jax.lax.fori_loop(arrays.first[i], i, past, (jnp.zeros(q.shape, jnp.float32), carry))
        d_q = d_down if arrays.rates_KH is None else d_down * _down_factor(arrays, i, q)
        products, pull = _own_with_pull(q, key[i], arrays, i)
        carry, d_products = of_scores(carry, products, i)
        d_q_own, d_k_own = pull(d_products)
        d_sink = jnp.zeros(())
        if arrays.sink_KG is not None:
            G = arrays.sink_KG.shape[1]
            d_sink = -jnp.sum(_by_head(jnp.exp(_by_row(arrays.sink_KG, q) - log_sum[turn]) * inner, G), axis=(0, 3, 4))
        return (carry[0].at[i].add(d_k_own), *carry[1:]), (d_q + d_q_own, d_sink)

    zero = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
    slopes = jnp.zeros(()) if arrays.slopes_KG is None else jnp.zeros(arrays.slopes_KG.shape)
    (d_key, d_value, d_slopes), (d_query, d_sink) = jax.lax.scan(
        one_tile, (*zero, slopes), jnp.arange(query.shape[0], dtype=jnp.int32)
    )
    d_rates = None
    if arrays.rates_KH is not None:
        place = _from_the_middle(arrays)
        places = (place if arrays.at is None else place[arrays.at], place)
        d_rates = rate_gradient(query, key, d_query, d_key, *places, shared=arrays.rates_KH.shape[0] == 1)
    d_arrays = _Arrays(
        rates_KH=d_rates,
        slopes_KG=None if arrays.slopes_KG is None else d_slopes,
        sink_KG=None if arrays.sink_KG is None else jnp.sum(d_sink, axis=0),
        **dict.fromkeys(("clock", "indices", "segments", "window", "first", "near", "at")),
    )
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), d_arrays


_attend.defvjp(_forward, _backward)


def _tile_of(turn, arrays):
    return turn if arrays.at is None else arrays.at[turn]


def _down_factor(arrays, i, q_BKQH):
    """exp(-rate (clock - first clock of the tile)), [B, K, G * Q, H] up to broadcasting."""
    clock = arrays.clock[i]
    G = q_BKQH.shape[2] // clock.shape[1]
    place = jnp.tile((clock - clock[:, :1]).astype(jnp.float32), (1, G))
    return jnp.exp(-arrays.rates_KH[None, :, None] * place[:, None, :, None])


def _down(q, arrays, i):
    return q if arrays.rates_KH is None else q.astype(jnp.float32) * _down_factor(arrays, i, q)


def _fade(arrays, j):
    """exp(-rate (last clock of the tile - clock)), [B, K, Q, H] up to broadcasting."""
    clock = arrays.clock[j]
    left = (clock[:, -1:] - clock).astype(jnp.float32)
    return jnp.exp(-arrays.rates_KH[None, :, None] * left[:, None, :, None])


def _faded_keys(key, arrays):
    """Every key as it looks from the end of its tile, in its own dtype."""
    if arrays.rates_KH is None:
        return key
    return jax.lax.map(
        lambda x: (x[0].astype(jnp.float32) * _fade(arrays, x[1])).astype(key.dtype), (key, jnp.arange(key.shape[0]))
    )


def _between(arrays, i, j):
    """exp(-rate (first clock of tile i - last clock of tile j)), [B, K, 1, H] up to broadcasting, for j < i."""
    gap = (arrays.clock[i][:, 0] - arrays.clock[j][:, -1]).astype(jnp.float32)
    return jnp.exp(-arrays.rates_KH[None, :, None] * gap[:, None, None, None])


def _past(q_down, faded, arrays, i, j):
    """Products [B, K, G * Q, M] float32 of a tile of queries with an earlier one of keys, and the factors of both."""
    left, k = q_down, faded[j]
    if arrays.rates_KH is not None:
        left = (left * _between(arrays, i, j)).astype(k.dtype)
    return contract("bkqh,bkmh->bkqm", left, k), left, k


def _own(q, k, arrays, i):
    """Products of a tile with itself, float32; those with the future are finite and mean nothing."""
    return _own_with_pull(q, k, arrays, i)[0]


def _own_with_pull(q, k, arrays, i):
    """The same, and the function from their gradient to that of queries and keys (float32)."""
    if arrays.rates_KH is None:
        return contract("bkqh,bkmh->bkqm", q, k), lambda d: (
            contract("bkqm,bkmh->bkqh", d, k),
            contract("bkqm,bkqh->bkmh", d, q),
        )
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    near = arrays.near[i]

    def pull(d):
        return jax.lax.cond(near, partial(_centred_pull, arrays, i), partial(_by_channel_pull, arrays, i), q, k, d)

    return jax.lax.cond(near, partial(_centred, arrays, i), partial(_by_channel, arrays, i), q, k), pull


def _centred_factors(arrays, i, q, k):
    clock = arrays.clock[i]
    place = (clock - clock[:, :1] - (clock[:, -1:] - clock[:, :1]) // 2).astype(jnp.float32)
    G = q.shape[2] // k.shape[2]
    exponent = arrays.rates_KH[None, :, None] * place[:, None, :, None]
    return jnp.exp(-jnp.tile(exponent, (1, 1, G, 1))), jnp.exp(exponent)


def _centred(arrays, i, q, k):
    down, up = _centred_factors(arrays, i, q, k)
    return jnp.einsum("bkqh,bkmh->bkqm", q * down, k * up, precision=_EXACT)


def _centred_pull(arrays, i, q, k, d):
    down, up = _centred_factors(arrays, i, q, k)
    d_q = jnp.einsum("bkqm,bkmh->bkqh", d, k * up, precision=_EXACT) * down
    return d_q, jnp.einsum("bkqm,bkqh->bkmh", d, q * down, precision=_EXACT) * up


def _channel_decay(arrays, i, c, G):
    """exp(-rate_c * distance), [B, K, G * Q, M] up to broadcasting, 1 towards the future."""
    clock = arrays.clock[i]
    distance = jnp.maximum(clock[:, :, None] - clock[:, None, :], 0).astype(jnp.float32)
    return jnp.exp(-arrays.rates_KH[None, :, c, None, None] * jnp.tile(distance, (1, G, 1))[:, None])


def _by_channel(arrays, i, q, k):
    G = q.shape[2] // k.shape[2]

    def add(c, products):
        return products + q[..., c][..., :, None] * k[..., c][..., None, :] * _channel_decay(arrays, i, c, G)

    return jax.lax.fori_loop(0, q.shape[-1], add, jnp.zeros((*q.shape[:-1], k.shape[2]), jnp.float32))


def _by_channel_pull(arrays, i, q, k, d):
    G = q.shape[2] // k.shape[2]

    def channel(c):
        faded = d * _channel_decay(arrays, i, c, G)
        d_q = jnp.einsum("bkqm,bkm->bkq", faded, k[..., c], precision=_EXACT)
        return d_q, jnp.einsum("bkqm,bkq->bkm", faded, q[..., c], precision=_EXACT)

    return tuple(jnp.moveaxis(x, 0, -1) for x in jax.lax.map(channel, jnp.arange(q.shape[-1])))


def _distance(arrays, i, j):
    """[B or 1, Q, M] float32 between the queries of tile i and the keys of tile j."""
    return (arrays.clock[i][:, :, None] - arrays.clock[j][:, None, :]).astype(jnp.float32)


def _finish(products, arrays, i, j, options):
    """Scores of a tile from its products: scaled, capped, biased, masked; and the cap's slope where there is a cap."""
    scores, slope = products * options.scale, None
    if options.softcap is not None:
        capped = jnp.tanh(scores / options.softcap)
        scores, slope = options.softcap * capped, 1.0 - jnp.square(capped)
    Q = arrays.indices.shape[1]
    if arrays.slopes_KG is not None:
        fall = arrays.slopes_KG[None, :, :, None, None] * _distance(arrays, i, j)[:, None, None]
        scores = (_by_head(scores, arrays.slopes_KG.shape[1]) - fall).reshape(scores.shape)
    apart = arrays.indices[i][:, None] - arrays.indices[j][None, :]
    seen = apart >= 0
    if arrays.window is not None:
        seen = seen & (apart < arrays.window)
    seen = seen[None]
    if arrays.segments is not None:
        seen = seen & (arrays.segments[i][:, :, None] == arrays.segments[j][:, None, :])
    seen = jnp.tile(seen, (1, scores.shape[2] // Q, 1))[:, None]
    # The slope too: products with the future may have overflowed.
    return jnp.where(seen, scores, MASKED), None if slope is None else jnp.where(seen, slope, 0.0)


def _by_head(x_BKQM, G):
    B, K, rows, M = x_BKQM.shape
    return x_BKQM.reshape(B, K, G, rows // G, M)


def _by_row(x_KG, q_BKQH):
    """A number a head as [1, K, G * Q, 1]."""
    return jnp.repeat(x_KG, q_BKQH.shape[2] // x_KG.shape[1], axis=1)[None, :, :, None]


def _from_the_middle(arrays):
    """[n, B or 1, Q] float32: clocks less that of the middle of the token's segment."""
    count, _, Q = arrays.clock.shape

    def row(x):
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], count * Q)

    place = from_the_middle(row(arrays.clock), None if arrays.segments is None else row(arrays.segments))
    return jnp.moveaxis(place.reshape(-1, count, Q), 1, 0)
