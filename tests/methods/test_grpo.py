# SPDX-License-Identifier: Apache-2.0
"""GRPO: what is sampled is what is trained, groups are their own measure, a rollout is a function of few things."""

import dataclasses
import functools

import numpy as np
import pytest

from jaxlm.data.config import Procedural, Rows
from jaxlm.losses.policy import support_log_probs
from jaxlm.methods.grpo import Grpo
from jaxlm.methods.rollouts import Rollouts, group_advantages
from jaxlm.nn.config import Lora
from jaxlm.rewards import ExactMatch
from jaxlm.train.options import AdamW

pytestmark = pytest.mark.usefixtures("quick_compiles")


@dataclasses.dataclass(frozen=True)
class Letters:
    """The share of lower-case letters: any model can learn to write more of them."""

    def __call__(self, text, record):
        return sum(letter in "abcdefghijklmnopqrstuvwxyz" for letter in text) / 8


FAST = AdamW(learning_rate=1e-2, schedule="constant", warmup=0.0)
TINY = Grpo(optimizer=FAST, reward=Letters(), group_size=4, max_tokens=8, kl=0.01)
COPYING = Procedural(generator="copying", size=64, options={"length": 2})


@pytest.fixture
def job_of(spring):
    """A job as a run makes it."""
    return functools.partial(spring.decoder_job, train=COPYING, length=32)


@pytest.fixture
def rollouts_of(job_of):
    """A job and what its method samples, from the job's own parameters."""

    def make(method, **options):
        job = job_of(method, **options)
        records = job.batches(rows=job.options.batch_size // method.group_size)
        return job, Rollouts(method, job, method.model(job.model), records, lambda: job.params)

    return make


FILTERS = [
    {"top_k": 1},
    {"temperature": 0.7},
    {"top_p": 0.8},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1},
]


