# SPDX-License-Identifier: Apache-2.0
"""Laws of runs in stages: who gets which updates, and that a run killed anywhere goes on as if nothing had happened."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import jaxlm.run
import jaxlm.train.held_out
import jaxlm.train.job
from jaxlm.config import RunConfig
from jaxlm.data import DataConfig, Procedural, Task
from jaxlm.methods import CpiFt, Dpi, Ewc, MultiStage, Sft
from jaxlm.methods.stages import in_order, plan
from jaxlm.nn import Lora, ModelConfig
from jaxlm.run import run
from jaxlm.train import AdamW, RunOptions
from jaxlm.train.mesh import make_mesh
from jaxlm.train.reporter import RunReporter, read_metrics
from jaxlm.train.scores import Scores

ROWS = {"a": 10, "b": 30, "c": 40}


def lengths(stages):
    return [stage.steps for stage in stages]


def test_updates_are_divided_by_rows_or_equally_and_none_is_lost():
    groups = [["a"], ["b"], ["c"]]
    assert lengths(plan(groups, ROWS, steps=16)) == [2, 6, 8]
    assert lengths(plan(groups, ROWS, steps=16, mixing="balanced")) == [5, 6, 5]
    assert lengths(plan([["c", "a"], ["b"]], ROWS, steps=16)) == [10, 6]
    for steps in range(3, 40):
        stages = plan(groups, {"a": 1, "b": 1, "c": 1000}, steps=steps, first_step=7)
        assert sum(lengths(stages)) == steps and min(lengths(stages)) >= 1
        assert [s.first_step for s in stages] == [7, 7 + stages[0].steps, 7 + stages[0].steps + stages[1].steps]


def test_rows_inside_a_stage_follow_the_mixing_and_replay_is_shared_by_earlier_tasks():
    first, second = plan([["a", "b"], ["c"]], ROWS, steps=8, replay=0.2)
    assert first.weights == {"a": 0.25, "b": 0.75}
    assert second.weights == pytest.approx({"c": 0.8, "a": 0.1, "b": 0.1})
    first, second = plan([["a", "b"], ["c"]], ROWS, steps=8, mixing="balanced")
    assert first.weights == {"a": 0.5, "b": 0.5} and second.weights == {"c": 1.0}


def test_plans_and_orders_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="2 updates are too few for 3 stages"):
        plan([["a"], ["b"], ["c"]], ROWS, steps=2)
    for replay in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"replay is a share in \[0, 1\)"):
            plan([["a"]], ROWS, steps=2, replay=replay)
    assert in_order((), ["a", "b"]) == [("a",), ("b",)]
    assert in_order((("b", "c"), ("a",)), ["a", "b", "c"]) == [("b", "c"), ("a",)]
    with pytest.raises(ValueError, match=r"names \['d'\], which have no training records; there are a, b"):
        in_order((("a",), ("b",), ("d",)), ["a", "b"])
    with pytest.raises(ValueError, match=r"missing \['b'\], repeated \['a'\]"):
        in_order((("a",), ("a",)), ["a", "b"])


def dpi(spring, **changes):
    return Dpi(**({"sft": spring.method, "probe_steps": 2, "fraction": 0.2, "order": "given"} | changes))


# What is killed where: an update of every kind of stage, its last one, the scoring between stages.
KILLED = {
    "multi_stage": [("train", 3), ("eval", 4), ("train", 5), ("eval", 8), ("train", 12)],
    "dpi": [("train", 1), ("train", 4), ("train", 7), ("eval", 14), ("train", 15), ("train", 18)],
    "dpi_stage": [("train", 3), ("train", 5), ("train", 11)],
    "cpi_ft": [("train", 5), ("train", 8), ("eval", 14), ("train", 15), ("train", 17), ("eval", 17), ("train", 18)],
    "ewc": [("train", 3), ("train", 5), ("train", 6), ("eval", 10), ("train", 11), ("train", 15)],
}


def staged_methods(spring):
    return {
        "multi_stage": MultiStage(method=spring.method, replay=0.25, hold_random=0.3),
        "dpi": dpi(spring),
        "dpi_stage": dpi(spring, groups="separate", core_source="stage"),
        "cpi_ft": CpiFt(dpi=dpi(spring), integration_fraction=0.35),
        "ewc": Ewc(sft=spring.method, fisher_steps=2),
    }


@pytest.mark.parametrize("name", KILLED)
def test_a_run_killed_in_any_stage_ends_as_the_unbroken_one_and_the_same_run_again_changes_nothing(
    spring, name, tmp_path
):
    method, world = staged_methods(spring)[name], spring.world()
    unbroken, whole = spring.finish(method, world)
    total = method.total_steps(12, 3)
    assert whole.reporter.steps("train") == list(range(1, total + 1))
    assert whole.reporter.steps("eval")[0] == 0 and whole.reporter.steps("eval")[-1] == total
    reporter = spring.Heard()
    reporter.deaths = list(KILLED[name])
    deaths = 0
    while True:
        try:
            params, job = spring.finish(method, world, directory=tmp_path, save_every=2, reporter=reporter)
            break
        except spring.Killed:
            deaths += 1
    assert deaths == len(KILLED[name])
    finished = reporter.told()
    assert spring.bits(params) == spring.bits(unbroken)
    assert list(dict.fromkeys(finished)) == whole.reporter.told()  # a score may be told twice, nothing is missing
    np.testing.assert_array_equal(job.scores.matrix("nll").means, whole.scores.matrix("nll").means)
    assert (job.scores.columns, job.scores.learned) == (whole.scores.columns, whole.scores.learned)
    again, _ = spring.finish(method, world, directory=tmp_path, reporter=reporter)
    assert spring.bits(again) == spring.bits(params)
    assert reporter.told() == [*finished, finished[-1]]  # the last score, which `jaxlm.run` takes from its summary


def test_every_task_is_learnt_in_the_column_of_its_first_stage_and_general_tasks_in_none(spring):
    method = MultiStage(method=spring.method, order=(("c",), ("a",)))
    world = spring.world()
    _, job = spring.finish(method, world, rows={"a": 10, "c": 10})
    assert job.scores.columns == ("before", "stage-1", "after")
    assert job.scores.matrix("nll").learned_at == (2, None, 1)
    assert [job.seen[f"stage-{number}"] for number in (1, 2)] == [["c"], ["a"]]


def test_stages_of_unequal_length_share_one_compiled_step(spring):
    _, job = spring.finish(MultiStage(method=spring.method), spring.world(seed=5), rows={"a": 10, "b": 30, "c": 80})
    assert [job.ended[f"stage-{number}"][2] for number in (1, 2, 3)] == [1, 4, 12]
    assert job.reporter.compiles() == 1


def test_moments_and_schedule_begin_afresh_in_every_stage(spring):
    _, job = spring.finish(MultiStage(method=spring.method), spring.world())
    rates = [line["learning_rate"] for line in job.reporter.lines if line["kind"] == "train"]
    assert rates == pytest.approx(3 * [0.05, 0.0375, 0.025, 0.0125])
    counts = [
        int(leaf) for leaf in jax.tree.leaves(job.ended["stage-2"][1]) if leaf.dtype == np.int32 and not leaf.ndim
    ]
    assert set(counts) == {4}


def test_entries_held_at_random_differ_by_stage_and_by_the_runs_seed(spring):
    method = MultiStage(method=spring.method, hold_random=0.5)
    held = []
    for seed in (0, 1):
        _, job = spring.finish(method, spring.world(), seed=seed)
        held += [spring.flat(job.ended[f"stage-{number}"][1].held) for number in (1, 2, 3)]
    assert all(h.sum() == spring.size // 2 for h in held)
    assert len({h.tobytes() for h in held}) == 6
    with pytest.raises(ValueError, match="hold_random holds entries of the model's own parameters"):
        MultiStage(method=Sft(lora=Lora(rank=2)), hold_random=0.5)._tx(None, seed=0)


# A whole run, from its config to its directory.


def exercises(generator, train=True):
    source = Procedural(generator=generator, size=60) if train else None
    return Task(name=generator, train=source, test=Procedural(generator=generator, size=8, seed=1))


def config(directory, **changes):
    sft = Sft(optimizer=AdamW(learning_rate=3e-3))
    whole = RunConfig(
        model=ModelConfig(vocab_size=264, width=16, num_layers=2, num_heads=2, mlp_width=32),
        tokenizer="bytes",
        data=DataConfig(
            tasks=(exercises("copying", False), exercises("decrement"), exercises("rotation")),
            length=48,
        ),
        method=CpiFt(dpi=Dpi(sft=sft, probe_steps=2, fraction=0.1, groups="separate"), integration_fraction=0.4),
        run=RunOptions(steps=10, batch_size=8, log_every=1, save_every=2, evaluate_every=9, directory=str(directory)),
    )
    return dataclasses.replace(whole, **changes)


@pytest.fixture(scope="module")
def quick_runs():
    """Runs on one device that share a loss function, so their programs, without a peak, a folder and a page."""
    with pytest.MonkeyPatch.context() as patch:
        phase, losses = Sft.phase, {}

        def shared(self, model, **sizes):
            made = phase(self, model, **sizes)
            return made._replace(loss_fn=losses.setdefault((model.config, sizes["num_tasks"]), made.loss_fn))

        patch.setattr(Sft, "phase", shared)
        patch.setattr(jaxlm.run, "make_mesh", lambda options: make_mesh(options, devices=jax.devices()[:1]))
        for name in ("peak", "_export", "write_page"):
            patch.setattr(jaxlm.run, name, lambda *args, **options: None)
        yield


@pytest.fixture(scope="module")
def unbroken(quick_runs, tmp_path_factory, real_scores):
    directory = tmp_path_factory.mktemp("unbroken")
    return directory, run(config(directory))


@pytest.fixture(scope="module")
def real_scores(quick):
    """The scores of the conftest are of springs; here there are held-out records."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxlm.train.job, "score_items", jaxlm.train.held_out.score_items)
        yield


