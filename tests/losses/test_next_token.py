# SPDX-License-Identifier: Apache-2.0
"""The loss of packed rows: what counts, what does not, and how it splits into tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses.next_token import next_token_terms, target_weights

B, T, D, V = 2, 10, 8, 20


def make_batch():
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1, 2, 2, 0, 0]])
    keys = jax.random.split(jax.random.key(0), 4)
    batch = {
        "tokens": jax.random.randint(keys[0], (B, T), 0, V),
        "loss_weights": jax.random.uniform(keys[1], (B, T)),
        "segment_ids": segments,
        "task_ids": jnp.array([[0] * 4 + [2] * 6, [1] * 6 + [0] * 4]),
    }
    return jax.random.normal(keys[2], (B, T, D)), jax.random.normal(keys[3], (D, V)), batch


def test_loss_is_a_loop_in_numpy():
    hidden, head, batch = make_batch()
    logits = np.asarray(hidden @ head, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = weight = right = 0.0
    for b in range(B):
        for t in range(1, T):
            if batch["segment_ids"][b, t] == batch["segment_ids"][b, t - 1] != 0:
                token, w = int(batch["tokens"][b, t]), float(batch["loss_weights"][b, t])
                total, weight = total - w * log_probs[b, t - 1, token], weight + w
                right += w * (logits[b, t - 1].argmax() == token)
    terms = next_token_terms(hidden, head, batch, num_tasks=3)
    np.testing.assert_allclose([terms["loss"].total, terms["loss"].weight], [total, weight], rtol=1e-6)
    np.testing.assert_allclose(terms["accuracy"].total, right, rtol=1e-6)
    assert [term.coefficient for term in terms.values()] == [1.0, 0.0, 0.0]


def test_no_target_crosses_a_boundary():
    _, _, batch = make_batch()
    weights = target_weights(batch["loss_weights"], batch["segment_ids"])
    zero = np.array([[1, 0, 0, 0, 1, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0, 1, 0, 1, 1]], bool)
    np.testing.assert_array_equal(weights == 0, zero)
    np.testing.assert_array_equal(weights[~zero], batch["loss_weights"][~zero])


def test_the_last_state_of_a_segment_and_the_first_token_do_not_matter():
    hidden, head, batch = make_batch()
    gradient = jax.grad(lambda h: next_token_terms(h, head, batch, num_tasks=3)["loss"].total)(hidden)
    last = np.array([[0, 0, 0, 1, 0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 1, 0, 1, 1, 1]], bool)
    np.testing.assert_array_equal(jnp.any(gradient != 0, axis=-1), ~last)


def test_tasks_add_up_to_the_whole():
    hidden, head, batch = make_batch()
    terms = next_token_terms(hidden, head, batch, num_tasks=3)
    assert terms["loss_by_task"].total.shape == (3,)
    np.testing.assert_allclose(jnp.sum(terms["loss_by_task"].total), terms["loss"].total, rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(terms["loss_by_task"].weight), terms["loss"].weight, rtol=1e-6)
    alone = batch | {"loss_weights": jnp.where(batch["task_ids"] == 1, batch["loss_weights"], 0.0)}
    term = next_token_terms(hidden, head, alone, num_tasks=3)["loss"]
    np.testing.assert_allclose(terms["loss_by_task"].total[1], term.total, rtol=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_the_objective_has_the_z_loss_once(z_loss):
    hidden, head, batch = make_batch()

    def objective(h):
        terms = next_token_terms(h, head, batch, num_tasks=3, z_loss=z_loss, softcap=4.0)
        return sum(term.coefficient * term.total / term.weight for term in terms.values() if term.coefficient)

    def plain(h):
        logits = 4.0 * jnp.tanh(h @ head / 4.0)
        lse = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits[:, :-1], batch["tokens"][:, 1:, None], -1)[..., 0]
        weights = target_weights(batch["loss_weights"], batch["segment_ids"])[:, 1:]
        return jnp.sum(weights * (lse[:, :-1] - picked + z_loss * lse[:, :-1] ** 2)) / jnp.sum(weights)

    ours, expected = jax.value_and_grad(objective)(hidden), jax.value_and_grad(plain)(hidden)
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1], expected[1], rtol=1e-6, atol=1e-6 * float(jnp.max(jnp.abs(expected[1]))))
    assert ("z_loss" in next_token_terms(hidden, head, batch, num_tasks=3, z_loss=z_loss)) == bool(z_loss)
