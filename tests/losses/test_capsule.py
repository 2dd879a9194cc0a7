# SPDX-License-Identifier: Apache-2.0
"""The two terms of a capsule's objective against NumPy, and one denominator each."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.losses import capsule_loss, reconstruction_loss, reconstruction_terms
from jaxlm.losses.capsule import pooled_plan_terms

R, J, D, V = 4, 5, 6, 11
DRAW = np.random.default_rng(0)
HIDDEN, TABLE = (DRAW.normal(size=s).astype(np.float32) for s in ((R, J, D), (V, D)))
PLAN = DRAW.integers(0, V, (R, J)).astype(np.int32)
MASK = (np.arange(J)[None] < np.array([[5], [2], [1], [0]])).astype(np.float32)  # the last one has no plan
EXEC = np.array([7.0, 3.0, 2.0, 4.0], np.float32)


def log_probs():
    logits = HIDDEN.astype(np.float64) @ TABLE.T
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logits, PLAN[..., None], axis=-1)[..., 0]


def expected():
    """sum_r n_r * mean nll_r, and the n_r of those with a plan."""
    nll, count = -(log_probs() * MASK).sum(1), MASK.sum(1)
    return (EXEC * nll / np.maximum(count, 1)).sum(), EXEC[:3].sum(), nll, count


def test_the_plan_term_is_nats_a_token_weighted_by_the_text_that_follows():
    total, weight, nll, count = expected()
    terms = reconstruction_terms(HIDDEN, TABLE, PLAN, MASK, EXEC, recon_weight=0.3, chunk=3)
    assert terms["plan_loss"].coefficient == 0.3
    np.testing.assert_allclose(terms["plan_loss"].total, total, rtol=1e-6)
    np.testing.assert_allclose(terms["plan_loss"].weight, weight, rtol=1e-6)
    np.testing.assert_allclose(terms["plan_nll"].total, nll.sum(), rtol=1e-6)
    assert terms["plan_nll"].weight == count.sum() == 8 and terms["plan_exact"].weight == 3
    found, tokens = reconstruction_loss(jnp.asarray(log_probs(), jnp.float32), jnp.asarray(MASK))
    np.testing.assert_allclose(found, nll, rtol=1e-6)
    whole = capsule_loss(jnp.ones(R), jnp.asarray(EXEC), found, tokens, recon_weight=0.3)
    np.testing.assert_allclose(whole["plan_loss"].total, total, rtol=1e-6)
    np.testing.assert_allclose(whole["plan_loss"].weight, weight, rtol=1e-6)
    assert whole["loss"].total == 4 and whole["loss"].weight == EXEC.sum()


def test_accuracies_count_the_argmax():
    best = np.argmax(HIDDEN @ TABLE.T, axis=-1).astype(np.int32)
    best[1, 1] = (best[1, 1] + 1) % V
    terms = reconstruction_terms(HIDDEN, TABLE, best, MASK, EXEC, recon_weight=0.3)
    assert (terms["plan_accuracy"].total, terms["plan_accuracy"].weight) == (7, 8)
    assert terms["plan_exact"].total == 2, "the plan that is not there is not exact either"


def test_the_table_gets_no_gradient_and_the_hidden_states_the_one_of_the_formula():
    def total(hidden, table):
        return reconstruction_terms(hidden, table, PLAN, MASK, EXEC, recon_weight=1.0)["plan_loss"].total

    of_hidden, of_table = jax.grad(total, argnums=(0, 1))(jnp.asarray(HIDDEN), jnp.asarray(TABLE))
    assert not of_table.any()
    logits = HIDDEN @ TABLE.T
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    weights = MASK * (EXEC / np.maximum(MASK.sum(1), 1))[:, None]
    right = weights[..., None] * ((share - np.eye(V)[PLAN]) @ TABLE)
    np.testing.assert_allclose(of_hidden, right, atol=2e-5)


def test_a_batch_in_parts_gives_the_sums_of_the_whole():
    whole = reconstruction_terms(HIDDEN, TABLE, PLAN, MASK, EXEC, recon_weight=0.3)
    parts = [
        reconstruction_terms(
            *(x[i : i + 1] for x in (HIDDEN,)),
            TABLE,
            PLAN[i : i + 1],
            MASK[i : i + 1],
            EXEC[i : i + 1],
            recon_weight=0.3,
        )
        for i in range(R)
    ]
    for name, term in whole.items():
        np.testing.assert_allclose(sum(part[name].total for part in parts), term.total, rtol=1e-6)
        np.testing.assert_allclose(sum(part[name].weight for part in parts), term.weight, rtol=1e-6)


def test_the_pooled_term_is_the_error_of_the_mean_row():
    guess = DRAW.normal(size=(R, D)).astype(np.float32)
    rms = np.sqrt(np.mean(TABLE**2))
    mean = (TABLE[PLAN] * MASK[..., None]).sum(1) / np.maximum(MASK.sum(1), 1)[:, None] / rms
    right = (EXEC * MASK.any(1) * np.mean((guess - mean) ** 2, axis=1)).sum()
    term = pooled_plan_terms(jnp.asarray(guess), TABLE, PLAN, MASK, EXEC, recon_weight=0.3)["plan_loss"]
    np.testing.assert_allclose(term.total, right, rtol=1e-6)
    assert term.weight == 12
