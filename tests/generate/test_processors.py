# SPDX-License-Identifier: Apache-2.0
"""Laws of what changes logits before a draw."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data import byte_tokenizer
from jaxlm.generate import Sampler, Sampling
from jaxlm.nn import Model, ModelConfig

MODEL = Model(ModelConfig(vocab_size=259, width=16, num_layers=2, num_heads=2, max_length=128))
PARAMS = MODEL.init(jax.random.key(0))
PROMPTS = ["a", "some words", [5, 6, 7]]
COMPILED: list[str] = []  # one entry a compilation, whatever is compiled
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)
pytestmark = pytest.mark.usefixtures("quick_compiles")


def sampler(slots=3):
    return Sampler(MODEL, PARAMS, byte_tokenizer(), slots=slots, chunk=4)


def only_even(logits, seen):
    return jnp.where(jnp.arange(len(logits), dtype=jnp.int32) % 2 == 0, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Marked:
    """Prefers half of the vocabulary, by a key and the token before: what a watermark does."""

    key: int
    strength: float = 4.0

    def green(self, before, size):
        key = jax.random.fold_in(jax.random.key(self.key), before)
        return jax.random.bernoulli(key, 0.5, (size,))

    def __call__(self, logits, seen):
        before = seen.tokens[seen.length - 1]
        return logits + self.strength * self.green(before, len(logits))


def test_a_forbidden_token_is_never_drawn():
    for temperature in (0.0, 1.0):
        how = Sampling(num_samples=2, max_tokens=12, temperature=temperature)
        found = sampler().sample(PROMPTS, how, processors=[only_even])
        assert all(token % 2 == 0 for samples in found for sample in samples for token in sample.tokens)
    free = sampler().sample(PROMPTS, Sampling(num_samples=2, max_tokens=12))
    assert any(token % 2 for samples in free for sample in samples for token in sample.tokens)


def test_log_probs_are_of_what_was_drawn_from_and_raw_ones_of_the_model():
    engine = sampler()
    [[found]] = engine.sample(["abc"], Sampling(max_tokens=8, seed=3), processors=[only_even])
    tokens = [*byte_tokenizer().encode("abc"), *found.tokens.tolist()]
    logits = np.asarray(MODEL.logits(PARAMS, MODEL.apply(PARAMS, jnp.asarray([tokens], jnp.int32))))[0, 2:-1]
    rows = np.arange(len(found.tokens))

    def log_probs(logits):
        return (logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True)))[rows, found.tokens]

    np.testing.assert_allclose(found.raw_log_probs, log_probs(logits), atol=1e-4)
    even = np.where(np.arange(259) % 2 == 0, logits, -np.inf)
    np.testing.assert_allclose(found.log_probs, log_probs(even), atol=1e-4)
    np.testing.assert_allclose(found.raw_log_probs, engine.score(["abc"], [found.tokens])[0], atol=2e-4)


def test_a_processor_sees_the_tokens_before_and_not_the_neighbours():
    how = Sampling(num_samples=2, max_tokens=20, seed=1)
    mark = Marked(key=7)
    together = sampler().sample(PROMPTS, how, processors=[mark])
    alone = sampler(slots=1).sample(PROMPTS, how, processors=[mark])
    assert [[s.tokens.tolist() for s in row] for row in together] == [[s.tokens.tolist() for s in row] for row in alone]
    green = []
    for prompt, samples in zip(PROMPTS, together, strict=True):
        before = byte_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt
        for sample in samples:
            chain = [before[-1], *sample.tokens.tolist()]
            green += [bool(mark.green(a, 259)[b]) for a, b in itertools.pairwise(chain)]
    assert np.mean(green) > 0.85  # e^4 / (e^4 + 1) of a flat distribution; 0.5 without the mark


def test_the_same_processor_compiles_nothing_again():
    engine, mark = sampler(), Marked(key=3)
    engine.sample(PROMPTS, Sampling(max_tokens=8), processors=[only_even, mark])
    COMPILED.clear()
    engine.sample(PROMPTS, Sampling(max_tokens=9, seed=5), processors=[only_even, Marked(key=3)])
    assert not COMPILED


def test_what_is_no_processor_is_refused():
    with pytest.raises(ValueError, match="a processor is a function or a hashable callable, got int"):
        sampler().sample(["a"], Sampling(max_tokens=2), processors=[3])
