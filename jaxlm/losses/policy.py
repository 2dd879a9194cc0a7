# SPDX-License-Identifier: Apache-2.0
"""Policy gradients on the tokens that the sampler could draw: log-probs over that support, and the clipped terms.

B rows, T tokens, D width, V vocabulary, S tokens of a row in a chunk, W = ceil(V / 8) bytes.  Entry t of every [B, T]
array is about token t.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.losses.next_token import target_weights
from jaxlm.losses.term import Term

CHUNK = 1024  # tokens whose logits are held at once


def support_log_probs(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    tokens_BT: jax.Array,
    kept_BTW: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> jax.Array:
    """log p of each token given those before it, over the tokens that could be drawn, after the temperature.

        hot = logits / temperature;  log p = hot[token] - logsumexp(hot[v] for v kept)

    The set that is kept is the one of the rollout and no function of the parameters: both sides of a ratio then live on
    one support, and the ratio is 1 until the first update. Logits are made in chunks, and again in the backward pass.

    Args:
      hidden_BTD: [B, T, D], the model's final hidden states; those of t - 1 predict token t.
      head_DV: [D, V].
      tokens_BT: [B, T] int32.
      kept_BTW: [B, T, W] uint8, bits of the vocabulary as `kept_tokens` packs them; None: all tokens.
      temperature: > 0.
      softcap: of the logits, > 0, or None.
      chunk: tokens whose logits are held at once.
    Returns: [B, T] float32, nats; that of the first token of a row means nothing.

    >>> hidden, head = jnp.ones((1, 2, 4)), jnp.zeros((4, 8))
    >>> support_log_probs(hidden, head, jnp.array([[1, 2]]))[:, 1].round(4).tolist()  # log(1 / 8)
    [-2.079400062561035]

    Source: the kept set as a constant of the rollout is "keep sampling mask" of DeepSeek-V3.2, arXiv:2512.02556.
    """

    def one(logits_BSV, tokens_BS, *kept):
        hot_BSV = logits_BSV / temperature
        picked_BS = jnp.take_along_axis(hot_BSV, tokens_BS[..., None], axis=-1)[..., 0]
        if kept:
            inside = jnp.unpackbits(kept[0], axis=-1, count=hot_BSV.shape[-1]).astype(bool)
            hot_BSV = jnp.where(inside, hot_BSV, -jnp.inf)
        return picked_BS - jax.nn.logsumexp(hot_BSV, axis=-1)

    arrays = (tokens_BT,) if kept_BTW is None else (tokens_BT, kept_BTW)
    return _by_chunk(one, hidden_BTD, head_DV, arrays, softcap=softcap, chunk=chunk)


def kept_tokens(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    tokens_BT: jax.Array,
    log_probs_BT: jax.Array,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> jax.Array:
    """Which tokens the sampler could draw, from the log-probs it reported: no other account of its filters is needed.

    Every filter (top-k, top-p, min-p, or all) keeps the n most probable tokens. A reported log p tells the log of the
    normaliser that was used, `hot[token] - log p`; n is the number of tokens whose log-sum-exp is nearest to it. So a
    token at the border, where the sampler's rounding and ours may differ, does not change what the ratio is. Tokens so
    improbable that the sum in float32 does not see them are left out.

    Args:
      hidden_BTD, head_DV, tokens_BT, temperature, softcap, chunk: as in `support_log_probs`, with the parameters that
        sampled.
      log_probs_BT: [B, T] float32, as the engine reported them; what is no drawn token may have any number.
    Returns: [B, T, W] uint8; the drawn token is always in.
    """

    def one(logits_BSV, tokens_BS, log_probs_BS):
        hot_BSV = logits_BSV / temperature
        picked_BS = jnp.take_along_axis(hot_BSV, tokens_BS[..., None], axis=-1)
        order_BSV = jnp.sort(hot_BSV, axis=-1, descending=True)
        sums_BSV = jax.lax.cumlogsumexp(order_BSV, axis=hot_BSV.ndim - 1)
        gap_BSV = jnp.abs(sums_BSV - (picked_BS - log_probs_BS[..., None]))
        last = jnp.argmin(gap_BSV, axis=-1, keepdims=True)
        least_BS = jnp.minimum(jnp.take_along_axis(order_BSV, last, axis=-1), picked_BS)
        return jnp.packbits(hot_BSV >= least_BS, axis=-1)

    return _by_chunk(one, hidden_BTD, head_DV, (tokens_BT, log_probs_BT), softcap=softcap, chunk=chunk)


def _by_chunk(
    one: Callable[..., jax.Array],
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    arrays: tuple[jax.Array, ...],
    *,
    softcap: float | None,
    chunk: int,
) -> jax.Array:
    """`one(logits of token t, *arrays at t)` over all t, in chunks along T: rows stay on their devices."""
    B, T = arrays[0].shape
    count = math.ceil(T / max(1, chunk // B))
    S = math.ceil(T / count)
    cast_DV = head_DV.astype(hidden_BTD.dtype)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, count * S - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, count, S, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def step(cast_DV, hidden_BSD, *parts):
        logits_BSV = jnp.einsum("BSD,DV->BSV", hidden_BSD, cast_DV, preferred_element_type=jnp.float32)
        if softcap is not None:
            logits_BSV = softcap * jnp.tanh(logits_BSV / softcap)
        return one(logits_BSV, *parts)

    # The state BEFORE a token predicts it.
    parts = [cut(x) for x in (jnp.roll(hidden_BTD, 1, axis=1), *arrays)]
    _, found = jax.lax.scan(lambda _, part: (None, step(cast_DV, *part)), None, tuple(parts))
    found = jnp.moveaxis(found, 0, 1)
    return found.reshape(B, count * S, *found.shape[3:])[:, :T]


def policy_terms(
    log_probs_BT: jax.Array,
    batch: dict[str, jax.Array],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl: float = 0.0,
) -> dict[str, Term]:
    """The clipped surrogate of PPO with an advantage a token, and a penalty for leaving a reference.

        ratio = exp(log p - old_log_probs);  A = advantages
        loss = sum_bt w * -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) / sum_bt w
        kl = sum_bt w * (exp(d) - d - 1) / sum_bt w,  d = reference_log_probs - log p

    Args:
      log_probs_BT: [B, T] float32, of the policy, on the support of the sampler.
      batch: `loss_weights`, `segment_ids`, `advantages` and `old_log_probs`, all [B, T]; `reference_log_probs` for the
        penalty. Columns "sample/<name>" [B] are reported by name, as means over the rows that hold tokens.
      clip_low, clip_high: how far below and above 1 a ratio still pulls; >= 0.
      kl: >= 0, coefficient of the penalty.
    Returns: "loss" and, where there is a reference, "kl"; metrics "ratio_spread" (mean of |log ratio|), "ratio_far"
      (share of tokens with a ratio outside 0.9 .. 1.1), "clipped" (share whose gradient the clip takes).

    >>> batch = {"loss_weights": jnp.ones((1, 2)), "segment_ids": jnp.ones((1, 2), int),
    ...          "advantages": jnp.full((1, 2), 2.0), "old_log_probs": jnp.full((1, 2), -1.0)}
    >>> term = policy_terms(jnp.full((1, 2), -0.5), batch)["loss"]  # a ratio of 1.65, clipped at 1.2
    >>> print(f"{term.total:.1f} over {term.weight:.0f}")
    -2.4 over 1

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4 (the
    estimator of the KL divergence); two clips: Yu et al. 2025, arXiv:2503.14476, eq. 10.
    """
    weights_BT = target_weights(batch["loss_weights"], batch["segment_ids"])
    weight, counts_BT = jnp.sum(weights_BT), weights_BT > 0
    # What is no drawn token may hold anything: zero before exp, so that nothing there is infinite.
    log_ratio_BT = jnp.where(counts_BT, log_probs_BT - batch["old_log_probs"], 0.0)
    ratio_BT, advantages_BT = jnp.exp(log_ratio_BT), batch["advantages"]
    near_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high)
    gain_BT = jnp.minimum(ratio_BT * advantages_BT, near_BT * advantages_BT)
    clipped_BT = near_BT * advantages_BT < ratio_BT * advantages_BT

    def share(x_BT):
        return Term(jnp.sum(weights_BT * x_BT), weight, coefficient=0.0)

    terms = {
        "loss": Term(-jnp.sum(weights_BT * gain_BT), weight),
        "ratio_spread": share(jnp.abs(log_ratio_BT)),
        "ratio_far": share((jnp.abs(ratio_BT - 1.0) > 0.1).astype(jnp.float32)),
        "clipped": share(clipped_BT.astype(jnp.float32)),
    }
    if "reference_log_probs" in batch:
        gap_BT = jnp.where(counts_BT, batch["reference_log_probs"] - log_probs_BT, 0.0)
        terms["kl"] = Term(jnp.sum(weights_BT * (jnp.expm1(gap_BT) - gap_BT)), weight, coefficient=kl)
    return terms | sample_terms(batch)


def sample_terms(batch: dict[str, Any]) -> dict[str, Term]:
    """Columns "sample/<name>" [B] as metrics: their means over the rows that hold tokens."""
    real_B = jnp.any(batch["segment_ids"] != 0, axis=1).astype(jnp.float32)
    found = {name.removeprefix("sample/"): x for name, x in batch.items() if name.startswith("sample/")}
    return {name: Term(jnp.sum(real_B * x_B), jnp.sum(real_B), coefficient=0.0) for name, x_B in found.items()}
