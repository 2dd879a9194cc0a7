# SPDX-License-Identifier: Apache-2.0
"""Ways to use a plan beside each other: what is timed is what is judged."""

import dataclasses

import jax
import pytest

from jaxlm.comparison_plans import judged, latencies
from jaxlm.data import ProceduralPlans, byte_tokenizer
from jaxlm.data.plans import PlannedExercises
from jaxlm.generate import Sampler, Sampling
from jaxlm.methods import RCapsule
from jaxlm.nn import Model, ModelConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

MODEL = Model(ModelConfig(vocab_size=264, width=16, num_layers=1, num_heads=2, mlp_width=24, max_length=128))


class Heard(Sampler):
    """A sampler that keeps what it is asked."""

    def sample(self, prompts, sampling, **options):
        self.asked = [*getattr(self, "asked", []), list(prompts)]
        return super().sample(prompts, sampling, **options)


@pytest.mark.parametrize("prompts", ["raw", "chat"])
def test_seconds_are_those_of_the_prompts_that_are_judged(prompts):
    method = dataclasses.replace(RCapsule.tiny(), num_capsules=0, prompts=prompts)
    exercises = PlannedExercises(ProceduralPlans(generator="recipe", size=2))
    records, sampling = [exercises[0], exercises[1]], Sampling(temperature=0.0, max_tokens=2)
    sampler = Heard(MODEL, MODEL.init(jax.random.key(0)), byte_tokenizer(), slots=2)
    judged(sampler, method, records, sampling)
    seconds = latencies(sampler, method, records, sampling)
    [right, *timed] = sampler.asked
    assert len(right) == 2 and timed == [right, right]
    assert set(seconds) == {"seconds_alone", "seconds_full"} and min(seconds.values()) > 0
