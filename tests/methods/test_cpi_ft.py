# SPDX-License-Identifier: Apache-2.0
"""Laws of CPI-FT, checked on what a run keeps: models, cores, the fused weights, and what the integration leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.methods import CpiFt, Dpi, MultiStage
from jaxlm.weights.merging import interpolate


@pytest.fixture(scope="module")
def cpi_ft(spring):
    """Makes a CPI-FT over springs: 8 updates of the staged pass and 4 of the integration, tasks a and b overlapping."""

    def make(probes=None, **changes):
        probes = {"probe_steps": 4, "fraction": 0.2, "order": "given", "threshold": 0.15} | (probes or {})
        return CpiFt(**({"dpi": Dpi(sft=spring.method, **probes), "integration_fraction": 0.35} | changes))

    return make


@pytest.fixture(scope="module")
def finished(spring, cpi_ft):
    """A run with groups (a, b) and (c): (parameters, job)."""
    return spring.finish(cpi_ft(), spring.world())


def kept(spring, job, kind):
    return [spring.flat(job.kept[f"{kind}-{task}"]) for task in "abc"]


def fusion(job, base):
    """The interpolation outside of all cores, by the library's own rule."""
    outside = jax.tree.map(lambda *cores: ~(cores[0] | cores[1] | cores[2]), *(job.kept[f"core-{t}"] for t in "abc"))
    return interpolate(base, [job.kept[f"model-{task}"] for task in "abc"], where=outside)


def test_entries_of_one_core_are_that_tasks_and_entries_of_several_go_to_the_largest_change(spring, finished):
    _, job = finished
    models, cores = kept(spring, job, "model"), kept(spring, job, "core")
    fused, before = spring.flat(job.kept["fused"]), spring.flat(job.params)
    owners = np.sum(cores, axis=0)
    for model, core in zip(models, cores, strict=True):
        mine = core & (owners == 1)
        assert mine.any() and fused[mine].tobytes() == model[mine].tobytes()
    shared = owners > 1
    sizes = np.where(cores, np.abs(np.stack(models) - before), -1)
    assert shared.any()
    np.testing.assert_array_equal(
        fused[shared], np.stack(models)[np.argmax(sizes, axis=0), np.arange(len(fused))][shared]
    )


def test_entries_of_no_core_are_the_interpolation_from_the_staged_pass(spring, finished):
    _, job = finished
    none = np.sum(kept(spring, job, "core"), axis=0) == 0
    base = job.ended["stage-2"][0]
    fused = spring.flat(job.kept["fused"])
    np.testing.assert_array_equal(fused[none], spring.flat(fusion(job, base))[none])
    assert np.any(fused[none] != spring.flat(base)[none])


def test_models_are_kept_and_updates_are_shared_by_staged_pass_and_integration(spring, finished):
    _, job = finished
    for task in "abc":
        assert spring.bits(job.kept[f"model-{task}"]) == spring.bits(job.ended[f"probe-{task}"][0])
    ends = {name: state[2] for name, state in job.ended.items()}
    assert ends == {"probe-a": 4, "probe-b": 8, "probe-c": 12, "stage-1": 17, "stage-2": 20, "integration": 20,
                    "integration-1": 23, "integration-2": 24}  # fmt: skip
    assert job.reporter.steps("train") == list(range(1, 25)) and job.reporter.compiles() <= 2
    assert job.scores.columns == ("before", "stage-1", "fused", "integration-1", "after")


def test_integration_begins_at_the_fused_weights_and_holds_the_cores_of_earlier_groups(spring, finished):
    params, job = finished
    a, b, _ = kept(spring, job, "core")
    first, second = (job.ended[f"integration-{number}"] for number in (1, 2))
    assert spring.bits(job.ended["integration"][0]) == spring.bits(job.kept["fused"])
    assert not spring.flat(first[1].held).any()
    np.testing.assert_array_equal(spring.flat(second[1].held), a | b)
    assert spring.flat(first[0])[a | b].tobytes() == spring.flat(params)[a | b].tobytes()
    assert np.any(spring.flat(first[0])[a] != spring.flat(job.kept["fused"])[a])  # its own group's are free


def test_a_group_may_hold_its_own_cores_too(spring, cpi_ft):
    params, job = spring.finish(cpi_ft(hold_current=True), spring.world())
    owned = np.any(kept(spring, job, "core"), axis=0)
    assert spring.flat(params)[owned].tobytes() == spring.flat(job.kept["fused"])[owned].tobytes()
    assert np.any(spring.flat(params)[~owned] != spring.flat(job.kept["fused"])[~owned])


