# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction on packed rows, with its per-task parts.

B rows, T tokens, D width, V vocabulary, K tasks.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.kernels.cross_entropy import NllResult, weighted_nll
from jaxlm.losses.term import Term


def target_weights(loss_weights_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """The weight of each token as a target: 0 for the first token of every segment, which nothing predicts.

    >>> target_weights(jnp.ones((1, 5)), jnp.array([[1, 1, 2, 2, 0]])).tolist()
    [[0.0, 1.0, 0.0, 1.0, 0.0]]
    """
    goes_on = (segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]) & (segment_ids_BT[:, 1:] != 0)
    return jnp.where(jnp.pad(goes_on, ((0, 0), (1, 0))), loss_weights_BT.astype(jnp.float32), 0.0)


def score_tokens(
    hidden_BTD: jax.Array, head_DV: jax.Array, tokens_BT: jax.Array, weights_BT: jax.Array, **options: Any
) -> NllResult:
    """`weighted_nll` of each token given the hidden state BEFORE it; entry t of every [B, T] result is about token t.

    The first token of a row has no state before it: the caller gives it weight 0, its log-prob means nothing.
    """
    # Shift the tokens back and not the states forward: integers are cheaper to move.
    following_BT = jnp.roll(tokens_BT, -1, axis=1)
    result = weighted_nll(hidden_BTD, head_DV, following_BT, jnp.roll(weights_BT, -1, axis=1), **options)
    return result._replace(
        log_probs_BT=jnp.roll(result.log_probs_BT, 1, axis=1), correct_BT=jnp.roll(result.correct_BT, 1, axis=1)
    )


def next_token_terms(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    batch: dict[str, jax.Array],
    *,
    num_tasks: int,
    softcap: float | None = None,
    z_loss: float = 0.0,
    chunk: int | None = None,
    groups: int = 1,
) -> dict[str, Term]:
    """Cross-entropy of every weighted token given those before it in its segment.

        loss = sum_bt w_bt * -log p(token_bt | before) / sum_bt w_bt
        w = loss_weights, but 0 on the first token of a segment and on padding (segment 0)

    Args:
      hidden_BTD: [B, T, D], the model's final hidden states.
      head_DV: [D, V].
      batch: `tokens`, `loss_weights`, `segment_ids`, `task_ids`, all [B, T]; `loss_weights[b, t]` is the weight of
        token t as a target.
      num_tasks: K; `task_ids` lie in [0, K).
      softcap, z_loss, chunk, groups: see `weighted_nll`.
    Returns: "loss" in nats; metrics "loss_by_task" (vectors [K]) and "accuracy" (share of the weight whose token is
      the argmax); with `z_loss` > 0 also "z_loss", the mean squared log-partition, with that coefficient. All share
      one weight, so the gradient of "z_loss" travels with "loss", where one pass through the head makes both.

    >>> batch = {"tokens": jnp.array([[3, 1]]), "loss_weights": jnp.ones((1, 2)), "segment_ids": jnp.ones((1, 2), int),
    ...          "task_ids": jnp.zeros((1, 2), int)}
    >>> term = next_token_terms(jnp.ones((1, 2, 4)), jnp.zeros((4, 8)), batch, num_tasks=1)["loss"]
    >>> print(f"{term.total:.4f} over {term.weight:.0f}")
    2.0794 over 1
    """
    weights_BT = target_weights(batch["loss_weights"], batch["segment_ids"])
    options = {"softcap": softcap, "z_loss": z_loss, "chunk": chunk, "groups": groups}
    result = score_tokens(hidden_BTD, head_DV, batch["tokens"], weights_BT, **options)
    weight = jnp.sum(weights_BT)
    nll_BT = -weights_BT * result.log_probs_BT
    # The value of the likelihood alone, with the gradient of both parts.
    total = jnp.sum(nll_BT) + (result.total - jax.lax.stop_gradient(result.total)) if z_loss else result.total
    in_task_KBT = batch["task_ids"][None] == jnp.arange(num_tasks, dtype=batch["task_ids"].dtype)[:, None, None]

    def by_task(x_BT):
        return jnp.sum(jnp.where(in_task_KBT, x_BT[None], 0.0), axis=(1, 2))

    right = jnp.sum(jnp.where(result.correct_BT, weights_BT, 0.0))
    terms = {
        "loss": Term(total, weight),
        "loss_by_task": Term(by_task(nll_BT), by_task(weights_BT), coefficient=0.0),
        "accuracy": Term(right, weight, coefficient=0.0),
    }
    return terms | ({"z_loss": Term(result.z_total, weight, coefficient=z_loss)} if z_loss else {})
