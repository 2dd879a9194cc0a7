# SPDX-License-Identifier: Apache-2.0
"""Laws of EPI as a method: SFT with its optimizer wrapped, in one run and over stages."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.methods import Epi, MultiStage, Sft
from jaxlm.nn import Lora
from jaxlm.transforms import held_mask


@pytest.fixture(scope="module")
def epi(spring):
    """Makes an EPI over springs whose set changes every two updates."""
    return lambda **changes: Epi(
        **({"sft": spring.method, "fraction": 0.2, "warmup": 2, "refresh_every": 2, "decay": 0.5} | changes)
    )


@pytest.fixture(scope="module")
def plain(spring):
    return spring.finish(spring.method, spring.world())[0]


@pytest.mark.parametrize("changes", [{"apply": False}, {"fraction": 0.0}], ids=["watching", "nothing-to-hold"])
def test_without_holding_its_parameters_are_those_of_sft(spring, epi, plain, changes):
    params, job = spring.finish(epi(**changes), spring.world())
    assert spring.bits(params) == spring.bits(plain)
    held = [line["isolation/held"] for line in job.reporter.lines if line["kind"] == "train"]
    assert held[0] == 0 and held[-1] == pytest.approx(0.0 if "fraction" in changes else 19 / 96)


@pytest.fixture(scope="module")
def staged(spring, epi):
    """Three stages with one choice, in the first of them: (parameters, job)."""
    world = spring.World(spring.world().stiffness, spring.world().targets)  # another loss function, to compile
    return spring.finish(MultiStage(method=epi(refresh_every=None)), world)


def test_over_stages_the_held_set_and_the_importance_go_on_while_moments_begin_afresh(spring, staged):
    params, job = staged
    states = [job.ended[f"stage-{number}"][1] for number in (1, 2, 3)]
    assert [int(state.step) for state in states] == [4, 8, 12]
    assert spring.bits(states[0].marks) == spring.bits(states[2].marks)
    held = spring.flat(held_mask(states[0]))
    assert held.sum() == 19 and np.any(spring.flat(params) != spring.flat(job.ended["stage-1"][0]))
    assert spring.flat(job.ended["stage-1"][0])[held].tobytes() == spring.flat(params)[held].tobytes()
    importance = [spring.flat(state.importance) for state in states]
    only_c = spring.world().stiffness[2] > 0  # stage 3 alone has gradients there
    np.testing.assert_array_equal(importance[1][only_c], 0)
    assert importance[2][only_c].all()
    np.testing.assert_array_equal(importance[2][~only_c], importance[1][~only_c] * 0.5**4)
    rates = [line["learning_rate"] for line in job.reporter.lines if line["kind"] == "train"]
    assert rates == pytest.approx(3 * [0.05, 0.0375, 0.025, 0.0125])
    assert job.reporter.compiles() == 1


def test_the_first_update_of_a_stage_is_that_of_fresh_moments(spring, epi):
    """Adam's first update is the rate, whatever came before, where the gradient is not zero."""
    method = MultiStage(method=epi(fraction=0.0), order=(("c",), ("a",)))
    _, job = spring.finish(method, spring.world(), steps=2, rows={"a": 10, "c": 10})
    moved = spring.flat(job.ended["stage-2"][0]) - spring.flat(job.ended["stage-1"][0])
    np.testing.assert_allclose(np.abs(moved[spring.world().stiffness[0] > 0]), 0.05, rtol=1e-3)
    assert not moved[spring.world().stiffness[0] == 0].any()


def test_an_average_of_its_own_for_each_task_is_not_touched_by_other_tasks(spring, epi):
    _, job = spring.finish(MultiStage(method=epi(per_task=True)), spring.world())
    first, _, third = (job.ended[f"stage-{number}"][1].importance for number in (1, 2, 3))
    assert spring.flat(first[0]).any() and not spring.flat(first[1]).any() and not spring.flat(first[2]).any()
    assert spring.bits(third[0]) == spring.bits(first[0])
    assert spring.flat(third[1]).any() and spring.flat(third[2]).any()


def test_a_batch_counts_for_the_task_with_most_loss_weight_in_it(spring, epi):
    world = spring.world()
    whose = epi(per_task=True).phase(world, num_tasks=3, steps=4).extra
    ids, weights = jnp.array([[0, 0, 2], [1, 1, 1]]), jnp.array([[1.0, 1.0, 2.5], [0.8, 0.8, 0.8]])
    assert int(whose({"task_ids": ids, "loss_weights": weights})["task"]) == 2
    assert int(whose({"task_ids": ids, "loss_weights": jnp.ones((2, 3))})["task"]) == 1
    assert epi().phase(world, num_tasks=3, steps=4).extra({}) == {}


def test_stages_share_one_update_function_and_only_equal_rules_do(epi):
    short, long = (epi().tx(steps, num_tasks=3) for steps in (3, 30))
    assert short.update is long.update and short.update is not epi(decay=0.6).tx(3, num_tasks=3).update


def test_adapters_are_refused():
    with pytest.raises(ValueError, match="EPI holds entries of the model's own parameters, lora trains adapters"):
        Epi(sft=Sft(lora=Lora(rank=2))).phase(None, num_tasks=1, steps=1)
