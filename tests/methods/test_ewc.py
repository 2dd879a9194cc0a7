# SPDX-License-Identifier: Apache-2.0
"""Laws of EWC: its pull is the gradient of the penalty, and without strength it is plain training in stages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.methods import Ewc, MultiStage, Sft
from jaxlm.nn import Lora
from jaxlm.train.optimizer import make_optimizer
from jaxlm.transforms.elastic import pull


@pytest.fixture(scope="module")
def finished(spring):
    """A run of three stages with a strong pull: (parameters, job)."""
    return spring.finish(Ewc(sft=spring.method, strength=2.0, fisher_steps=3), spring.world())


def test_the_pull_is_the_gradient_of_the_penalties_of_all_earlier_tasks():
    """Against NumPy, for two tasks; a stage's own gradient comes on top."""
    draw = np.random.default_rng(0)
    fisher, solved = draw.gamma(1.0, size=(2, 7)).astype(np.float32), draw.normal(size=(2, 7)).astype(np.float32)
    theta, gradient = draw.normal(size=(2, 7)).astype(np.float32)
    tx = pull(optax.sgd(1.0), strength=0.3)
    state = tx.init({"w": jnp.asarray(theta)})
    state = state._replace(weight={"w": fisher.sum(0)}, anchor={"w": (fisher * solved).sum(0)})
    updates, after = tx.update({"w": jnp.asarray(gradient)}, state, {"w": jnp.asarray(theta)})

    def penalty(x):
        return 0.3 / 2 * np.sum(fisher.astype(np.float64) * (x - solved) ** 2)

    steps = 1e-4 * np.eye(7)
    slope = [(penalty(theta + step) - penalty(theta - step)) / 2e-4 for step in steps]
    np.testing.assert_allclose(updates["w"], -(gradient + slope), rtol=1e-4, atol=1e-5)
    assert after.weight is state.weight and after.anchor is state.anchor


def test_weights_are_mean_squares_of_batch_gradients_with_mean_one(spring, finished):
    _, job = finished
    world, expected = spring.world(), 0.0
    for number, task in ((1, "a"), (2, "b")):
        theta = spring.flat(job.ended[f"stage-{number}"][0]).astype(np.float64)
        batches, total = job.batches(tasks=[task], weights={task: 1.0}), 0.0
        for _ in range(3):
            batch = next(batches)
            ids = batch["task_ids"][:, 0]
            total += np.mean(world.stiffness[ids] * (theta - world.targets[ids] - batch["noise"]), axis=0) ** 2
        expected += total / total.mean()
    state = job.ended["stage-3"][1]
    np.testing.assert_allclose(spring.flat(state.weight), expected, rtol=2e-4, atol=1e-6)
    ended = [spring.flat(job.ended[f"stage-{number}"][0]) for number in (1, 2)]
    first = spring.flat(job.ended["stage-2"][1].weight)
    np.testing.assert_allclose(
        spring.flat(state.anchor), first * ended[0] + (expected - first) * ended[1], rtol=2e-4, atol=1e-5
    )


def test_looking_at_batches_moves_nothing(spring, finished):
    _, job = finished
    for number in (1, 2):
        assert spring.bits(job.ended[f"fisher-{number}"][0]) == spring.bits(job.ended[f"stage-{number}"][0])
    assert not spring.flat(job.ended["stage-1"][1].weight).any()
    assert Ewc(fisher_steps=3).total_steps(12, 3) == 18 and job.ended["stage-3"][2] == 18
    assert Ewc(fisher_steps=3, order=(("a", "b"), ("c",))).total_steps(12, 3) == 15


def test_without_strength_it_is_plain_training_in_stages(spring, finished):
    plain, _ = spring.finish(MultiStage(method=spring.method), spring.world())
    params, _ = spring.finish(Ewc(sft=spring.method, strength=0.0, fisher_steps=3), spring.world())
    assert spring.bits(params) == spring.bits(plain)
    assert spring.bits(finished[0]) != spring.bits(plain)


def test_the_stronger_the_pull_the_nearer_the_parameters_stay_where_they_mattered(spring):
    """To the end of stage 1, weighed by what mattered to its task; b shares most of a's entries."""
    distances = []
    for strength in (0.0, 2.0, 200.0):
        params, job = spring.finish(Ewc(sft=spring.method, strength=strength), spring.world())
        gap = spring.flat(params) - spring.flat(job.ended["stage-1"][0])
        distances.append(float(np.sum(spring.flat(job.ended["stage-2"][1].weight) * gap**2)))
    assert distances[0] > 1.2 * distances[1] > 1.2**2 * distances[2]


def test_weights_lie_where_their_parameters_lie_and_eight_devices_equal_one(spring, finished):
    method = Ewc(sft=spring.method, strength=2.0, fisher_steps=3)
    params, job = spring.finish(method, spring.world(), axes=(2, 2, 2))
    np.testing.assert_allclose(spring.flat(params), spring.flat(finished[0]), rtol=1e-4, atol=1e-5)
    state = job.placed["stage-3"]
    kernel = state.params["blocks"]["mlp"]["up"]["kernel"]
    assert tuple(kernel.spec) == (None, ("fsdp", "sequence"), "tensor")
    places = [state.opt_state.weight, state.opt_state.anchor, job.placed["fisher-1"].opt_state.total]
    for tree in places:
        jax.tree.map(lambda ours, theirs, x: _same(ours, theirs, x.ndim), tree, state.params, job.params)


def _same(ours, theirs, ndim):
    assert ours.is_equivalent_to(theirs, ndim), f"{ours} is not {theirs}"


def test_stages_of_any_length_share_one_update_function(spring, finished):
    short, long = (pull(make_optimizer(spring.rate, steps), strength=0.5) for steps in (3, 30))
    assert short.update is long.update
    assert short.update is not pull(make_optimizer(spring.rate, 3), strength=0.6).update
    assert finished[1].reporter.compiles() <= 2  # one to train, one to look


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match=r"strength must be >= 0, got -1"):
        pull(optax.sgd(1.0), strength=-1)
    with pytest.raises(ValueError, match="pull needs params"):
        tx = pull(optax.sgd(1.0), strength=1.0)
        tx.update({"w": jnp.ones(1)}, tx.init({"w": jnp.ones(1)}))
    with pytest.raises(ValueError, match="lora trains adapters"):
        Ewc(sft=Sft(lora=Lora(rank=2)))
    with pytest.raises(ValueError, match="fisher_steps must be at least 1, got 0"):
        Ewc(fisher_steps=0)
