# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens over a cache and over each other, for every kind of positions.

Where channels decay, with a the slot of the first new token and e the last slot of a page, query m and key n:
  finished page:    exp(-rate (m - n)) = exp(-rate (m - a)) exp(-rate (a - e)) . exp(-rate (e - n)), the last cached;
  unfinished page:  exp(-rate (m - a)) . exp(-rate (a - n)), on the keys without decay of `Cache.recent`;
  new tokens:       exp(-rate (m - n)) itself.
No exponent is ever positive, so rates and lengths have no bound.  Only differences of slots are used.

B rows, T new tokens, N query heads, K key heads, G = N / K, Q = G T, H head width; P pages of C slots, S = P C.
Source: Dai et al. 2025, arXiv:2509.05218; pages with their own last position as anchor are ours.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.kernels.blocked_attention import MASKED
from jaxlm.kernels.products import contract
from jaxlm.nn.cache import Cache, Entries, fits, known, write
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.hope import check_rates
from jaxlm.nn.positions import falloff


def attend_cached(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    cache: Cache,
    *,
    rates: jax.Array | None = None,
    slopes: jax.Array | None = None,
    sink: jax.Array | None = None,
    window: int | jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """`attend` for the T tokens that follow those of a cache, which does not hold them yet.

    Each row's new tokens stand at its own place.  They read the whole cache, whatever it holds: cost does not change
    from step to step.

    Args:
      query_BTNH: [B, T, N, H], placed as the cached keys are.
      key_BTKH: [B, T, K, H], without decay.
      value_BTKH: [B, T, K, H].
      cache: of one layer.
      rates: float32 [H] or [K, H], those that the cache was written with; None where nothing decays.
      slopes: float32 [N], or None.
      sink: float32 [N], or None.
      window: tokens seen, itself included: an int, a traced int32 scalar, or None.
      scale: of the scores; None: H ** -0.5.
      softcap: of the scores, or None.
    Returns: [B, T, N, H] in the dtype of the query.
    """
    B, T, N, H = query_BTNH.shape
    K, S = key_BTKH.shape[2], cache.size
    G = N // K
    query = query_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    key, value = key_BTKH.swapaxes(1, 2), value_BTKH.swapaxes(1, 2)
    if rates is None:
        old = contract("bkqh,bksh->bkqs", query, cache.keys.reshape(B, K, S, H))
        new = contract("bkqh,bkmh->bkqm", query, key)
    else:
        rates_KH = rates.reshape(-1, H)
        old, new = _past_products(query, cache, rates_KH, T), _own_products(query, key, rates_KH, T)
    scale = H**-0.5 if scale is None else scale
    token, slot = jnp.arange(T, dtype=jnp.int32), jnp.arange(S, dtype=jnp.int32)[None, :]
    apart_old = cache.lengths[:, None, None] + token[None, :, None] - slot[:, None, :]  # [B, T, S]
    apart_new = (token[:, None] - token[None, :])[None]  # [1, T, T]

    def finish(products, apart, seen):
        scores = products.reshape(B, K, G, T, -1) * scale
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        if slopes is not None:
            by_head = slopes.astype(jnp.float32).reshape(1, K, G, 1, 1)
            scores = scores - by_head * apart[:, None, None].astype(jnp.float32)
        if window is not None:
            seen = seen & (apart < window)
        return jnp.where(seen[:, None, None], scores, MASKED)

    old = finish(old, apart_old, (slot < cache.lengths[:, None])[:, None])
    new = finish(new, apart_new, apart_new >= 0)  # a token sees itself, so no row is empty
    top = jnp.maximum(jnp.max(old, axis=-1, keepdims=True), jnp.max(new, axis=-1, keepdims=True))
    if sink is not None:
        sink = sink.astype(jnp.float32).reshape(1, K, G, 1, 1)
        top = jnp.maximum(top, sink)
    old, new = jnp.exp(old - top), jnp.exp(new - top)
    total = jnp.sum(old, axis=-1, keepdims=True) + jnp.sum(new, axis=-1, keepdims=True)
    total = total if sink is None else total + jnp.exp(sink - top)
    mixed = contract("bkqs,bksh->bkqh", old.reshape(B, K, G * T, S), cache.values.reshape(B, K, S, H))
    mixed = mixed + contract("bkqm,bkmh->bkqh", new.reshape(B, K, G * T, T), value)
    out = mixed.reshape(B, K, G, T, H) / total
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(query_BTNH.dtype)


def _past_products(query_BKQH, cache, rates_KH, T):
    """Decayed products with every slot, [B, K, Q, S] float32; those behind `lengths` are finite and mean nothing."""
    B, K, Q, _ = query_BKQH.shape
    P, C = cache.keys.shape[-3:-1]
    down_TKH = jnp.exp(-rates_KH[None] * jnp.arange(T, dtype=jnp.float32)[:, None, None])
    down = jnp.tile(down_TKH.swapaxes(0, 1), (1, Q // T, 1))  # [1 or K, Q, H]
    query = query_BKQH.astype(jnp.float32) * down[None]
    ends = jnp.arange(1, P + 1, dtype=jnp.int32) * C - 1
    gap = jnp.maximum(cache.lengths[:, None] - ends[None], 0).astype(jnp.float32)  # [B, P]
    far = jnp.exp(-rates_KH[None, :, None] * gap[:, None, :, None])  # [B, 1 or K, P, H]
    left = query[:, :, None] * far[:, :, :, None]
    finished = contract("bkpqh,bkpch->bkqpc", left, cache.keys)

    page, place = cache.lengths // C, cache.lengths % C
    half = (cache.dropped // C + page) % 2
    raw = jnp.where((half == 0)[:, None, None, None], cache.recent[:, :, 0], cache.recent[:, :, 1])
    gap = jnp.maximum(place[:, None] - jnp.arange(C, dtype=jnp.int32)[None], 0).astype(jnp.float32)  # [B, C]
    near = raw.astype(jnp.float32) * jnp.exp(-rates_KH[None, :, None] * gap[:, None, :, None])
    unfinished = contract("bkqh,bkch->bkqc", query, near)
    current = (jnp.arange(P, dtype=jnp.int32)[None] == page[:, None])[:, None, None, :, None]
    return jnp.where(current, unfinished[:, :, :, None], finished).reshape(B, K, Q, P * C)


def _own_products(query_BKQH, key_BKTH, rates_KH, T):
    """Decayed products of the new tokens with each other, [B, K, Q, T] float32; with the future, as without decay."""
    B, K, Q, H = query_BKQH.shape
    query = query_BKQH.astype(jnp.float32).reshape(B, K, Q // T, T, H)
    key = key_BKTH.astype(jnp.float32)

    def of_token(given):
        t, q = given  # q: [B, K, G, H]
        gap = jnp.maximum(t - jnp.arange(T, dtype=jnp.int32), 0).astype(jnp.float32)
        return contract("bkgh,bkmh->bkgm", q, key * jnp.exp(-rates_KH[None, :, None] * gap[None, None, :, None]))

    if T == 1:
        return contract("bkqh,bkmh->bkqm", query_BKQH.astype(jnp.float32), key)
    products = jax.lax.map(of_token, (jnp.arange(T, dtype=jnp.int32), jnp.moveaxis(query, 3, 0)))
    return jnp.moveaxis(products, 0, 3).reshape(B, K, Q, T)


def entries_of(
    key_BTKH: jax.Array, value_BTKH: jax.Array, cache: Cache, counts: jax.Array, rates: jax.Array | None
) -> Entries:
    """What T tokens, `counts` [B] of them real, leave in the cache that ends before them; reads its `lengths` only."""
    T, H = key_BTKH.shape[1], key_BTKH.shape[-1]
    key, value = key_BTKH.swapaxes(1, 2), value_BTKH.swapaxes(1, 2)
    if rates is None:
        return Entries(key, value, None)
    C = cache.page
    place = (cache.lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None]) % C
    left = (C - 1 - place).astype(jnp.float32)  # tokens to the end of the page
    faded = key.astype(jnp.float32) * jnp.exp(-rates.reshape(1, -1, 1, H) * left[:, None, :, None])
    if T > 2 * C:
        last = jnp.maximum(counts - 2 * C, 0)[:, None] + jnp.arange(2 * C, dtype=jnp.int32)[None]
        recent = jnp.take_along_axis(key, last[:, None, :, None], axis=2)
    else:
        recent = key
    return Entries(faded.astype(key.dtype), value, recent)


def mix_cached(
    p: Mapping[str, Any],
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    config: ModelConfig,
    cache: Cache,
    *,
    window: int | jax.Array | None = None,
) -> jax.Array:
    """`attend_cached` with the rates, slopes, sink and numbers of a layer: `mix` of `attention`, over a cache."""
    fall = falloff(p, config)
    return attend_cached(
        query_BTNH,
        key_BTKH,
        value_BTKH,
        cache,
        rates=fall.rates,
        slopes=fall.slopes,
        sink=p["sink"] if config.attention_sink else None,
        window=window,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
    )


def hope_cache_append(cache: Cache, key_BTKH: jax.Array, value_BTKH: jax.Array, rates: jax.Array) -> Cache:
    """One layer's cache with T more tokens in every row, at most a page of them.

    Args:
      cache: of `hope_cache`.
      key_BTKH: [B, T, K, H] in the light-cone basis, without decay.
      value_BTKH: [B, T, K, H].
      rates: float32 [H] or [K, H], 1/token, the same for every call.
    Returns: the cache; a row without room stays as it is.
    Raises: ValueError for rates that cannot be, more tokens than a page, and, outside of jit, a row without room.
    """
    B, T, K, H = key_BTKH.shape
    _check(rates, T, cache, K, K, H)
    counts = jnp.full(B, T, jnp.int32)
    refuse_full(cache, counts)
    return write(cache, entries_of(key_BTKH, value_BTKH, cache, counts, rates), counts)


def hope_decode(query_BTNH: jax.Array, cache: Cache, rates: jax.Array, **options: Any) -> jax.Array:
    """Attention of the newest T tokens over one layer's cache, which holds them: [B, T, N, H].

    >>> from jaxlm.nn.cache import hope_cache
    >>> x, rates = jax.random.normal(jax.random.key(0), (1, 3, 2, 4)), jnp.full(4, 0.01)
    >>> cache = hope_cache_append(hope_cache(1, 8, num_kv_heads=2, head_width=4), x, x, rates)
    >>> print(hope_decode(x[:, -1:], cache, rates).shape)
    (1, 1, 2, 4)

    Args:
      query_BTNH: [B, T, N, H] in the light-cone basis, T at most a page, K divides N.
      cache: after `hope_cache_append`.
      rates: float32 [H] or [K, H], those of the appends.
      options: `slopes`, `sink`, `window`, `scale`, `softcap`, as in `attend`.
    Raises: ValueError for rates that cannot be, more queries than a page or, outside of jit, than the cache holds.
    """
    _, T, N, H = query_BTNH.shape
    C, K = cache.page, cache.keys.shape[-4]
    _check(rates, T, cache, N, K, H)
    if (held := known(cache.lengths)) is not None and held.min() < T:
        raise ValueError(f"a row holds {held.min()} tokens and {T} newest ones are asked for: append their keys first")
    before = cache._replace(lengths=cache.lengths - T)
    slots = before.lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    ring = (cache.dropped[:, None] + slots) // C % 2
    newest = jax.vmap(lambda store, pages, places: store[:, pages, places].swapaxes(0, 1))  # [T, K, H] of a row
    key, value = newest(cache.recent, ring, slots % C), newest(cache.values, slots // C, slots % C)
    return attend_cached(query_BTNH, key, value, before, rates=rates, **options)


def refuse_full(cache: Cache, counts: jax.Array) -> None:
    """Raises ValueError where a row is known to have no room for so many more tokens."""
    room = known(fits(cache, counts))
    if room is not None and not room.all():
        row = int(np.argmin(room))
        raise ValueError(
            f"row {row} holds {int(cache.lengths[row])} of {cache.size} tokens and {int(counts[row])} more do not fit: "
            "give the cache a larger size, or drop_pages first"
        )


def refuse_long(count: int, cache: Cache) -> None:
    """Raises ValueError for more new tokens than a page."""
    if count > cache.page:
        raise ValueError(f"at most a page ({cache.page} tokens) can be added at once, got {count}: cut it into pages")


def _check(rates, count, cache, num_heads, num_kv_heads, width):
    check_rates(rates, num_heads=num_heads, num_kv_heads=num_kv_heads, width=width)
    if math.prod(rates.shape[:-1]) not in (1, num_kv_heads):
        raise ValueError(
            f"rates of {num_heads} heads need a cache with as many key heads, got {num_kv_heads}: repeat keys, values"
        )
    refuse_long(count, cache)
