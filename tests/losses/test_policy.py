# SPDX-License-Identifier: Apache-2.0
"""Policy-gradient and preference losses against loops in NumPy, and what their gradients must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels.cross_entropy import token_log_probs
from jaxlm.losses.policy import kept_tokens, policy_terms, support_log_probs
from jaxlm.losses.preference import preference_loss, preference_terms

B, T, D, V = 4, 9, 8, 21


def make_batch(seed=0):
    """Two rows of one segment and two of two, prompts of two tokens, ratios on both sides of the clip."""
    draw = np.random.default_rng(seed)
    segments = np.array([[1] * 7 + [0] * 2, [1] * 9, [1] * 4 + [2] * 5, [1] * 5 + [2] * 4])
    starts = np.diff(segments, axis=1, prepend=0) != 0
    prompt = starts | np.roll(starts, 1, axis=1)
    normal = lambda scale: jnp.asarray(draw.normal(size=(B, T)) * scale, jnp.float32)  # noqa: E731
    batch = {
        "loss_weights": jnp.asarray(np.where(prompt | (segments == 0), 0, draw.uniform(0.5, 1.5, (B, T))), jnp.float32),
        "segment_ids": jnp.asarray(segments, jnp.int32),
        "advantages": normal(1.0),
        "old_log_probs": normal(0.3) - 2.0,
        "reference_log_probs": normal(0.3) - 2.0,
    }
    return normal(0.3) - 2.0, batch


def test_the_surrogate_and_the_penalty_are_loops_in_numpy():
    log_probs, batch = make_batch()
    w, a, old, ref = (np.asarray(batch[n], np.float64) for n in list(batch)[:1] + list(batch)[2:])
    new = np.asarray(log_probs, np.float64)
    loss = kl = clipped = spread = far = 0.0
    for b in range(B):
        for t in range(T):
            ratio = np.exp(new[b, t] - old[b, t])
            near = min(max(ratio, 0.9), 1.3)
            loss -= w[b, t] * min(ratio * a[b, t], near * a[b, t])
            clipped += w[b, t] * ((a[b, t] > 0 and ratio > 1.3) or (a[b, t] < 0 and ratio < 0.9))
            gap = ref[b, t] - new[b, t]
            kl += w[b, t] * (np.exp(gap) - gap - 1)
            spread += w[b, t] * abs(new[b, t] - old[b, t])
            far += w[b, t] * (abs(ratio - 1) > 0.1)
    terms = policy_terms(log_probs, batch, clip_low=0.1, clip_high=0.3, kl=0.5)
    expected = {"loss": loss, "kl": kl, "clipped": clipped, "ratio_spread": spread, "ratio_far": far}
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name].total, value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(terms[name].weight, w.sum(), rtol=1e-6)
    assert 0 < clipped < w.sum() and {name: t.coefficient for name, t in terms.items() if t.coefficient} == {
        "loss": 1.0,
        "kl": 0.5,
    }


def test_at_a_ratio_of_one_the_gradient_is_that_of_reinforce():
    log_probs, batch = make_batch()
    batch["old_log_probs"] = log_probs
    gradient = jax.grad(lambda x: policy_terms(x, batch)["loss"].total)(log_probs)
    np.testing.assert_allclose(gradient, -batch["loss_weights"] * batch["advantages"], rtol=1e-6, atol=1e-7)


def test_no_advantage_no_gradient():
    log_probs, batch = make_batch()
    batch["advantages"] = jnp.zeros((B, T))
    gradient = jax.grad(lambda x: policy_terms(x, batch)["loss"].total)(log_probs)
    np.testing.assert_array_equal(gradient, 0)


def test_a_clipped_token_pulls_no_further_and_an_unlikely_good_one_still_does():
    _, batch = make_batch()
    batch["old_log_probs"] = jnp.zeros((B, T))

    def pull(log_ratio, advantage):
        batch["advantages"] = jnp.full((B, T), advantage)
        return jax.grad(lambda x: policy_terms(x, batch)["loss"].total)(jnp.full((B, T), log_ratio))[1, 5]

    assert pull(0.5, 1.0) == pull(-0.5, -1.0) == 0
    assert pull(-0.5, 1.0) < 0 < pull(0.5, -1.0)


def test_what_is_no_drawn_token_may_hold_anything():
    """Padding and prompts: not finite numbers, or ratios too large to be written down."""
    log_probs, batch = make_batch()
    out = batch["loss_weights"] == 0
    wild = batch | {
        n: jnp.where(out, x, batch[n]) for n, x in (("old_log_probs", -jnp.inf), ("reference_log_probs", 1e9))
    }

    def objective(x, batch):
        terms = policy_terms(x, batch, kl=1.0)
        return terms["loss"].total + terms["kl"].total

    for found, expected in zip(
        jax.value_and_grad(objective)(jnp.where(out, -jnp.inf, log_probs), wild),
        jax.value_and_grad(objective)(log_probs, batch),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


def hidden_and_head(seed=1):
    keys = jax.random.split(jax.random.key(seed), 3)
    tokens = jax.random.randint(keys[2], (B, T), 0, V)
    return jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V)), tokens


@pytest.mark.parametrize("chunk", [1, 12, 1000])
def test_without_filters_the_support_is_the_vocabulary(chunk):
    hidden, head, tokens = hidden_and_head()

    def plain(hidden):
        log_probs = token_log_probs(hidden, head, jnp.roll(tokens, -1, axis=1), softcap=5.0)
        return jnp.roll(log_probs, 1, axis=1)[:, 1:]

    def ours(hidden):
        return support_log_probs(hidden, head, tokens, softcap=5.0, chunk=chunk)[:, 1:]

    np.testing.assert_allclose(ours(hidden), plain(hidden), rtol=2e-5, atol=2e-6)
    loss = lambda f: jax.grad(lambda h: jnp.sum(jnp.sin(f(h))))(hidden)  # noqa: E731
    np.testing.assert_allclose(loss(ours), loss(plain), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("count", [1, 3, V])
def test_the_kept_set_is_found_from_the_log_prob_that_was_reported(count):
    """Whatever filter made it: only that the n most probable tokens stay is used."""
    hidden, head, _ = hidden_and_head()
    temperature = 0.7
    logits = np.roll(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64), 1, axis=1) / temperature
    order = np.argsort(-logits, axis=-1)
    inside = np.argsort(order, axis=-1) < count
    tokens = order[..., count // 2]
    normal = np.log(np.sum(np.where(inside, np.exp(logits), 0), axis=-1))
    reported = np.take_along_axis(logits, tokens[..., None], -1)[..., 0] - normal
    arguments = hidden, head, jnp.asarray(tokens, jnp.int32)
    kept = kept_tokens(*arguments, jnp.asarray(reported, jnp.float32), temperature=temperature, chunk=8)
    assert kept.shape == (B, T, 3) and kept.dtype == jnp.uint8
    found = np.unpackbits(np.asarray(kept), axis=-1, count=V).astype(bool)
    unseen = np.exp(logits - normal[..., None]) < 1e-5  # too little for sums of logits near 20 in float32
    np.testing.assert_array_equal(found[:, 1:] | unseen[:, 1:], inside[:, 1:] | unseen[:, 1:])
    again = support_log_probs(*arguments, kept, temperature=temperature)
    np.testing.assert_allclose(again[:, 1:], reported[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)])
def test_the_preference_loss_is_three_lines_of_numpy(kind, smoothing):
    margin, weight, beta = np.array([-3.0, -0.1, 0.0, 2.0]), np.array([1.0, 0.0, 1.0, 2.0]), 0.3
    p = 1 / (1 + np.exp(-beta * margin))
    cost = (
        -(1 - smoothing) * np.log(p) - smoothing * np.log(1 - p)
        if kind == "sigmoid"
        else (margin - 1 / (2 * beta)) ** 2
    )
    arrays = jnp.asarray(margin, jnp.float32), jnp.asarray(weight, jnp.float32)
    term = preference_loss(*arrays, beta=beta, kind=kind, smoothing=smoothing)
    np.testing.assert_allclose([term.total, term.weight], [np.sum(weight * cost), 4.0], rtol=1e-6)


def pairs(*segments):
    """[rows, 12] of segments of the given lengths, the first token of each a prompt."""
    ids = np.zeros((len(segments), 12), np.int32)
    for row, lengths in enumerate(segments):
        ids[row, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    weights = (ids > 0) & (np.diff(ids, axis=1, prepend=0) == 0)
    return {"segment_ids": jnp.asarray(ids), "loss_weights": jnp.asarray(weights, jnp.float32)}


def test_a_pair_has_one_margin_wherever_it_is_packed():
    draw = np.random.default_rng(0)
    gains = [draw.normal(size=n) for n in (3, 2, 4, 3)]
    packed, apart = pairs((3, 2, 4, 3), ()), pairs((3, 2), (4, 3))
    values = [np.zeros((2, 12), np.float32), np.zeros((2, 12), np.float32)]
    values[0][0] = np.concatenate(gains)
    values[1][0, :5], values[1][1, :7] = np.concatenate(gains[:2]), np.concatenate(gains[2:])
    expected = [gains[0][1:].sum() - gains[1][1:].sum(), gains[2][1:].sum() - gains[3][1:].sum()]
    for batch, log_probs in zip((packed, apart), values, strict=True):
        batch["reference_log_probs"] = jnp.full((2, 12), -1.0)
        terms = preference_terms(jnp.asarray(log_probs) - 1.0, batch, beta=0.5)
        np.testing.assert_allclose(terms["margin"].total, sum(expected), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(terms["loss"].total, np.sum(np.log1p(np.exp(-0.5 * np.array(expected)))), rtol=1e-5)
        assert float(terms["loss"].weight) == 2 and float(terms["accuracy"].total) == sum(np.array(expected) > 0)


def test_a_pair_without_an_answer_to_train_on_does_not_count():
    batch = pairs((3, 2), (4, 1)) | {"reference_log_probs": jnp.zeros((2, 12))}
    assert preference_terms(jnp.ones((2, 12)), batch, beta=0.5)["loss"].weight == 1
