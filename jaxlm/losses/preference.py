# SPDX-License-Identifier: Apache-2.0
"""Losses of pairs of answers: the chosen one is to gain more on a reference than the rejected one.

B rows, T tokens, P pairs of a row.  Segments 1 and 2 of a row are the chosen and the rejected answer of its first
pair, 3 and 4 those of the second, and so on.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxlm.losses.next_token import target_weights
from jaxlm.losses.term import Term

SHORTEST = 4  # tokens of a pair: one of the prompt and one of the answer, twice


def preference_loss(
    margin: jax.Array,
    weight: jax.Array,
    *,
    beta: float,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    smoothing: float = 0.0,
) -> Term:
    """Prefers chosen answers to rejected ones, relative to a reference.

        margin = (log p - log p_ref)(chosen) - (log p - log p_ref)(rejected)
        sigmoid: sum weight * -((1 - smoothing) log sigmoid(beta margin) + smoothing log sigmoid(-beta margin))
        ipo:     sum weight * (margin - 1 / (2 beta)) ** 2

    Args:
      margin: float32, any shape, nats; summed over answer tokens, not averaged.
      weight: of the same shape, >= 0; 0 leaves a pair out. Depends on the batch only.
      beta: > 0, strength of the pull to the reference.
      smoothing: in [0, 0.5), share of labels taken to be the wrong way round; for "sigmoid".
    Returns: two sums; the step divides.

    >>> term = preference_loss(jnp.array([0.0, 2.0]), jnp.ones(2), beta=0.5)
    >>> print(f"{term.total / term.weight:.4f}")
    0.5032

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothing: E. Mitchell 2023, "A note on DPO with noisy
    preferences", eq. 3; ipo: Azar et al. 2023, arXiv:2310.12036, eq. 17, with beta for its tau.
    """
    if kind == "ipo":
        cost = jnp.square(margin - 0.5 / beta)
    else:
        agree, differ = jax.nn.log_sigmoid(beta * margin), jax.nn.log_sigmoid(-beta * margin)
        cost = -((1.0 - smoothing) * agree + smoothing * differ)
    return Term(jnp.sum(weight * cost), jnp.sum(weight))


def preference_terms(
    log_probs_BT: jax.Array,
    batch: dict[str, jax.Array],
    *,
    beta: float,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    smoothing: float = 0.0,
) -> dict[str, Term]:
    """`preference_loss` of packed pairs, with what to look at.

    Args:
      log_probs_BT: [B, T] float32, of each token given those before it in its segment.
      batch: `loss_weights`, `segment_ids` and `reference_log_probs`, all [B, T].
      beta, kind, smoothing: see `preference_loss`.
    Returns: "loss"; metrics over pairs: "margin" (nats), "accuracy" (share with a margin above 0), "chosen_gain" and
      "rejected_gain" (log p - log p_ref of the answers). A pair counts where both of its answers have trained tokens.
    """
    counts_BT = target_weights(batch["loss_weights"], batch["segment_ids"]) > 0
    gain_BT = jnp.where(counts_BT, log_probs_BT - batch["reference_log_probs"], 0.0)
    segments_BT, P = batch["segment_ids"], batch["segment_ids"].shape[1] // SHORTEST + 1
    pair_BT = jnp.where(segments_BT > 0, (segments_BT - 1) // 2, P)  # padding is beyond the last

    def by_pair(x_BT, answer):
        of_answer = jnp.where(segments_BT % 2 == answer, x_BT, 0)
        return jax.vmap(lambda x, pair: jax.ops.segment_sum(x, pair, num_segments=P))(of_answer, pair_BT)

    chosen_BP, rejected_BP = by_pair(gain_BT, 1), by_pair(gain_BT, 0)
    tokens = [by_pair(counts_BT.astype(jnp.int32), answer) for answer in (1, 0)]
    weight_BP = ((tokens[0] > 0) & (tokens[1] > 0)).astype(jnp.float32)
    margin_BP = chosen_BP - rejected_BP
    loss = preference_loss(margin_BP, weight_BP, beta=beta, kind=kind, smoothing=smoothing)

    def mean(x_BP):
        return Term(jnp.sum(weight_BP * x_BP), loss.weight, coefficient=0.0)

    return {
        "loss": loss,
        "margin": mean(margin_BP),
        "accuracy": mean((margin_BP > 0).astype(jnp.float32)),
        "chosen_gain": mean(chosen_BP),
        "rejected_gain": mean(rejected_BP),
    }