def reported(directory):
    times = ("time", "tokens_per_second", "memory_gib", "seconds", "mfu")
    lines = [{k: v for k, v in line.items() if k not in times} for line in read_metrics(directory)]
    lines = [json.dumps(line) for line in lines if line["kind"] != "event"]
    return list(dict.fromkeys(lines))  # a score may be told twice


def test_a_whole_run_killed_in_probe_stage_and_integration_equals_the_unbroken_one(unbroken, tmp_path):
    directory, result = unbroken
    with pytest.MonkeyPatch.context() as patch:
        deaths = [("train", 3), ("train", 8), ("evaluation", 10), ("train", 13)]

        def mortal(name):
            heard = getattr(RunReporter, name)

            @functools.wraps(heard)
            def say(self, step, metrics):
                if (name, step) in deaths:
                    deaths.remove((name, step))
                    raise KeyboardInterrupt
                heard(self, step, metrics)

            patch.setattr(RunReporter, name, say)

        mortal("train")
        mortal("evaluation")
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                run(config(tmp_path))
    broken = run(config(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, broken.params, result.params)
    assert (broken.before, broken.after) == (result.before, result.after)
    assert reported(tmp_path) == reported(directory)
    ours, theirs = (Scores.read(d) for d in (tmp_path, directory))
    for kind in ("nll", "accuracy"):
        np.testing.assert_array_equal(ours.matrix(kind).means, theirs.matrix(kind).means)


def test_general_tasks_are_scored_in_every_column_and_never_trained(unbroken):
    directory, _ = unbroken
    scores = Scores.read(directory)
    assert scores.columns[0] == "before" and scores.columns[-1] == "after" and "fused" in scores.columns
    matrix = scores.matrix("nll")
    assert matrix.tasks[0] == "copying" and matrix.learned_at[0] is None
    assert None not in matrix.learned_at[1:]
    assert matrix.means.shape == (3, len(scores.columns))
    assert not any("loss/copying" in line for line in read_metrics(directory) if line["kind"] == "train")


def test_a_staged_run_of_other_steps_is_refused(unbroken):
    longer = config(unbroken[0], run=dataclasses.replace(config(unbroken[0]).run, steps=12))
    with pytest.raises(ValueError, match=r"run\.steps was 10 and is now 12: CpiFt divides them among its stages"):
        run(longer)
