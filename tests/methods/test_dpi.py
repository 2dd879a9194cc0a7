# SPDX-License-Identifier: Apache-2.0
"""Laws of DPI: what moved most is found and then stays to the bit, and everything else is plain training in stages."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.methods import Dpi, MultiStage, Sft
from jaxlm.methods.dpi import changes
from jaxlm.nn import Lora
from jaxlm.weights.overlap import jaccard

HELD = 19  # floor(0.2 * 96)


@pytest.fixture(scope="module")
def dpi(spring):
    """Makes a DPI over springs; by default each task is a stage."""
    return lambda **changes: Dpi(
        **({"sft": spring.method, "probe_steps": 4, "fraction": 0.2, "order": "given", "groups": "separate"} | changes)
    )


@pytest.fixture(scope="module")
def finished(spring, dpi, tmp_path_factory):
    """A run of three stages: (parameters, job)."""
    return spring.finish(dpi(), spring.world(), directory=tmp_path_factory.mktemp("dpi"))


def cores_of(job, tasks="abc"):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bool_, sharding=x.sharding), job.params)
    return [job.once(f"core-{task}", None, like) for task in tasks]


def test_entries_of_a_core_keep_their_bits_from_the_end_of_their_stage_to_the_end_of_the_run(spring, finished):
    params, job = finished
    masks = [spring.flat(core) for core in cores_of(job)]
    ended = [spring.flat(job.ended[f"stage-{number}"][0]) for number in (1, 2, 3)]
    for number, core in enumerate(masks[:2]):
        for later in ended[number + 1 :]:
            assert ended[number][core].tobytes() == later[core].tobytes()
    free = ~(masks[0] | masks[1])
    assert np.any(ended[2][free] != ended[1][free])  # while what is not held goes on learning
    np.testing.assert_array_equal(spring.flat(params), ended[2])


def test_the_held_set_only_grows_and_is_the_union_of_the_cores_of_earlier_groups(spring, finished):
    _, job = finished
    masks = [spring.flat(core) for core in cores_of(job)]
    held = [spring.flat(job.ended[f"stage-{number}"][1].held) for number in (1, 2, 3)]
    assert [core.sum() for core in masks] == [HELD] * 3
    np.testing.assert_array_equal(held[0], False)
    np.testing.assert_array_equal(held[1], masks[0])
    np.testing.assert_array_equal(held[2], masks[0] | masks[1])
    assert held[2].sum() <= 2 * HELD


def test_a_core_is_what_a_run_on_its_task_alone_moves_most_by_sorting(spring, finished):
    _, job = finished
    before = spring.flat(job.params)
    for task, core in zip("abc", cores_of(job), strict=True):
        assert job.seen[f"probe-{task}"] == [task]
        moved = np.abs(spring.flat(job.ended[f"probe-{task}"][0]) - before)
        assert set(np.flatnonzero(spring.flat(core))) == set(np.argsort(-moved, kind="stable")[:HELD])


def test_probes_and_stages_of_unequal_length_share_one_compiled_step(spring, dpi):
    world = spring.World(spring.world().stiffness, spring.world().targets)  # another loss function
    method = dpi(probe_steps=3)
    _, job = spring.finish(method, world, rows={"a": 10, "b": 30, "c": 80})
    assert [state[2] for state in job.ended.values()] == [3, 6, 9, 10, 13, 21]
    assert job.reporter.compiles() == 1


@pytest.mark.parametrize("changes", [{"fraction": 0.0}, {"hold": "none"}], ids=["nothing-to-hold", "hold-none"])
def test_without_a_held_set_it_is_plain_training_in_the_same_stages(spring, dpi, changes):
    order = (("b",), ("a", "c"))
    plain, _ = spring.finish(MultiStage(method=spring.method, order=order), spring.world())
    params, job = spring.finish(dpi(order=order, **changes), spring.world())
    assert spring.bits(params) == spring.bits(plain)
    assert not spring.flat(job.ended["stage-2"][1].held).any()
    assert ("probe-a" in job.ended) == ("fraction" in changes)  # no probe that decides nothing


def test_one_group_of_all_tasks_is_one_stage_of_plain_training(spring, dpi):
    plain, _ = spring.finish(MultiStage(method=spring.method, order=(("a", "b", "c"),)), spring.world())
    params, job = spring.finish(dpi(groups="joint"), spring.world())
    assert spring.bits(params) == spring.bits(plain)
    assert list(job.ended) == ["stage-1"] and dpi(groups="joint").total_steps(12, 3) == 12


def test_holding_changes_the_result(spring, dpi, finished):
    plain, _ = spring.finish(dpi(hold="none"), spring.world())
    assert spring.bits(plain) != spring.bits(finished[0])


def test_equal_probes_have_equal_cores_and_disjoint_tasks_none_in_common(spring, dpi):
    world = spring.world()
    tuned = [spring.tree(0.1 + world.stiffness[task] * np.linspace(1, 2, spring.size)) for task in (0, 0, 2)]
    job = spring.job(world)
    cores = dpi().cores_of(job, lambda index: tuned[index])
    assert jaccard(cores["a"], cores["b"]) == 1.0 and jaccard(cores["a"], cores["c"]) == 0.0
    assert dpi(groups="threshold").grouped(job, cores) == [("a", "b"), ("c",)]


def two_springs(spring, second, target):
    """Task "a" pulls at the first half of the entries towards 1, "b" at `second` towards `target`."""
    halves = np.zeros((2, spring.size))
    halves[0, :48] = 1.0
    halves[1, second] = 1.0
    return spring.World(halves, [np.ones(spring.size), np.full(spring.size, target)], noise=0.0)


def known(spring, world):
    """All of DPI on two tasks, with cores of the size of what a task moves."""
    rate = dataclasses.replace(spring.rate, learning_rate=0.3, b1=0.0, b2=0.9)
    method = Dpi(sft=spring.Springs(optimizer=rate), fraction=0.5, probe_steps=5, order="given")
    return spring.finish(method, world, tasks=("a", "b"), steps=80)


def test_tasks_on_disjoint_halves_have_disjoint_cores_and_both_reach_their_optimum(spring):
    world = two_springs(spring, slice(48, 96), -1.0)
    params, job = known(spring, world)
    first, second = (spring.flat(core) for core in job.kept.values())
    assert first.sum() == second.sum() == 48 and not np.any(first & second)
    ended = [job.ended[f"stage-{number}"][0] for number in (1, 2)]
    assert world.losses(ended[0])[0] == world.losses(ended[1])[0]
    assert spring.flat(ended[0])[first].tobytes() == spring.flat(params)[first].tobytes()
    assert world.losses(job.params).min() > 15 and world.losses(params).max() < 1e-2


def test_tasks_that_pull_the_same_half_in_opposite_directions_share_a_group(spring, capsys):
    _, job = known(spring, two_springs(spring, slice(0, 48), -1.0))
    assert jaccard(*job.kept.values()) == 1.0
    assert list(job.ended) == ["probe-a", "probe-b", "stage-1"]
    assert "warning: all tasks are in one group: this run is joint SFT" in capsys.readouterr().out


def test_the_plan_is_written_and_tells_overlaps_beside_their_chance_level(finished):
    _, job = finished
    with open(f"{job.options.directory}/plan.json") as file:
        plan = json.load(file)
    assert plan["groups"] == [["a"], ["b"], ["c"]] and plan["tasks"] == ["a", "b", "c"]
    assert plan["chance"] == pytest.approx(0.2 / 1.8) and plan["warnings"] == []
    assert np.diag(plan["overlap"]).tolist() == [1, 1, 1] and plan["overlap"][0][2] == 0
    assert plan["entries"] == {"a": HELD, "b": HELD, "c": HELD}


def test_groups_follow_the_overlap_of_cores_and_their_order_the_runs_seed(spring, dpi):
    world = spring.world()
    tuned = [spring.tree(0.1 + world.stiffness[task] * np.linspace(1, 2, spring.size)) for task in (0, 1, 2)]
    orders = set()
    for seed in range(6):
        job = spring.job(world, seed=seed)
        method = dpi(groups="threshold", order="random", threshold=0.5)
        groups = method.grouped(job, method.cores_of(job, lambda index: tuned[index]))
        assert sorted(groups) == [("a", "b"), ("c",)]
        orders.add(tuple(groups))
    assert len(orders) == 2


def test_random_cores_of_equal_size_need_no_probe_and_differ_by_task_and_seed(spring, dpi):
    method = dpi(cores="random")
    _, job = spring.finish(method, spring.world())
    assert list(job.ended) == ["stage-1", "stage-2", "stage-3"] and method.total_steps(12, 3) == 12
    assert job.reporter.steps("train") == list(range(1, 13))
    cores = [spring.flat(core) for core in job.kept.values()]
    other = spring.finish(method, spring.world(), seed=1)[1].kept["core-a"]
    assert [core.sum() for core in cores] == [HELD] * 3
    assert len({core.tobytes() for core in [*cores, spring.flat(other)]}) == 4
    np.testing.assert_array_equal(spring.flat(job.ended["stage-2"][1].held), cores[0])


def test_bottom_cores_are_those_that_moved_least_of_those_that_moved(spring, dpi):
    moved = np.linspace(1, 2, spring.size) * (np.arange(spring.size) >= 30)
    core = dpi(cores="bottom").core_of(spring.tree(moved), spring.tree(np.zeros(spring.size)), task="a")
    assert set(np.flatnonzero(spring.flat(core))) == set(range(30, 30 + HELD))


@pytest.mark.parametrize("cores", ["changed", "bottom"])
def test_entries_that_did_not_move_never_belong(spring, dpi, cores):
    moved = np.where(np.arange(spring.size) < 7, 1.0, 0.0)
    core = dpi(cores=cores).core_of(spring.tree(moved), spring.tree(0 * moved), task="a")
    assert set(np.flatnonzero(spring.flat(core))) == set(range(7))


def test_sizes_may_be_relative_and_cut_in_every_layer(spring, dpi):
    before = np.where(np.arange(spring.size) % 2, 1.0, 100.0)
    after = before + np.where(np.arange(spring.size) % 2, 0.5, 1.0)
    absolute, relative = (
        spring.flat(dpi(fraction=0.4, relative=r).core_of(spring.tree(after), spring.tree(before), task="a"))
        for r in (False, True)
    )
    assert not absolute[1::2].any() and not relative[::2].any()
    moved = np.arange(spring.size, dtype=np.float32) + 1
    core = dpi(scope="layer").core_of(spring.tree(moved), spring.tree(0 * moved), task="a")
    assert [spring.flat(core)[i : i + 32].sum() for i in (0, 32, 64)] == [6, 6, 6]
    zero = changes({"w": jnp.array([0.5])}, {"w": jnp.array([0.0])}, relative=True)
    assert zero["w"].tolist() == [0.5]


def test_cores_of_the_stages_themselves_need_no_probe_and_take_free_entries_only(spring, dpi):
    method = dpi(core_source="stage")
    assert method.total_steps(12, 3) == 12
    _, job = spring.finish(method, spring.world())
    assert list(job.ended) == ["stage-1", "stage-2", "stage-3"]
    ended = [spring.flat(job.params)] + [spring.flat(job.ended[f"stage-{number}"][0]) for number in (1, 2, 3)]
    held = [spring.flat(job.ended[f"stage-{number}"][1].held) for number in (1, 2, 3)]
    for number in (0, 1):
        moved = np.where(held[number], 0, np.abs(ended[number + 1] - ended[number]))
        added = held[number + 1] & ~held[number]
        assert set(np.flatnonzero(added)) == set(np.argsort(-moved, kind="stable")[:HELD])
        assert ended[number + 1][added].tobytes() == ended[3][added].tobytes()


def test_what_cannot_work_is_refused(spring, dpi):
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), got 1"):
        Dpi(fraction=1)
    for threshold in (0, 1.5):
        with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\].*use groups='joint'"):
            Dpi(threshold=threshold)
    with pytest.raises(ValueError, match="probe_steps must be at least 1, got 0"):
        Dpi(probe_steps=0)
    with pytest.raises(ValueError, match="lora trains adapters"):
        Dpi(sft=Sft(lora=Lora(rank=2)))
    with pytest.raises(ValueError, match=r"DPI needs at least two tasks.*with one this is SFT"):
        spring.finish(dpi(), spring.world(), rows={"a": 10})
    with pytest.raises(ValueError, match=r"missing \['c'\], repeated \[\]"):
        spring.finish(dpi(order=(("a",), ("b",)), hold="none"), spring.world())
    same = spring.tree(np.ones(spring.size))
    with pytest.raises(ValueError, match="task 'code' changed nothing: check its loss weights"):
        dpi().core_of(same, same, task="code")
    for cores in ("changed", "bottom"):
        with pytest.raises(ValueError, match=r"task 'code' left blocks/mlp/up/kernel with entries that are not finite"):
            dpi(cores=cores).core_of(spring.tree([*np.ones(spring.size - 1), np.nan]), same, task="code")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), same)
    with pytest.raises(ValueError, match=r"kernel is bfloat16: .* quantized by magnitude.*float32 masters"):
        dpi().core_of(half, half, task="code")


def test_groupings_that_mean_nothing_are_warned_of(spring, dpi, capsys):
    flat = np.arange(spring.size) % 5
    job = spring.job(spring.world())
    apart = {task: spring.tree(flat == number, bool) for number, task in enumerate("abc")}
    dpi(groups="threshold").grouped(job, apart)
    assert "warning: cores overlap no more than random sets: the grouping is arbitrary" in capsys.readouterr().out
    few = {task: spring.tree(np.arange(spring.size) < 7, bool) for task in "abc"}
    dpi(groups="threshold").grouped(job, few)
    said = capsys.readouterr().out
    assert "warning: all tasks are in one group" in said
    assert "the core of 'a' holds 7 entries instead of 19: no more of them moved" in said