def test_integration_draws_equal_shares_at_its_own_rate(spring, finished):
    _, job = finished
    rates = [line["learning_rate"] for line in job.reporter.lines if line["kind"] == "train"]
    assert rates[0] == pytest.approx(0.05) and rates[20] == pytest.approx(0.025)
    _, uneven = spring.finish(CpiFt(dpi=job_dpi(spring), integration_fraction=0.35), spring.world(),
                              rows={"a": 1, "b": 1, "c": 98})  # fmt: skip
    assert [uneven.ended[name][2] for name in ("stage-1", "stage-2")] == [13, 20]
    assert [uneven.ended[f"integration-{number}"][2] for number in (1, 2)] == [23, 24]


def job_dpi(spring):
    return Dpi(sft=spring.method, probe_steps=4, fraction=0.2, order=(("a", "b"), ("c",)))


@pytest.mark.parametrize("base", ["last_probe", "initial"])
def test_the_fusion_may_start_from_a_probe_or_from_the_given_weights(spring, cpi_ft, base):
    method = cpi_ft(base=base, integration_fraction=0.0)
    params, job = spring.finish(method, spring.world())
    start = job.kept["model-c"] if base == "last_probe" else job.params
    none = np.sum(kept(spring, job, "core"), axis=0) == 0
    np.testing.assert_array_equal(spring.flat(params)[none], spring.flat(fusion(job, start))[none])
    assert list(job.ended) == ["probe-a", "probe-b", "probe-c"] and method.total_steps(12, 3) == 12
    assert spring.bits(params) == spring.bits(job.kept["fused"])


def test_with_one_group_the_fusion_starts_from_joint_training(spring, cpi_ft):
    _, job = spring.finish(cpi_ft(probes={"groups": "joint"}), spring.world(), steps=12)
    joint, _ = spring.finish(MultiStage(method=spring.method, order=(("a", "b", "c"),)), spring.world(), steps=8)
    assert spring.bits(job.ended["stage-1"][0]) == spring.bits(joint)


def test_without_cores_it_is_an_interpolation_and_plain_stages(spring, cpi_ft):
    params, job = spring.finish(cpi_ft(probes={"fraction": 0.0}, integration_fraction=0.5), spring.world())
    base = job.ended["stage-3"][0]
    models = [job.kept[f"model-{task}"] for task in "abc"]
    assert spring.bits(job.kept["fused"]) == spring.bits(interpolate(base, models))
    assert not any(spring.flat(job.ended[f"integration-{number}"][1].held).any() for number in (1, 2, 3))
    assert spring.bits(params) == spring.bits(job.ended["integration-3"][0])


def test_random_cores_train_their_probes_first_so_that_no_report_is_lost(spring, cpi_ft):
    _, job = spring.finish(cpi_ft(probes={"cores": "random", "groups": "separate"}), spring.world())
    assert list(job.ended)[:4] == ["probe-a", "probe-b", "probe-c", "stage-1"]
    assert job.reporter.steps("train") == list(range(1, 25)) and job.reporter.steps("eval")[-1] == 24


def test_the_largest_angle_is_told(spring, finished, cpi_ft, capsys):
    _, job = finished
    cores = {task: job.kept[f"core-{task}"] for task in "abc"}
    models = [job.params, job.params, job.params]
    cpi_ft().fuse(job, job.params, lambda index: models[index], cores, [("a", "b"), ("c",)])
    assert "fusion: 0 radians at most between the models; below 0.032 it is linear" in capsys.readouterr().out


def test_what_cannot_work_is_refused(spring, cpi_ft):
    with pytest.raises(ValueError, match=r"task vector of base='initial' is zero; choose base='staged'"):
        CpiFt(base="initial", space="task_vectors")
    for weight in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"weight is 'mean' or in \[0, 1\]"):
            CpiFt(weight=weight)
    with pytest.raises(ValueError, match=r"integration_fraction must be in \[0, 1\), got 1"):
        CpiFt(integration_fraction=1)
    with pytest.raises(ValueError, match=r"set dpi\.core_source='probe'"):
        CpiFt(dpi=Dpi(core_source="stage"))
    with pytest.raises(ValueError, match=r"CPI-FT needs at least two tasks"):
        spring.finish(cpi_ft(), spring.world(), rows={"a": 10})
    job = spring.job(spring.world())
    with pytest.raises(ValueError, match=r"0\.1 of 12 updates is 1, too few for 2 groups"):
        cpi_ft(integration_fraction=0.1).run(job)
    assert "stage-1" not in job.ended  # before the staged pass, not after it
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), job.params)
    moved = jax.tree.map(lambda x: x + 1, job.params)
    with pytest.raises(ValueError, match=r"task 'b' left .* not finite"):
        cpi_ft().dpi.cores_of(spring.job(spring.world()), lambda index: bad if index else moved)
