# SPDX-License-Identifier: Apache-2.0
"""Laws of the embedded sampler, on tiny models of random parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data import byte_tokenizer
from jaxlm.generate import Sampler, Sampling
from jaxlm.nn import Alibi, Hope, Learned, Model, ModelConfig, Rope, Xpos

TOKENIZER = byte_tokenizer()
CONFIG = ModelConfig(vocab_size=259, width=16, num_layers=2, num_heads=4, num_kv_heads=2, max_length=128)
MODEL = Model(CONFIG)
PARAMS = MODEL.init(jax.random.key(0))
PROMPTS = ["a", "what?", "a longer prompt, of forty bytes or more...", [5, 6, 7]]

COMPILED: list[str] = []  # one entry a compilation, whatever is compiled
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)
pytestmark = pytest.mark.usefixtures("quick_compiles")


def sampler(model=MODEL, params=PARAMS, **options):
    return Sampler(model, params, TOKENIZER, **({"slots": 3, "chunk": 4} | options))


def ids(prompt):
    return TOKENIZER.encode(prompt) if isinstance(prompt, str) else list(prompt)


def greedy(model, params, prompt, count):
    """One whole forward pass for each token."""
    tokens = ids(prompt)
    whole = jax.jit(lambda row: jnp.argmax(model.logits(params, model.apply(params, row)), axis=-1))
    for _ in range(count):
        row = jnp.asarray([tokens + [0] * (128 - len(tokens))], jnp.int32)
        tokens.append(int(whole(row)[0, len(tokens) - 1]))
        if tokens[-1] == TOKENIZER.eos_token_id:
            break
    return tokens[len(ids(prompt)) :]


KINDS = [Rope(), Learned(), Alibi(), Xpos(), Hope(theta_scale=0.05, damping="per_pair", learn_gap="head")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_greedy_tokens_are_those_of_whole_forward_passes(kind):
    model = Model(dataclasses.replace(CONFIG, positions=kind))
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, model.init(jax.random.key(0)))
    found = sampler(model, params).sample(PROMPTS, Sampling(max_tokens=9, temperature=0.0))
    for prompt, [completion] in zip(PROMPTS, found, strict=True):
        assert completion.tokens.tolist() == greedy(model, params, prompt, 9)


def test_a_sample_does_not_depend_on_its_neighbours_or_the_slots():
    sampling = Sampling(num_samples=3, max_tokens=11, temperature=0.8, top_p=0.95, seed=5)
    together = sampler().sample(PROMPTS, sampling)
    wide = sampler(slots=12, chunk=7).sample(PROMPTS, sampling)
    alone = sampler(slots=1).sample(PROMPTS, dataclasses.replace(sampling, num_samples=1))
    for found, other, first in zip(together, wide, alone, strict=True):
        assert [c.tokens.tolist() for c in found] == [c.tokens.tolist() for c in other]
        assert found[0].tokens.tolist() == first[0].tokens.tolist()
        assert len({tuple(c.tokens.tolist()) for c in found}) > 1  # and samples of a prompt differ


def test_another_seed_draws_other_tokens():
    one, two = (sampler().sample(["a"], Sampling(max_tokens=20, seed=seed))[0][0].tokens for seed in (0, 1))
    assert one.tolist() != two.tolist()


def test_log_probs_of_samples_are_those_of_scoring():
    engine = sampler()
    found = engine.sample(PROMPTS, Sampling(max_tokens=12, temperature=0.7, seed=1))
    scores = engine.score(PROMPTS, [completion.tokens for [completion] in found])
    for [completion], score in zip(found, scores, strict=True):
        np.testing.assert_allclose(completion.raw_log_probs, score, atol=2e-4)
        assert len(completion.log_probs) == len(completion.tokens)


def test_scores_do_not_depend_on_the_batch():
    texts = ["b", "cde", "fghij" * 9]
    together = sampler(slots=8).score(["a", "bb", "ccc"], texts)
    for i, text in enumerate(texts):
        alone = sampler(slots=1).score([["a", "bb", "ccc"][i]], [text])[0]
        np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-5)


def test_a_stop_token_ends_a_completion_and_is_its_last_token():
    free = sampler().sample(["a"], Sampling(max_tokens=30, seed=3))[0][0]
    stop = int(free.tokens[4])
    first = free.tokens.tolist().index(stop)
    found = sampler(stop_tokens=[stop]).sample(["a"], Sampling(max_tokens=30, seed=3))[0][0]
    assert found.tokens.tolist() == free.tokens[: first + 1].tolist()
    assert found.finish_reason == "stop" and free.finish_reason == "length"


def test_a_stop_string_is_cut_off_and_nothing_behind_it_is_kept():
    sampling = Sampling(max_tokens=60, seed=3)
    free = sampler().sample(["a"], sampling)[0][0]
    letters = [i for i, letter in enumerate(free.text) if letter.isascii() and letter.isprintable()]
    word = free.text[letters[3]]
    found = sampler(chunk=16).sample(["a"], dataclasses.replace(sampling, stop=(word,)))[0][0]
    assert found.text == free.text[: free.text.index(word)]
    assert found.finish_reason == "stop"
    assert found.tokens.tolist() == free.tokens[: len(found.tokens)].tolist()
    assert word in TOKENIZER.decode(found.tokens) and word not in TOKENIZER.decode(found.tokens[:-1])


@pytest.mark.parametrize("stop", [(), ("e",), ("th", "\n")])
def test_what_is_streamed_joins_to_the_text(stop):
    said = {}

    def hear(prompt, sample, text):
        said[prompt, sample] = said.get((prompt, sample), "") + text

    found = sampler().sample(PROMPTS, Sampling(num_samples=2, max_tokens=24, stop=stop, seed=9), stream=hear)
    for i, completions in enumerate(found):
        for n, completion in enumerate(completions):
            assert said.get((i, n), "") == completion.text


def test_programs_are_not_compiled_again_inside_a_bucket():
    engine = sampler(slots=5)
    for temperature in (1.0, 0.0):  # one program for draws, and one that only takes the best
        engine.sample(["a" * 10, "b" * 20], Sampling(max_tokens=20, temperature=temperature))
    COMPILED.clear()
    engine.sample(["c" * 33, "d" * 7], Sampling(max_tokens=12, temperature=0.3, seed=4))
    engine.sample(["e" * 40, "f"], Sampling(max_tokens=20, temperature=0.0))
    assert not COMPILED


def test_a_prompt_may_be_an_array_of_ids():
    sampling = Sampling(max_tokens=4, seed=1)
    lists, arrays = (sampler().sample([kind([5, 6, 7])], sampling)[0][0].tokens for kind in (list, np.array))
    assert lists.tolist() == arrays.tolist()
    with pytest.raises(ValueError, match="has no tokens"):
        sampler().sample([np.zeros(0, np.int32)], sampling)


def test_eight_devices_sample_what_one_does():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = jax.device_put(PARAMS, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    sampling = Sampling(num_samples=2, max_tokens=8, seed=2)
    one, eight = sampler().sample(PROMPTS, sampling), sampler(params=placed).sample(PROMPTS, sampling)
    assert [[c.tokens.tolist() for c in row] for row in one] == [[c.tokens.tolist() for c in row] for row in eight]


def test_what_does_not_fit_is_refused_with_its_numbers():
    with pytest.raises(ValueError, match=r"prompt 1 has 120 tokens, and 30 more exceed the 128 of a slot"):
        sampler().sample(["a", "b" * 120], Sampling(max_tokens=30))
    with pytest.raises(ValueError, match="has no tokens"):
        sampler().sample([""], Sampling(max_tokens=3))
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        sampler(slots=0)
