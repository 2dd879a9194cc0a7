# SPDX-License-Identifier: Apache-2.0
"""Scores whose channels decay with distance, through factors at queries and at keys.

For an anchor r, exp(-rate (m - n)) = exp(-rate (m - r)) exp(-rate (r - n)): with r between n and m both exponents are
<= 0 and nothing can overflow; with r in the middle of a row that is short enough neither leaves float32's range.
"""

from typing import Any

import jax
import jax.numpy as jnp

REACH = 80.0  # rate * span up to which centred factors stay exact: within exp(+-40), of the 88 that float32 has


def centred_refusal(max_rate: float | None, span: int, dtype: Any) -> str | None:
    """Why `centred` cannot be used, or None if it can.

    Args:
      max_rate: what no rate exceeds, or None if that is not known.
      span: largest difference of clocks in a row.
      dtype: of queries and keys.
    """
    if max_rate is None:
        return "its rates are learned without a bound (give gap_max, or max_rate)"
    if max_rate * span > REACH:
        return f"it needs max rate x span <= {REACH:g}, got {max_rate:g} x {span} = {max_rate * span:.1f}"
    if dtype == jnp.float16:
        return "float16 ends at exp(11): use bfloat16 or float32"
    return None


def centred(
    query_BLNH: jax.Array,
    key_BLKH: jax.Array,
    rates_KH: jax.Array,
    clock: jax.Array,
    *,
    ends: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys whose plain products are the decayed ones, for any attention that selects its mask.

    query * exp(-rate (clock - r)), key * exp(rate (clock - r)), r the middle of the row.  Products with keys of the
    future are large and finite: attention that masks by adding a number would let them through.

    Args:
      query_BLNH: [B, L, N, H].
      key_BLKH: [B, L, K, H].
      rates_KH: float32 [1 or K, H].
      clock: [B or 1, L] int32, never decreasing.  A row whose span times the largest rate exceeds `REACH` becomes NaN.
      ends: [B or 1, 2] int32, first and last clock of the whole rows of which these are a part; None: they are whole.
    """
    first, last = (clock[:, :1], clock[:, -1:]) if ends is None else (ends[:, :1], ends[:, 1:])
    middle = first + (last - first) // 2
    place = (clock - middle)[:, :, None, None].astype(jnp.float32)
    span = (last - first)[:, 0].astype(jnp.float32)
    lost = jnp.where(span * jnp.max(rates_KH) > 1.001 * REACH, jnp.nan, 1.0)[:, None, None, None]
    rates_NH = rates_KH
    if rates_KH.shape[0] > 1:
        rates_NH = jnp.repeat(rates_KH, query_BLNH.shape[2] // rates_KH.shape[0], axis=0)
    down, up = jnp.exp(-rates_NH[None, None] * place) * lost, jnp.exp(rates_KH[None, None] * place)
    query = (query_BLNH.astype(jnp.float32) * down).astype(query_BLNH.dtype)
    return query, (key_BLKH.astype(jnp.float32) * up).astype(key_BLKH.dtype)


def first_tiles(segment_ids: jax.Array | None, window: int | jax.Array | None, length: int, tile: int) -> jax.Array:
    """Tiles before it hold no key that a query of the tile may see.

    Args:
      segment_ids: [B, L] int32, each segment one run, or None.
      window: tokens seen, itself included, an int or a traced int32 scalar; None: all.
      length: L, a multiple of the tile.
      tile: tokens.
    Returns: [B or 1, L / tile] int32, never falling along a row.
    """
    begin = jnp.arange(0, length, tile, dtype=jnp.int32)[None]
    start = jnp.zeros_like(begin)
    if window is not None:
        start = jnp.maximum(start, begin - jnp.asarray(window, jnp.int32) + 1)
    if segment_ids is not None:
        new = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        index = jnp.arange(length, dtype=jnp.int32)[None]
        starts = jax.lax.cummax(jnp.where(new, index, 0), axis=1)  # of each token's segment
        start = jnp.maximum(start, starts[:, ::tile])
    return start // tile


def rate_gradient(
    query: jax.Array,
    key: jax.Array,
    d_query: jax.Array,
    d_key: jax.Array,
    place_of_query: jax.Array,
    place_of_key: jax.Array,
    *,
    shared: bool,
) -> jax.Array:
    """d rate_c = -sum_t place_t (q_tc dq_tc - k_tc dk_tc): the rates' gradient in closed form, from no scores.

    Args:
      query: [n, B, K, G * Q, H], n tiles of Q tokens, G query heads a key head.
      key: [n, B, K, Q, H].
      d_query: float32, as the query; gradients before they are rounded.
      d_key: float32, as the key.
      place_of_query: [n, B or 1, Q] float32, from `from_the_middle`.
      place_of_key: as that; the queries may be a part of the tokens, the n of both need not be equal.
      shared: whether one row of rates serves all heads.
    Returns: [1 or K, H] float32.
    """
    felt = jnp.sum(key.astype(jnp.float32) * d_key * place_of_key[:, :, None, :, None], axis=(0, 1, 3))
    place = jnp.tile(place_of_query[:, :, None, :, None], (1, 1, 1, query.shape[3] // key.shape[3], 1))
    felt = felt - jnp.sum(query.astype(jnp.float32) * d_query * place, axis=(0, 1, 3))
    return jnp.sum(felt, axis=0, keepdims=True) if shared else felt


def from_the_middle(clock: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Clocks less that of the middle of the token's segment, [B or 1, L] float32.

    Any origin would do, as sum_t q_tc dq_tc = sum_t k_tc dk_tc in a segment; the middle keeps rounding small.

    Args:
      clock: [B or 1, L] int32.
      segment_ids: [B, L] int32, each segment one run, or None.
    """
    if segment_ids is None:
        first, last = clock[:, :1], clock[:, -1:]
    else:
        clock = jnp.broadcast_to(clock, segment_ids.shape)
        border = segment_ids[:, 1:] != segment_ids[:, :-1]
        begins, ends = jnp.pad(border, ((0, 0), (1, 0))), jnp.pad(border, ((0, 0), (0, 1)))
        least, most = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
        begins, ends = begins.at[:, 0].set(True), ends.at[:, -1].set(True)
        first = jax.lax.cummax(jnp.where(begins, clock, least), axis=1)
        last = jax.lax.cummin(jnp.where(ends, clock, most), axis=1, reverse=True)
    return (clock - first - (last - first) // 2).astype(jnp.float32)
