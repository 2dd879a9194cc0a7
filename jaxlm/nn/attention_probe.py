# SPDX-License-Identifier: Apache-2.0
"""Where a decoder's attention lies, by distance: dense, exact and slow, for a few windows and their last queries.

B batch, L tokens, N query heads, K key heads, G = N / K, H head width, Q queries looked at, S layers.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.attention import project
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import Model, Params, before, block, embed
from jaxlm.nn.positions import Encoding, encoding, falloff


class Look(NamedTuple):
    """Attention of the last queries of some windows, means over windows and queries.

    Attributes:
      weight: [S, N, L] float32, weight at each distance, 0 where a query reaches no further; sums to 1 a head, less
        what a sink takes.
      score: [S, N, L] float32, |scaled and decayed product of query and key|, before cap and slope, mean over the
        queries that reach that far; 0 where none does.
    """

    weight: jax.Array
    score: jax.Array


@partial(jax.jit, static_argnums=(0,), static_argnames=("queries",))
def look(model: Model, params: Params, tokens: jax.Array, *, queries: int = 128) -> Look:
    """Weights and scores of the last `queries` of each window, by distance.

    Every product is computed channel by channel from the distance itself, whatever kernel the model runs on, so this
    is also what kernels can be held against.

    Args:
      model: its config decides positions, windows, sink and cap; layers other than attention are its own.
      params: as `Model.init` makes them.
      tokens: [B, L] int32, windows without padding.
      queries: Q, in [1, L]; memory is B * N * L floats a query.
    Raises: ValueError for a number of queries that is not in [1, L].
    """
    config, L = model.config, tokens.shape[1]
    if not 1 <= queries <= L:
        raise ValueError(f"queries must be in [1, {L}], the tokens of a window, got {queries}")
    places = encoding(config, L)
    x = embed(params, tokens, jnp.arange(L, dtype=jnp.int32)[None], config)
    found = []
    for layer, window in enumerate(config.layer_windows):
        p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        found.append(_look(p["attention"], before(p, "attention", x, config), config, places, window, queries))
        x = block(p, x, config, encoding=places, window=window)
    return Look(*(jnp.stack(parts) for parts in zip(*found, strict=True)))


def _look(
    p: Mapping[str, Any], x_BLD: jax.Array, config: ModelConfig, places: Encoding, window: int | None, queries: int
) -> tuple[jax.Array, jax.Array]:
    """One layer: weights and scores [N, L] by distance."""
    query, key, _ = (x.astype(jnp.float32) for x in project(p, x_BLD, config, encoding=places))
    _, L, N, H = query.shape
    key_BLNH = jnp.repeat(key, N // key.shape[2], axis=2)
    fall = falloff(p, config)
    rates = jnp.zeros((1, H)) if fall.rates is None else fall.rates.reshape(-1, H)
    rates_NH = jnp.repeat(rates, N // rates.shape[0], axis=0)
    slopes_N = jnp.zeros(N) if fall.slopes is None else fall.slopes
    scale = H**-0.5 if config.attention_scale is None else config.attention_scale
    sink_N = p["sink"].astype(jnp.float32) if config.attention_sink else jnp.full(N, -jnp.inf)
    index = jnp.arange(L)

    def of_query(m: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        distance = m - index
        seen = (distance >= 0) & (True if window is None else distance < window)
        far = jnp.maximum(distance, 0).astype(jnp.float32)
        decay_LNH = jnp.exp(-rates_NH[None] * far[:, None, None])
        scores = scale * jnp.einsum("bnh,blnh,lnh->bnl", query[:, m], key_BLNH, decay_LNH)
        size = jnp.where(seen[None], jnp.mean(jnp.abs(scores), axis=0), 0.0)
        if config.attention_softcap is not None:
            scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
        scores = jnp.where(seen[None, None], scores - slopes_N[None, :, None] * far[None, None], -jnp.inf)
        top = jnp.maximum(jnp.max(scores, axis=-1), sink_N[None])[..., None]
        weights = jnp.exp(scores - top)
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink_N[None, :, None] - top))
        # From places to distances: entry d is about key m - d; what would lie before the row is not seen.
        back = jnp.where(seen, distance, L)
        at = jnp.zeros((N, L)).at[:, back]
        weight, size = at.add(jnp.mean(weights, axis=0), mode="drop"), at.add(size, mode="drop")
        return weight, size, jnp.zeros(L).at[back].add(1.0, mode="drop")

    weight, size, count = jax.lax.map(of_query, jnp.arange(L - queries, L))
    reached = jnp.maximum(jnp.sum(count, axis=0), 1.0)
    return jnp.mean(weight, axis=0), jnp.sum(size, axis=0) / reached[None]
