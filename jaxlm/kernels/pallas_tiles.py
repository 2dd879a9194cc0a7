# SPDX-License-Identifier: Apache-2.0
"""One pair of tiles inside the kernels of `pallas_attention`: products, scores and their gradients.

T tokens of a tile, H head width; b, h, i, j are row, query head, query tile, key tile.  `s` holds the scalars, `x` the
inputs and `z` the scratch of a kernel: references by name.  Written with what a TPU has: two dimensions, no slices at
traced places, no division of signed integers.
"""

import jax
import jax.numpy as jnp

from jaxlm.kernels.blocked_attention import MASKED


def finish(plan, s, x, h, i, j, products, itself):
    """Scores of a pair of tiles: scaled, capped, biased, masked; the cap's slope or None; distances or None."""
    scores, slope, distance = products * plan.scale, None, None
    if plan.softcap is not None:
        capped = jnp.tanh(scores / plan.softcap)
        scores, slope = plan.softcap * capped, 1.0 - capped * capped
    if s.slopes is not None:
        distance = (x["clock_queries"][...] - x["clock_keys"][...]).astype(jnp.float32)
        scores = scores - s.slopes[h] * distance
    apart = (i - j) * plan.tile + _index(scores, 0) - _index(scores, 1)
    seen = [apart >= 0] if itself else []
    if s.window is not None:
        seen.append(apart < s.window[0])
    if "segments_keys" in x:
        seen.append(x["segments_queries"][...] == x["segments_keys"][...])
    for each in seen:
        scores = jnp.where(each, scores, MASKED)
        if slope is not None:  # NaN where products with the future have overflown
            slope = jnp.where(each, slope, 0.0)
    return scores, slope, distance


def pulled(plan, s, x, h, i, j, products, log_sum, inner, itself):
    """Weights, the gradient of the products q k, and each query's sum of score gradients times distance or None."""
    scores, slope, distance = finish(plan, s, x, h, i, j, products, itself)
    weights = jnp.exp(scores - log_sum)
    d_scores = weights * (dot(x["d_out"][...], x["value"][...], 1, 1) - inner)
    fall = None if distance is None else jnp.sum(d_scores * distance, axis=1, keepdims=True)
    return weights, d_scores * (plan.scale if slope is None else plan.scale * slope), fall


def down(s, x, b, i):
    """exp(-rate (clock - first clock of the tile)), [T, H]."""
    place = (x["clock_queries"][...] - s.of("starts", b, i)).astype(jnp.float32)
    return jnp.exp(-x["rates"][...] * place)


def store_down(s, x, z, b, i):
    """Fades a tile's queries, once for all its pairs."""
    if "rates" in x:
        z["down"][...] = x["query"][...].astype(jnp.float32) * down(s, x, b, i)


def past(s, x, z, b, i, j):
    """Products [T, T] float32 of a tile of queries with an earlier one of keys, and the factor between, [1, H]."""
    if "rates" not in x:
        return dot(x["query"][...], x["key"][...], 1, 1), None
    gap = (s.of("starts", b, i) - s.of("ends", b, j)).astype(jnp.float32)
    between = jnp.exp(-x["rates"][...] * gap)
    return dot((z["down"][...] * between).astype(x["key"].dtype), x["key"][...], 1, 1), between


def _own_operands(x):
    return x["query"][...], (x["own"] if "own" in x else x["key"])[...]


def _by_reach(s, x, b, i, plain, centred, by_channel):
    """A tile with itself: without rates; by factors from its middle, [T, H] each; or by rates and distances [T, T]."""
    query, key = _own_operands(x)
    if "rates" not in x:
        return plain(query, key)
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)

    def reached():
        start = s.of("starts", b, i)
        place = x["clock_queries"][...] - start - jax.lax.div(s.of("ends", b, i) - start, 2)
        exponent = x["rates"][...] * place.astype(jnp.float32)
        return centred(query, key, jnp.exp(-exponent), jnp.exp(exponent))

    def not_reached():
        distance = jnp.maximum(x["clock_queries"][...] - x["clock_keys"][...], 0).astype(jnp.float32)
        return by_channel(query, key, lambda c: jnp.exp(-_column(x["rates"][...], c) * distance))

    return jax.lax.cond(s.of("near", b, i) > 0, reached, not_reached)


def own(s, x, b, i):
    """Products of a tile with itself, float32; those with the future are finite and mean nothing."""

    def by_channel(query, key, decay):
        def add(c, products):
            return products + _column(query, c) * turned(_column(key, c)) * decay(c)

        return jax.lax.fori_loop(0, query.shape[1], add, jnp.zeros((query.shape[0],) * 2, jnp.float32))

    def centred(query, key, down, up):
        return dot(query * down, key * up, 1, 1)

    return _by_reach(s, x, b, i, lambda query, key: dot(query, key, 1, 1), centred, by_channel)


def own_pull_query(s, x, b, i, d):
    """Gradient of the queries [T, H] float32 from that of `own`."""

    def by_channel(query, key, decay):
        def fill(c, d_query):
            column = jnp.sum(d * decay(c) * turned(_column(key, c)), axis=1, keepdims=True)
            return jnp.where(_index(d_query, 1) == c, column, d_query)

        return jax.lax.fori_loop(0, query.shape[1], fill, jnp.zeros_like(query))

    def centred(query, key, down, up):
        return dot(d, key * up, 1, 0) * down

    return _by_reach(s, x, b, i, lambda query, key: dot(d, key, 1, 0), centred, by_channel)


def own_pull_key(s, x, b, i, d):
    """Gradient of the keys [T, H] float32 from that of `own`."""

    def by_channel(query, key, decay):
        def fill(c, d_key):
            row = jnp.sum(d * decay(c) * _column(query, c), axis=0, keepdims=True)
            return jnp.where(_index(d_key, 1) == c, turned(row), d_key)

        return jax.lax.fori_loop(0, key.shape[1], fill, jnp.zeros_like(key))

    def centred(query, key, down, up):
        return dot(d, query * down, 0, 0) * up

    return _by_reach(s, x, b, i, lambda query, key: dot(d, query, 0, 0), centred, by_channel)


def _index(like, axis):
    return jax.lax.broadcasted_iota(jnp.int32, like.shape, axis)


def _column(x, c):
    """[rows, 1]: column c of [rows, H]; a slice at a traced c is what a TPU lacks."""
    return jnp.sum(jnp.where(_index(x, 1) == c, x, 0.0), axis=1, keepdims=True)


def turned(x):
    """[T, 1] float32 as [1, T], and back: exact, and of any T."""
    T = max(x.shape)
    square = jnp.broadcast_to(x, (T, T))
    kept = jnp.where(_index(square, 0) == _index(square, 1), square, 0.0)
    return jnp.sum(kept, axis=0 if x.shape[1] == 1 else 1, keepdims=True)


def dot(left, right, left_axis, right_axis):
    """A product of matrices in the narrower dtype of the two, summed in float32."""
    dtype = left.dtype if left.dtype.itemsize <= right.dtype.itemsize else right.dtype
    exact = dtype == jnp.float32  # a TPU would round its operands to bfloat16
    return jax.lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (((left_axis,), (right_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
