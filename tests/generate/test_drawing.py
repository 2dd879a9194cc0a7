# SPDX-License-Identifier: Apache-2.0
"""Laws of drawing a token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxlm.generate import Sampling
from jaxlm.generate.drawing import Draws, draw, kept

V = 12
LOGITS = np.random.default_rng(0).normal(size=V).astype(np.float32) * 1.5


def draws(rows, *, temperature=1.0, top_p=1.0, top_k=V, min_p=0.0, seed=0):
    def whole(value, dtype):
        return jnp.full(rows, value, dtype)

    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(rows))
    return Draws(
        whole(temperature, jnp.float32),
        whole(top_p, jnp.float32),
        whole(top_k, jnp.int32),
        whole(min_p, jnp.float32),
        keys,
    )


def exact(*, temperature=1.0, top_p=1.0, top_k=V, min_p=0.0):
    """Probabilities by the definitions, one filter after the other."""
    probs = np.exp(LOGITS.astype(np.float64) / temperature)
    probs /= probs.sum()
    order = np.argsort(-probs)
    probs[order[top_k:]] = 0
    probs /= probs.sum()
    held = 0.0
    for token in order:
        if held >= top_p:
            probs[token] = 0
        held += probs[token]
    probs[probs < min_p * probs.max()] = 0
    return probs / probs.sum()


OPTIONS = [
    {},
    {"temperature": 0.5},
    {"top_p": 0.8},
    {"top_k": 3},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 6, "top_p": 0.7, "min_p": 0.05},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_exact_probabilities(options):
    rows = 6000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (rows, V))
    found = draw(logits, draws(rows, **options), jnp.zeros(rows, jnp.int32))
    expected = exact(**options)
    counts = np.bincount(np.asarray(found.tokens), minlength=V)
    assert not counts[expected == 0].any()
    held = expected > 0
    if held.sum() > 1:
        assert stats.chisquare(counts[held], expected[held] * rows).pvalue > 1e-3
    np.testing.assert_allclose(found.log_probs, np.log(expected[np.asarray(found.tokens)]), atol=1e-5)
    plain = exact()
    np.testing.assert_allclose(found.raw_log_probs, np.log(plain[np.asarray(found.tokens)]), atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS[2:], ids=str)
def test_the_filters_keep_what_those_of_transformers_keep(options):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    logits = np.random.default_rng(1).normal(size=(5, 40)).astype(np.float32) * 3
    scores = torch.tensor(logits / options.get("temperature", 1.0))
    steps = {"top_k": theirs.TopKLogitsWarper, "top_p": theirs.TopPLogitsWarper, "min_p": theirs.MinPLogitsWarper}
    for name, warper in steps.items():
        if name in options:
            scores = warper(options[name])(None, scores)
    asked = {"top_k": 40} | options
    ours = kept(jnp.asarray(logits) / asked.get("temperature", 1.0), draws(5, **asked))
    np.testing.assert_array_equal(ours, np.isfinite(scores.numpy()))


def test_zero_temperature_takes_the_most_probable_token_whatever_the_key():
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (50, V))
    found = draw(logits, draws(50, temperature=0.0), jnp.zeros(50, jnp.int32))
    assert set(np.asarray(found.tokens).tolist()) == {int(np.argmax(LOGITS))}
    assert not np.any(found.log_probs)


def test_a_row_draws_the_same_beside_any_others():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(6, V)), jnp.float32)
    options = draws(6, top_p=0.9)
    counts = jnp.arange(6, dtype=jnp.int32)
    together = draw(logits, options, counts)
    for row in range(6):
        one = slice(row, row + 1)
        alone = draw(logits[one], jax.tree.map(lambda x, one=one: x[one], options), counts[one])
        assert int(alone.tokens[0]) == int(together.tokens[row])


@pytest.mark.parametrize(("kind", "temperature"), [("plain", 1.0), ("greedy", 0.0)])
def test_what_no_row_asks_for_can_be_left_out(kind, temperature):
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(40, V)), jnp.float32)
    options = draws(40, temperature=temperature)
    whole, less = (draw(logits, options, jnp.zeros(40, jnp.int32), kind=kind) for kind in ("filtered", kind))
    np.testing.assert_array_equal(whole.tokens, less.tokens)
    np.testing.assert_allclose(whole.log_probs, less.log_probs, atol=1e-6)
    np.testing.assert_allclose(whole.raw_log_probs, less.raw_log_probs, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"min_p": 1.0}, r"min_p must be in \[0, 1\), got 1.0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0: None keeps all"),
        ({"stop": ("",)}, "a stop string is empty"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
