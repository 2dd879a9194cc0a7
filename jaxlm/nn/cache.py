# SPDX-License-Identifier: Apache-2.0
"""What a decoder keeps of the tokens it has read, in pages: written once, never touched again, dropped by the page.

B rows, T new tokens, K key heads, H head width; P pages of C slots, slot s lies in page s // C.  Arrays have a leading
axis of layers, or none for one layer ("...").  Heads stand before slots, so that products with the cache transpose
nothing.  `cached_attention` is what reads it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.nn.config import ModelConfig
from jaxlm.nn.position_kinds import Hope, Xpos


class Cache(NamedTuple):
    """Keys and values of every row's tokens; a pytree, all of its shapes fixed, so that one program serves all steps.

    Attributes:
      keys: [..., B, K, P, C, H], rotated where positions rotate; where channels decay, as they look from the last slot
        of their own page, so that every factor is <= 1 and depends on the place inside the page only.
      values: [..., B, K, P, C, H].
      recent: [..., B, K, 2, C, H], where channels decay: keys without decay of the last 2 C tokens, in a ring by
        position; the page that is not finished is scored from it.  Else None.
      lengths: [B] int32, tokens held by each row; the next one goes to this slot.
      dropped: [B] int32, tokens dropped from each row's front, whole pages; dropped + slot is a token's position.
      recent_from: [B] int32, the first position that `recent` still has; None where there is none.
    """

    keys: jax.Array
    values: jax.Array
    recent: jax.Array | None
    lengths: jax.Array
    dropped: jax.Array
    recent_from: jax.Array | None

    @property
    def page(self) -> int:
        """C, tokens of a page."""
        return leaf_shape(self.keys)[-2]

    @property
    def size(self) -> int:
        """P C, tokens that a row can hold."""
        return leaf_shape(self.keys)[-3] * self.page

    def row_positions(self, count: int) -> jax.Array:
        """Positions of the next `count` tokens of each row, [B, count] int32."""
        return (self.dropped + self.lengths)[:, None] + jnp.arange(count, dtype=jnp.int32)[None]


class Entries(NamedTuple):
    """What new tokens leave in the cache.

    Attributes:
      keys: [..., B, K, T, H], as `Cache.keys` holds them.
      values: [..., B, K, T, H].
      recent: [..., B, K, R, H] without decay, the last R = min(T, 2 C) tokens of each row; None where nothing decays.
    """

    keys: jax.Array
    values: jax.Array
    recent: jax.Array | None


def empty_cache(config: ModelConfig, batch: int, size: int, *, page: int = 64) -> Cache:
    """A cache of all layers that holds no token.

    Args:
      config: reads the layers, key heads, head width, `positions` and `dtype`.
      batch: B.
      size: tokens that a row can hold, rounded up to whole pages.
      page: C.  Steps cost the same for any; a smaller one is finer for `drop_pages`, a larger one reaches further back
        in `rollback`.
    Raises: ValueError for a size or page below 1, or a size beyond the table of learned positions.

    >>> cache = empty_cache(ModelConfig(vocab_size=11, width=8, num_layers=3, num_heads=2), 2, 100, page=8)
    >>> print(cache.keys.shape, cache.size, cache.lengths)
    (3, 2, 2, 13, 8, 4) 104 [0 0]
    """
    shape = (config.num_layers, batch, config.kv_heads, config.head_size)
    return _empty(shape, size, page, jnp.dtype(config.dtype), decays=isinstance(config.positions, Hope | Xpos))


def hope_cache(
    batch: int, size: int, *, num_kv_heads: int, head_width: int, page: int = 64, dtype: jnp.dtype | type = jnp.float32
) -> Cache:
    """An empty cache of one layer with decaying channels, for `hope_cache_append` and `hope_decode`.

    Args:
      batch: B.
      size: tokens that a row can hold, rounded up to whole pages.
      num_kv_heads: K; as many as there are query heads where each of those has rates of its own.
      head_width: H.
      page: C.
      dtype: of keys and values; bfloat16 rounds each of them once.
    """
    return _empty((batch, num_kv_heads, head_width), size, page, jnp.dtype(dtype), decays=True)


def _empty(shape, size, page, dtype, *, decays):
    *layers, B, K, H = shape
    for name, value in {"size": size, "page": page}.items():
        if value < 1:
            raise ValueError(f"{name} of a cache must be at least 1 token, got {value}")
    pages = jnp.zeros((*layers, B, K, -(-size // page), page, H), dtype)
    recent = jnp.zeros((*layers, B, K, 2, page, H), dtype) if decays else None
    none = jnp.zeros(B, jnp.int32)
    # Copies: a donated cache may not hold one buffer twice.
    return Cache(pages, jnp.copy(pages), recent, none, jnp.copy(none), jnp.copy(none) if decays else None)


def write(cache: Cache, entries: Entries, counts: jax.Array) -> Cache:
    """The cache with new tokens behind those it has; each is written at its row's own place, everything else stays.

    Args:
      cache: of B rows.
      entries: of T tokens a row.
      counts: [B] int32 in 0 .. T, how many of them are real.  A row without room for its own stays as it is.
    """
    T, C, P = leaf_shape(entries.keys)[-2], cache.page, leaf_shape(cache.keys)[-3]
    counts = jnp.where(fits(cache, counts), counts, 0)
    token = jnp.arange(T, dtype=jnp.int32)[None]
    slots = cache.lengths[:, None] + token
    # Pages from P on lie outside: not written.  Each token has its own, because places may not repeat.
    pages = jnp.where(token < counts[:, None], slots // C, P + token)
    lengths = cache.lengths + counts
    keys, values = (
        jax.tree.map(lambda store, new: _put(store, new, pages, slots % C), store, new)
        for store, new in ((cache.keys, entries.keys), (cache.values, entries.values))
    )
    recent, recent_from = cache.recent, cache.recent_from
    if recent is not None and recent_from is not None and entries.recent is not None:
        kept = leaf_shape(entries.recent)[-2]
        first = jnp.maximum(counts - kept, 0)
        token = first[:, None] + jnp.arange(kept, dtype=jnp.int32)[None]
        position = (cache.dropped + cache.lengths)[:, None] + token
        half = jnp.where(token < counts[:, None], position // C % 2, 2 + token)
        recent = jax.tree.map(lambda store, new: _put(store, new, half, position % C), recent, entries.recent)
        recent_from = jnp.maximum(recent_from, cache.dropped + lengths - 2 * C)
    return Cache(keys, values, recent, lengths, cache.dropped, recent_from)


def leaf_shape(store: jax.Array | tuple[jax.Array, ...]) -> tuple[int, ...]:
    """The shape of a stack of layers, or of the first of layers that lie apart."""
    return jax.tree.leaves(store)[0].shape


def apart(cache: Cache) -> Cache:
    """The cache with tuples of its layers for stacks of them, for `Model.extend` with a tuple of layers.

    On CPU a layer of a stack is copied before each product.
    """

    def layers(stack: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(stack[i] for i in range(stack.shape[0]))

    recent = None if cache.recent is None else layers(cache.recent)
    return cache._replace(keys=layers(cache.keys), values=layers(cache.values), recent=recent)  # type: ignore[arg-type]


def fits(cache: Cache, counts: jax.Array) -> jax.Array:
    """[B] bool: whether a row has room for so many more tokens."""
    return cache.lengths + counts <= cache.size


def _put(store, new, pages_BT, places_BT):
    """Writes [..., B, K, T, H] at [..., B, K, page, place, H], each place once; what lies outside is not written."""
    row = store.ndim - 5  # the axis of B, behind that of layers
    # Spelled out, because indexing either gathers rows that are divided over devices or turns the whole cache around.
    axes = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(*range(row), row + 1, row + 3),
        inserted_window_dims=(row + 2, row + 3),
        scatter_dims_to_operand_dims=(row + 2, row + 3),
        operand_batching_dims=(row,),
        scatter_indices_batching_dims=(0,),
    )
    where = jnp.stack([pages_BT, places_BT], axis=-1)
    drop = jax.lax.GatherScatterMode.FILL_OR_DROP
    # Unique, because the gradient of a scatter that might overlap takes two more passes to see who wrote last.
    return jax.lax.scatter(store, where, new.astype(store.dtype), axes, mode=drop, unique_indices=True)


def drop_pages(cache: Cache, count: int | jax.Array) -> Cache:
    """Forgets the oldest pages of every row; kept keys are moved, not one bit of them changes, positions go on.

    Tokens that come later get the positions they would have had: it equals attention that no longer sees the dropped
    ones (what kept tokens once read of them is in their keys and values).

    Args:
      cache: as `Model.prefill` gives it.
      count: pages, an int or [B] int32, >= 0.  A row drops no more pages than it has finished.
    Raises: ValueError for a negative count whose value is known.

    >>> cache = empty_cache(ModelConfig(vocab_size=11, width=8, num_layers=1, num_heads=2), 2, 16, page=4)
    >>> cache = drop_pages(cache._replace(lengths=jnp.array([11, 3])), 1)
    >>> print(cache.lengths, cache.dropped)
    [7 3] [4 0]
    """
    if (values := known(count)) is not None and np.any(values < 0):
        raise ValueError(f"pages to drop must be >= 0, got {values.tolist()}")
    count = jnp.clip(jnp.asarray(count, jnp.int32), 0, cache.lengths // cache.page)
    P = cache.keys.shape[-3]
    source = jnp.minimum(jnp.arange(P, dtype=jnp.int32)[None] + count[:, None], P - 1)
    moved = jax.vmap(lambda pages, source: jnp.take(pages, source, axis=-3), in_axes=(-5, 0), out_axes=-5)
    tokens = count * cache.page
    return cache._replace(
        keys=moved(cache.keys, source),
        values=moved(cache.values, source),
        lengths=cache.lengths - tokens,
        dropped=cache.dropped + tokens,
    )


def rollback(cache: Cache, lengths: int | jax.Array) -> Cache:
    """Forgets the newest tokens of every row, as when drafted ones are refused.

    Any kind of positions can go back to any length; where channels decay, the page that becomes unfinished again must
    still be in `recent`: one page (C tokens) back always is, and so is every border of pages.

    Args:
      cache: as `Model.extend` gives it.
      lengths: an int or [B] int32, >= 0: tokens kept, counted as `cache.lengths` is; shorter rows stay as they are.
    Returns: a cache whose later tokens overwrite the forgotten ones.  Under jit, a row that goes back too far gets NaN
      in `recent`, and so in what is read before its page is finished again.
    Raises: ValueError for a negative length, or going back too far, where the values are known.
    """
    if (values := known(lengths)) is not None and np.any(values < 0):
        raise ValueError(f"lengths to keep must be >= 0, got {values.tolist()}")
    kept = jnp.minimum(cache.lengths, jnp.maximum(jnp.asarray(lengths, jnp.int32), 0))
    if cache.recent is None or cache.recent_from is None:
        return cache._replace(lengths=kept)
    needed = cache.dropped + kept - kept % cache.page  # the first position of the page that is unfinished again
    lost = (kept % cache.page > 0) & (needed < cache.recent_from)
    if (rows := known(lost)) is not None:
        if rows.any():
            row = int(np.argmax(rows))
            raise ValueError(
                f"row {row} cannot go back from {int(cache.lengths[row])} to {int(kept[row])} tokens: keys without "
                f"decay are kept of the last {2 * cache.page} only; go back at most {cache.page} tokens, or to a "
                f"multiple of {cache.page}"
            )
        return cache._replace(lengths=kept)
    recent = jnp.where(lost[:, None, None, None, None], jnp.asarray(jnp.nan, cache.recent.dtype), cache.recent)
    return cache._replace(lengths=kept, recent=recent)


def known(x: int | np.ndarray | jax.Array) -> np.ndarray | None:
    """The value, or None under jit."""
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x)


def put_rows(cache: Cache, rows: jax.Array, other: Cache, source: jax.Array) -> Cache:
    """The cache with rows `rows` [n] taken from rows `source` [n] of another one, of the same layers and page.

    Args:
      cache: keeps its size; what `other` has beyond it must be unused.
      rows: int32 [n]; those outside the cache are not written.
      other: prompts just read, say; `apart` if the cache is.
      source: int32 [n]; a row may be taken more than once (samples of one prompt).
    """

    def put(store, new):
        pages = min(store.shape[-3], new.shape[-3])
        new = jnp.take(new[..., :pages, :, :], source, axis=-5)
        return store.at[..., rows, :, :pages, :, :].set(new.astype(store.dtype), mode="drop")

    def put_count(counts, new):
        return counts.at[rows].set(jnp.take(new, source), mode="drop")

    recent, recent_from = cache.recent, cache.recent_from
    if recent is not None and recent_from is not None:
        assert other.recent is not None and other.recent_from is not None
        recent = jax.tree.map(put, recent, other.recent)
        recent_from = put_count(recent_from, other.recent_from)
    return Cache(
        jax.tree.map(put, cache.keys, other.keys),
        jax.tree.map(put, cache.values, other.values),
        recent,
        put_count(cache.lengths, other.lengths),
        put_count(cache.dropped, other.dropped),
        recent_from,
    )
