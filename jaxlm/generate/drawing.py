# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token: filters, temperature, a draw.  B rows, V vocabulary."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp


class Draws(NamedTuple):
    """How each row draws; arrays, so that rows that differ share a program.

    Attributes:
      temperature: [B] float32 >= 0; 0: the most probable token.
      top_p: [B] float32 in (0, 1].
      top_k: [B] int32 in 1 .. V.
      min_p: [B] float32 in [0, 1).
      keys: [B] random keys of the rows.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    keys: jax.Array


class Seen(NamedTuple):
    """What a processor may look at of its row.

    Attributes:
      tokens: [S] int32, prompt and completion from the left; what lies behind `length` means nothing.  S differs from
        call to call: nothing may depend on it.
      length: int32, tokens of both.
      prompt_length: int32.
    """

    tokens: jax.Array
    length: jax.Array
    prompt_length: jax.Array


Processor = Callable[[jax.Array, Seen], jax.Array]  # logits [V] float32 of one row -> logits [V]; -inf forbids
Kind = Literal["greedy", "plain", "filtered"]  # what the rows of a program ask for at most; less is faster


class Drawn(NamedTuple):
    """Tokens [B] int32, and their log-probs [B] float32: as drawn from, and of the model itself."""

    tokens: jax.Array
    log_probs: jax.Array
    raw_log_probs: jax.Array


def kept(logits_BV: jax.Array, draws: Draws) -> jax.Array:
    """Which tokens may be drawn, bool [B, V]: those of all three filters, the most probable one always.

    In transformers' order: temperature, top_k, top_p of what top_k left, min_p.  Ties at the border are all kept.
    """
    order = jnp.sort(logits_BV, axis=-1, descending=True)
    rank = jnp.arange(order.shape[-1], dtype=jnp.int32)[None]
    stays = rank < draws.top_k[:, None]
    probs = jax.nn.softmax(jnp.where(stays, order, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # a token stays while those before it hold less than top_p
    stays = stays & (before < draws.top_p[:, None]) & (probs >= draws.min_p[:, None] * probs[:, :1])
    stays = stays.at[:, 0].set(True)
    least = jnp.min(jnp.where(stays, order, jnp.inf), axis=-1, keepdims=True)
    return logits_BV >= least


def draw(
    logits_BV: jax.Array,
    draws: Draws,
    counts_B: jax.Array,
    *,
    kind: Kind = "filtered",
    processors: Sequence[Processor] = (),
    seen: Seen | None = None,
) -> Drawn:
    """One token of each row.

    Args:
      logits_BV: float32.
      draws: how.
      counts_B: int32, tokens drawn before; with the row's key it decides the draw, whatever the other rows are.
      kind: "filtered" serves all rows; "plain" saves a sort of the vocabulary if none has a filter, "greedy" random
        numbers too if all have temperature 0.
      processors: change the logits, one after the other, before all else; each is given one row.
      seen: of all rows, [B, S], [B] and [B]; needed by processors only.
    """
    processed_BV = logits_BV
    for processor in processors:
        assert seen is not None
        processed_BV = jax.vmap(processor)(processed_BV, seen)
    raw_total = jax.nn.logsumexp(logits_BV, axis=-1)

    def of_token(x_BV, tokens_B):
        return jnp.take_along_axis(x_BV, tokens_B[:, None], axis=-1)[:, 0]

    best = jnp.argmax(processed_BV, axis=-1).astype(jnp.int32)
    if kind == "greedy":
        return Drawn(best, jnp.zeros_like(raw_total), of_token(logits_BV, best) - raw_total)
    greedy = draws.temperature == 0
    hot = processed_BV / jnp.where(greedy, 1.0, draws.temperature)[:, None]
    if kind == "filtered":
        hot = jnp.where(kept(hot, draws), hot, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(draws.keys, counts_B)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, hot.shape[1:], jnp.float32))(keys)
    tokens = jnp.where(greedy, best, jnp.argmax(hot + noise, axis=-1).astype(jnp.int32))
    policy = jnp.where(greedy, 0.0, of_token(hot, tokens) - jax.nn.logsumexp(hot, axis=-1))
    return Drawn(tokens, policy, of_token(logits_BV, tokens) - raw_total)
