# SPDX-License-Identifier: Apache-2.0
"""A latent plan in K tokens: from hidden states to narrow vectors, back to embeddings, and fed to the decoder.

B batch, P prompt tokens, T tokens, D model width, K capsule tokens, d capsule width, M segments of a row.
Source: Shan et al. 2025, arXiv:2509.22131; scale, order of production and both forms of a pass are ours.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.nn.cache import Cache
from jaxlm.nn.capsule_config import CapsuleConfig
from jaxlm.nn.decoder import EMBEDDED, Model, Params
from jaxlm.nn.shapes import Leaf, dense_leaves, initialise

TINY = 1e-12  # of a mean square, so that a capsule of zeros has an embedding and a gradient


def capsule_project(hidden_BKD: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """c = h @ kernel + bias, linear and deterministic, in float32: [B, K, d].

    Args:
      hidden_BKD: [B, K, D], any float dtype.
      kernel: [D, d].
      bias: [d].

    >>> capsule_project(jnp.ones((1, 1, 4)), jnp.ones((4, 2)), jnp.array([0.0, 1.0])).tolist()
    [[[4.0, 5.0]]]
    """
    return jnp.einsum("bkd,dc->bkc", hidden_BKD.astype(jnp.float32), kernel) + bias[None, None, :]


def capsule_embed(capsule_BKd: jax.Array, kernel: jax.Array, *, rms: jax.Array | float | None) -> jax.Array:
    """e = rms * z / sqrt(mean(z^2)) with z = c @ kernel, or z itself where `rms` is None: [B, K, D] float32.

    Args:
      capsule_BKd: [B, K, d].
      kernel: [d, D].
      rms: what every embedding's root mean square is to be, that of a row of the embedding table; None: unscaled, as
        in the paper.

    >>> capsule_embed(jnp.array([[[3.0]]]), jnp.array([[1.0, -1.0]]), rms=0.5).tolist()
    [[[0.5, -0.5]]]
    """
    return _scaled(jnp.einsum("bkc,cd->bkd", capsule_BKd, kernel), rms)


def _scaled(z: jax.Array, rms: jax.Array | float | None) -> jax.Array:
    if rms is None:
        return z
    return rms * z * jax.lax.rsqrt(jnp.mean(jnp.square(z), axis=-1, keepdims=True) + TINY)


def capsule_leaves(width: int, config: CapsuleConfig) -> dict[str, Leaf]:
    """Parameters of a capsule in a model of that width; `rho` and the scale of queries are set by `capsule_init`.

    Raises: ValueError for a capsule that is as wide as the model.
    """
    K, d = config.num_capsules, config.width
    if K == 0:
        return {}
    leaves = {"rho": Leaf((), 0.0, 1.0)} if config.embed_scale == "rms" or config.has_queries else {}
    if config.source == "capsule":
        if d >= width:
            raise ValueError(
                f"capsule_width {d} is no bottleneck for model width {width}; choose at most {width - 1}, "
                "usually 32 to 256"
            )
        leaves |= dense_leaves("to_capsule", width, d, bias=True) | dense_leaves("from_capsule", d, width, bias=False)
    return leaves | ({"queries": Leaf((K, width), 1.0)} if config.has_queries else {})


def capsule_init(table_VD: jax.Array, config: CapsuleConfig, key: jax.Array) -> dict[str, Any]:
    """Random parameters for a model with that embedding table; `rho` is the mean RMS of its rows, and stays it."""
    p = initialise(capsule_leaves(table_VD.shape[1], config), key)
    rho = jnp.mean(jnp.sqrt(jnp.mean(jnp.square(table_VD.astype(jnp.float32)), axis=1)))
    if "rho" in p:
        p["rho"] = rho
    if "queries" in p:
        p["queries"] = rho * p["queries"]
    return p


def capsule_make(p: Mapping[str, Any], hidden_BKD: jax.Array, config: CapsuleConfig) -> tuple[jax.Array, jax.Array]:
    """Capsule vectors [B, K, d] (of source "hidden": [B, K, D]) and their embeddings [B, K, D], both float32."""
    rms = jax.lax.stop_gradient(p["rho"]) if config.embed_scale == "rms" else None
    if config.source == "hidden":
        state = hidden_BKD.astype(jnp.float32)
        return state, _scaled(state, rms)
    capsule = capsule_project(hidden_BKD, p["to_capsule"]["kernel"], p["to_capsule"]["bias"])
    return capsule, capsule_embed(capsule, p["from_capsule"]["kernel"], rms=rms)


def capsule_chain(
    make: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    feed: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    hidden_B1D: jax.Array,
    state: Any,
    *,
    num_capsules: int,
) -> tuple[jax.Array, jax.Array, Any]:
    """K capsule tokens one after the other, for any decoder; gradients flow through the whole chain.

    Args:
      make: hidden [B, 1, D] to a capsule vector and its embedding, such as a `CapsuleBottleneck`.
      feed: `(embedding [B, 1, D], state) -> (hidden [B, 1, D], state)`, one step of the decoder.
      hidden_B1D: of `<cap>`.
      state: what the decoder keeps, a cache.
      num_capsules: K >= 1.
    Returns: capsule [B, K, d], embeddings [B, K, D], and the state that has read all but the last of them.

    >>> feed = lambda e, n: (e + 1.0, n + 1)
    >>> capsule, embeddings, steps = capsule_chain(lambda h: (h, 2 * h), feed, jnp.ones((1, 1, 1)), 0, num_capsules=3)
    >>> embeddings.ravel().tolist(), steps
    ([2.0, 6.0, 14.0], 2)
    """
    capsules: list[jax.Array] = []
    embeddings: list[jax.Array] = []
    for k in range(num_capsules):
        if k:
            hidden_B1D, state = feed(embeddings[-1], state)
        capsule, embedding = make(hidden_B1D)
        capsules.append(capsule)
        embeddings.append(embedding)
    return jnp.concatenate(capsules, axis=1), jnp.concatenate(embeddings, axis=1), state


class Rollout(NamedTuple):
    """What follows a prompt before text does.

    Attributes:
      capsule: [B, K, d] float32; of "pause", the constants.
      embeddings: [B, K, D] float32.
      cache: holds the prompt and all embeddings but the last: whatever reads that one goes on.
    """

    capsule: jax.Array
    embeddings: jax.Array
    cache: Cache


def capsule_rollout(
    model: Model,
    params: Params,
    prompt_BP: jax.Array,
    mask_BP: jax.Array,
    config: CapsuleConfig,
    *,
    size: int,
    page: int = 64,
    given: jax.Array | None = None,
) -> Rollout:
    """Reads prompts that end with `<cap>` and makes their capsules: the one function of training and sampling.

    Args:
      model: its `prefill` and `extend`.
      params: with the leaves of `capsule_init` under "capsule".
      prompt_BP: [B, P] int32, padded on either side.
      mask_BP: [B, P] bool, the real tokens, without gaps; a row without any gives something finite.
      config: K >= 1.
      size, page: of the cache (`Model.prefill`); the prompt, K and what is to follow must fit.
      given: [B, K, D], embeddings to read in place of one's own: another row's, or a mean.
    """
    K, B = config.num_capsules, prompt_BP.shape[0]
    p = params.get("capsule", {})
    lengths = jnp.sum(mask_BP, axis=1, dtype=jnp.int32)
    # Prompts of a cache begin in its first slot.
    from_first = jnp.argmax(mask_BP, axis=1)[:, None] + jnp.arange(prompt_BP.shape[1])[None]
    tokens = jnp.take_along_axis(prompt_BP, jnp.minimum(from_first, prompt_BP.shape[1] - 1), axis=1)
    hidden, cache = model.prefill(params, tokens, lengths, size=size, page=page, output=config.hidden)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    # A row of padding stays empty, so that it reads nothing at all.
    real = (lengths > 0).astype(jnp.int32)

    def read(embeddings: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        blank = jnp.full(embeddings.shape[:2], EMBEDDED, jnp.int32)
        counts = embeddings.shape[1] * real
        return model.extend(params, blank, cache, counts, embeddings=embeddings, output=config.hidden)

    if given is None and config.in_steps:
        return Rollout(*capsule_chain(lambda h: capsule_make(p, h, config), read, last, cache, num_capsules=K))
    if given is None:
        queries = jnp.broadcast_to(p["queries"][None], (B, *p["queries"].shape))
        made = (queries, queries) if config.source == "pause" else capsule_make(p, read(queries, cache)[0], config)
    else:
        made = (given, given)
    return Rollout(*made, read(made[1][:, :-1], cache)[1] if K > 1 else cache)


def capsule_rows(
    model: Model,
    params: Params,
    tokens_BT: jax.Array,
    capsule_ids_BT: jax.Array,
    config: CapsuleConfig,
    *,
    positions: jax.Array,
    segment_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Rows that may hold several records each, their capsules made in parallel or of constants: two passes, or one.

    Args:
      tokens_BT: [B, T] int32, `EMBEDDED` in the K places of each capsule.
      capsule_ids_BT: [B, T] int32, 1 .. K in those places, 0 elsewhere.
      config: not made in steps.
      positions, segment_ids: [B, T] int32, as `Model.apply` takes them.
    Returns: hidden states after the final norm [B, T, D], and a capsule vector for every column [B, T, d], which means
      something in the places of a capsule (`capsules_of`).
    """
    p = params["capsule"]
    where: dict[str, Any] = {"positions": positions, "segment_ids": segment_ids}
    queries = jnp.take(p["queries"], jnp.maximum(capsule_ids_BT - 1, 0), axis=0)
    if config.source == "pause":
        return model.apply(params, tokens_BT, embeddings=queries, **where), queries
    hidden = model.apply(params, tokens_BT, embeddings=queries, output=config.hidden, **where)
    capsule, embeddings = capsule_make(p, hidden, config)
    return model.apply(params, tokens_BT, embeddings=embeddings, **where), capsule


def capsules_of(
    columns_BTd: jax.Array,
    capsule_ids_BT: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    num_segments: int,
    num_capsules: int,
) -> jax.Array:
    """The capsules of segments 1 .. M out of a vector for every column, [B, M, K, d]; of absent ones anything."""
    number = jnp.where(capsule_ids_BT > 0, (segment_ids_BT - 1) * num_capsules + capsule_ids_BT - 1, -1)
    wanted = jnp.arange(num_segments * num_capsules, dtype=number.dtype)
    at = jnp.argmax(number[:, None, :] == wanted[None, :, None], axis=2)
    found = jnp.take_along_axis(columns_BTd, at[..., None], axis=1)
    return found.reshape(found.shape[0], num_segments, num_capsules, -1)
