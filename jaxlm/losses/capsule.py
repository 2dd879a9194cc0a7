# SPDX-License-Identifier: Apache-2.0
"""Two terms of a capsule's objective: the text that follows it, and the plan that is rebuilt from it.

R examples, J plan tokens, D width, V vocabulary.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxlm.kernels.cross_entropy import weighted_nll
from jaxlm.losses.term import Term


def reconstruction_loss(log_probs_RJ: jax.Array, mask_RJ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nats of each plan given what came before it and its capsule, and its tokens: two [R] float32.

    >>> nll, count = reconstruction_loss(jnp.array([[-1.0, -2.0, -4.0]]), jnp.array([[1.0, 1.0, 0.0]]))
    >>> nll.tolist(), count.tolist()
    ([3.0], [2.0])
    """
    mask_RJ = mask_RJ.astype(jnp.float32)
    return -jnp.sum(jnp.where(mask_RJ > 0, log_probs_RJ, 0.0), axis=1), jnp.sum(mask_RJ, axis=1)


def plan_weights(exec_count_R: jax.Array, mask_RJ: jax.Array) -> jax.Array:
    """What each plan token weighs, [R, J]: an example's plan weighs as much as its text, whatever its length."""
    count_R = jnp.sum(mask_RJ, axis=1)
    return mask_RJ * (exec_count_R / jnp.maximum(count_R, 1.0))[:, None]


def capsule_loss(
    exec_nll_R: jax.Array,
    exec_count_R: jax.Array,
    plan_nll_R: jax.Array,
    plan_count_R: jax.Array,
    *,
    recon_weight: float,
) -> dict[str, Term]:
    """The objective of whole examples; both terms in nats a token, so that lambda means the same at any plan length.

        loss = sum_r nll_exec_r / sum_r n_r
        plan_loss = sum_r n_r * nll_plan_r / count_r / sum_r n_r [r has a plan],  with the coefficient lambda

    Args:
      exec_nll_R: [R] nats of the text that follows each capsule.
      exec_count_R: [R] n_r, its tokens.
      plan_nll_R, plan_count_R: [R], of `reconstruction_loss`; 0 tokens: an example without a plan.
      recon_weight: lambda >= 0; 0 makes the second term a metric, whose gradient is exactly 0.

    >>> terms = capsule_loss(jnp.array([6.0]), jnp.array([3.0]), jnp.array([4.0]), jnp.array([2.0]), recon_weight=0.5)
    >>> print({name: float(term.total / term.weight) for name, term in terms.items()})
    {'loss': 2.0, 'plan_loss': 2.0}
    """
    mean_R = plan_nll_R / jnp.maximum(plan_count_R, 1.0)
    weight_R = jnp.where(plan_count_R > 0, exec_count_R, 0.0)
    return {
        "loss": Term(jnp.sum(exec_nll_R), jnp.sum(exec_count_R)),
        "plan_loss": Term(jnp.sum(weight_R * mean_R), jnp.sum(weight_R), coefficient=recon_weight),
    }


def reconstruction_terms(
    hidden_RJD: jax.Array,
    table_VD: jax.Array,
    plan_RJ: jax.Array,
    mask_RJ: jax.Array,
    exec_count_R: jax.Array,
    *,
    recon_weight: float,
    chunk: int | None = None,
    groups: int = 1,
) -> dict[str, Term]:
    """`capsule_loss`'s "plan_loss" without ever holding all logits, and what is worth knowing beside it.

    Args:
      hidden_RJD: [R, J, D], of `plan_hidden`.
      table_VD: [V, D] the model's embedding table, which gets no gradient from here.
      plan_RJ: [R, J] int32.
      mask_RJ: [R, J] float32, 1 on plan tokens.
      exec_count_R: [R] n_r.
      recon_weight: lambda >= 0.
      chunk, groups: see `weighted_nll`.
    Returns: "plan_loss", and metrics "plan_nll" (nats a plan token, every token alike), "plan_accuracy" (share of plan
      tokens that are the argmax given those before) and "plan_exact" (share of plans all of whose tokens are).
    """
    weights_RJ = plan_weights(exec_count_R, mask_RJ)
    head_DV = jax.lax.stop_gradient(table_VD).T
    result = weighted_nll(hidden_RJD, head_DV, plan_RJ, weights_RJ, chunk=chunk, groups=groups)
    nll_R, count_R = reconstruction_loss(result.log_probs_BT, mask_RJ)
    right_R = jnp.sum(jnp.where(result.correct_BT, mask_RJ, 0.0), axis=1)
    some_R = (count_R > 0).astype(jnp.float32)
    return {
        "plan_loss": Term(result.total, jnp.sum(weights_RJ), coefficient=recon_weight),
        "plan_nll": Term(jnp.sum(nll_R), jnp.sum(count_R), coefficient=0.0),
        "plan_accuracy": Term(jnp.sum(right_R), jnp.sum(count_R), coefficient=0.0),
        "plan_exact": Term(jnp.sum(jnp.where(right_R == count_R, some_R, 0.0)), jnp.sum(some_R), coefficient=0.0),
    }


def pooled_plan_terms(
    guess_RD: jax.Array,
    table_VD: jax.Array,
    plan_RJ: jax.Array,
    mask_RJ: jax.Array,
    exec_count_R: jax.Array,
    *,
    recon_weight: float,
) -> Mapping[str, Term]:
    """The other published reading: the squared error of a pooled guess of the plan's mean embedding.

    plan_loss = sum_r n_r * mean_D (guess_r - mean_j E[plan_rj] / rms)^2 / sum_r n_r,  rms that of all rows of E
    """
    table_VD = jax.lax.stop_gradient(table_VD).astype(jnp.float32)
    rms = jnp.sqrt(jnp.mean(jnp.square(table_VD)))
    count_R = jnp.sum(mask_RJ, axis=1)
    rows = jnp.take(table_VD, plan_RJ, axis=0) * mask_RJ[..., None]
    target_RD = jnp.sum(rows, axis=1) / (rms * jnp.maximum(count_R, 1.0)[:, None])
    weight_R = jnp.where(count_R > 0, exec_count_R, 0.0)
    error_R = jnp.mean(jnp.square(guess_RD - target_RD), axis=1)
    return {"plan_loss": Term(jnp.sum(weight_R * error_R), jnp.sum(weight_R), coefficient=recon_weight)}
