# SPDX-License-Identifier: Apache-2.0
"""Laws of a session: requests with options of their own share the slots and do not touch each other."""

import jax
import numpy as np
import pytest

from jaxlm.data import byte_tokenizer
from jaxlm.generate import Sampler, Sampling
from jaxlm.nn import Model, ModelConfig

MODEL = Model(ModelConfig(vocab_size=259, width=16, num_layers=2, num_heads=2, max_length=256))
SAMPLER = Sampler(MODEL, MODEL.init(jax.random.key(0)), byte_tokenizer(), slots=3, chunk=4)
REQUESTS = [
    ("a", Sampling(max_tokens=9, seed=1)),
    ("b", Sampling(max_tokens=14, temperature=0.0)),
    ("some words", Sampling(max_tokens=11, temperature=0.7, top_p=0.8, seed=2)),
    ([5, 6], Sampling(max_tokens=5, top_k=4, num_samples=4, seed=1)),
    ("a", Sampling(max_tokens=17, min_p=0.1, seed=3, stop=("e",))),
]
pytestmark = pytest.mark.usefixtures("quick_compiles")


def run(session):
    found = {}
    while not session.idle:
        found |= dict(session.step())
    return found


def same(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a.text, a.tokens.tolist(), a.finish_reason) == (b.text, b.tokens.tolist(), b.finish_reason)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)
        np.testing.assert_allclose(a.raw_log_probs, b.raw_log_probs, atol=1e-5)


@pytest.fixture(scope="module")
def alone(quick_compiles):
    return [SAMPLER.sample([prompt], sampling)[0] for prompt, sampling in REQUESTS]


def test_a_request_gets_among_others_what_it_gets_alone(alone):
    session = SAMPLER.session()
    tickets = [session.submit(*request) for request in REQUESTS]
    found = run(session)
    for ticket, expected in zip(tickets, alone, strict=True):
        same(found[ticket], expected)


def test_requests_may_come_while_others_run_and_longer_ones_too(alone):
    session = SAMPLER.session()
    tickets = [session.submit(*REQUESTS[0])]
    found = dict(session.step())
    tickets.append(session.submit("x" * 100, Sampling(max_tokens=30, seed=4)))  # needs longer slots
    for request in REQUESTS[1:]:
        tickets.append(session.submit(*request))
        found |= dict(session.step())
    found |= run(session)
    del tickets[1]
    for ticket, expected in zip(tickets, alone, strict=True):
        same(found[ticket], expected)


def test_cancelling_frees_the_slots_and_disturbs_nobody(alone):
    session = SAMPLER.session()
    long = session.submit("long", Sampling(num_samples=8, max_tokens=200, seed=9))
    session.step()
    assert session.num_free == 0
    session.cancel(long)
    assert session.num_free == SAMPLER.num_slots and session.idle
    ticket = session.submit(*REQUESTS[0])
    other = session.submit("long", Sampling(max_tokens=200, seed=9))
    session.step()
    session.cancel(other)
    session.cancel(other)  # nothing is left to forget
    found = run(session)
    assert found.keys() == {ticket}
    same(found[ticket], alone[0])


def test_a_stream_says_what_the_completion_holds():
    said = {}
    session = SAMPLER.session()
    how = Sampling(max_tokens=20, num_samples=2, seed=4)
    ticket = session.submit("abc", how, stream=lambda n, text: said.update({n: said.get(n, "") + text}))
    assert [completion.text for completion in run(session)[ticket]] == [said[0], said[1]]


def test_what_does_not_fit_is_refused_and_nothing_is_left_of_it():
    session = SAMPLER.session()
    with pytest.raises(ValueError, match="250 tokens, and 30 more exceed the 256 of a slot"):
        session.submit("x" * 250, Sampling(max_tokens=30))
    assert session.idle