@pytest.mark.parametrize("how", FILTERS, ids=str)
def test_before_any_update_every_ratio_is_one(how, rollouts_of):
    """The sampler's own log-probs against those of the training pass, token by token; all of the vocabulary is off."""
    method = dataclasses.replace(TINY, kl=0.0, **how)
    job, rollouts = rollouts_of(method)
    params = job.params
    batch = next(rollouts)
    hidden = job.model.apply(params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
    head, drawn = job.model.head(params), of_completion(batch)

    def off(log_probs):
        """|ratio - 1| of every drawn token."""
        return np.abs(np.expm1(np.where(drawn, np.asarray(log_probs) - batch["old_log_probs"], 0)))

    ours = support_log_probs(hidden, head, batch["tokens"], batch.get("kept"), temperature=method.temperature)
    assert drawn.sum() > 60 and np.max(off(ours)) < 1e-4
    assert ("kept" in batch) == (how != {"temperature": 0.7})
    raw = support_log_probs(hidden, head, batch["tokens"])
    assert np.max(off(raw)) > 0.1, "the whole vocabulary at temperature 1 would have been another policy"


def of_completion(batch):
    """[B, T] bool, the tokens that were drawn: prompts of these tests end with '='."""
    first = np.argmax(batch["tokens"] == ord("="), axis=1)[:, None]
    return (np.arange(batch["tokens"].shape[1])[None] > first) & (batch["segment_ids"] > 0)


def test_a_group_is_measured_by_itself():
    rewards = np.array([[0.0, 0.0, 0.0, 1.0], [2.0, 4.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    for normalize in ("std", "none"):
        found = group_advantages(rewards, normalize=normalize)
        for row, group in enumerate(rewards):
            spread = group.std() if normalize == "std" and group.std() else 1.0
            np.testing.assert_allclose(found.advantages[row], (group - group.mean()) / spread, rtol=1e-6)
        np.testing.assert_array_equal(found.flat[:, 0], [False, False, True])
        np.testing.assert_allclose(found.spread[:, 0], rewards.std(axis=1), rtol=1e-6)
    tenth = group_advantages(np.full((1, 3), 0.1), normalize="std")  # whose mean is not 0.1
    assert tenth.flat.all() and not tenth.advantages.any()


@dataclasses.dataclass(frozen=True)
class Parity:
    """Flat for prompts whose last digit is even, with some spread for the others."""

    def __call__(self, text, record):
        return float(len(text)) + hash_of(text) if int(record["prompt"][-2]) % 2 else 1.0


def hash_of(text):
    return sum(map(ord, text)) % 101 / 100


@pytest.mark.parametrize("flat_groups", ["drop", "keep"])
def test_groups_without_spread_are_counted_and_left_out(flat_groups, rollouts_of):
    method = dataclasses.replace(TINY, reward=Parity(), flat_groups=flat_groups)
    _, rollouts = rollouts_of(method, batch_size=32)
    batch = next(rollouts)
    flat = batch["sample/flat_groups"] > 0
    assert 0 < flat.sum() < 32 and not batch["advantages"][flat].any()
    assert np.any(batch["loss_weights"][flat]) == (flat_groups == "keep")
    assert np.all(np.any(batch["loss_weights"][~flat], axis=1))


def test_a_rollout_without_any_spread_stays_and_teaches_nothing(job_of, spring):
    reporter = spring.Heard()
    method = dataclasses.replace(TINY, reward=ExactMatch(), kl=0.0)
    job = job_of(method, reporter=reporter, steps=2)
    after = method.run(job)
    assert [line["flat_groups"] for line in reporter.updates()] == [1.0, 1.0]
    assert spring.bits(after) == spring.bits(job.params) and reporter.updates()[0]["tokens_sampled"] > 16


def test_a_rollout_is_a_function_of_seed_number_and_parameters(rollouts_of, spring):
    (_, one), (_, same), (_, other) = rollouts_of(TINY), rollouts_of(TINY), rollouts_of(TINY, seed=1)
    first, second = next(one), next(one)
    assert spring.bits(first) == spring.bits(next(same)) != spring.bits(next(other))
    assert spring.bits(first) != spring.bits(second)


@pytest.mark.parametrize(
    "method", [TINY, dataclasses.replace(TINY, lora=Lora(rank=2), top_p=0.9)], ids=["full", "lora"]
)
def test_a_run_stopped_within_a_rollout_equals_one_that_was_not(method, tmp_path, job_of, spring):
    method = dataclasses.replace(method, updates=2)

    whole = method.run(job_of(method, steps=4))
    method.run(job_of(method, steps=3, directory=str(tmp_path)))
    assert spring.bits(method.run(job_of(method, steps=4, directory=str(tmp_path)))) == spring.bits(whole)


def test_parts_of_a_batch_and_devices_change_nothing(job_of, spring):
    """One update and its metrics: micro-batches, and eight devices with their parts of the rollout."""
    found = []
    for options in ({}, {"micro_batches": 4}, {"devices": 8}):
        reporter = spring.Heard()
        TINY.run(job_of(TINY, reporter=reporter, steps=1, **options))
        found.append(
            {name: reporter.updates()[0][name] for name in ("loss", "kl", "reward", "group_spread", "gradient_norm")}
        )
    for other in found[1:]:
        for name, value in found[0].items():
            np.testing.assert_allclose(other[name], value, rtol=2e-4, atol=2e-6, err_msg=name)


def test_the_reward_rises_and_the_reference_is_left(job_of, spring):
    reporter = spring.Heard()
    method = dataclasses.replace(TINY, updates=2)
    method.run(job_of(method, reporter=reporter, steps=40, batch_size=32))
    lines = reporter.updates()
    assert lines[0]["kl"] < 1e-9 and lines[0]["ratio_spread"] < 1e-5 < lines[1]["ratio_spread"]
    assert lines[-1]["kl"] > 0.01
    assert lines[0]["reward"] < 0.2 and lines[-1]["reward"] > 0.5
    assert lines[-1]["reward/copy"] == pytest.approx(lines[-1]["reward"])
    assert lines[1]["tokens_sampled"] == 0 < lines[0]["tokens_sampled"] <= 32 * 8


def test_what_cannot_work_is_refused(job_of):
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        Grpo(group_size=1)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        Grpo(temperature=0.0)
    with pytest.raises(ValueError, match="reward must be called with a text and its record, got 'exact'"):
        Grpo(reward="exact")
    with pytest.raises(ValueError, match="batch_size 16 is no multiple of group_size 3"):
        method = dataclasses.replace(TINY, group_size=3)
        method.run(job_of(method))
    with pytest.raises(ValueError, match=r'set data\.packing="none"'):
        TINY.run(job_of(TINY, packing="first_fit"))
    with pytest.raises(ValueError, match=r"item \d+: a prompt of 8 tokens and max_tokens 30 do not fit a row of 32"):
        method = dataclasses.replace(TINY, max_tokens=30)
        method.run(job_of(method))


@dataclasses.dataclass(frozen=True)
class Broken:
    """A verifier that divides by zero."""

    def __call__(self, text, record):
        return float("nan")


def test_a_reward_that_is_no_number_names_the_record(job_of):
    method = dataclasses.replace(TINY, reward=Broken())
    with pytest.raises(ValueError, match=r"record 0: rewards must be finite, got \[nan.*Broken"):
        method.run(job_of(method, train=Rows(records=({"prompt": "a=", "completion": "b"},))))
