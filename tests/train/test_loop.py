# SPDX-License-Identifier: Apache-2.0
"""The loop: it resumes to the bit, compiles once, stops politely and refuses what would spoil a run."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.train.loop import train
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.options import AdamW, RunOptions
from jaxlm.train.stop import Preempted

TX = make_optimizer(AdamW(learning_rate=1e-2, weight_decay=0.1), 6)
OPTIONS = RunOptions(steps=6, batch_size=16, micro_batches=2, log_every=2, save_every=2, evaluate_every=3)


class Heard:
    """A reporter that remembers."""

    def __init__(self):
        self.lines = []

    def train(self, step, metrics):
        self.lines.append(("train", step, dict(metrics)))

    def evaluation(self, step, metrics):
        self.lines.append(("eval", step, dict(metrics)))

    def event(self, name, **fields):
        self.lines.append((name, fields.get("step"), fields))

    def rewind(self, step):
        self.lines = [line for line in self.lines if line[1] <= step]

    def close(self):
        pass

    def steps(self, kind):
        return [step for name, step, _ in self.lines if name == kind]


@pytest.fixture(scope="module")
def phase(tiny):
    """Noise in the loss, so that a key that differs would show; one object, so that it is compiled once."""
    return tiny.phase(TX, noise=0.1)


@pytest.fixture(scope="module")
def unbroken(tiny, phase, params):
    """Six updates in one go, without a directory."""
    return train(phase, params, tiny.Rows(), options=OPTIONS, mesh=tiny.mesh())


def run(tiny, phase, start, folder, *, rows=None, mesh=None, **named):
    options = {name: named.pop(name) for name in list(named) if name in RunOptions.__dataclass_fields__}
    options = dataclasses.replace(OPTIONS, directory=str(folder), **options)
    return train(phase, start, rows or tiny.Rows(), options=options, mesh=mesh or tiny.mesh(), **named)


def interrupted(step, how):
    """A stream's `vary` that does `how` while batch `step` is taken."""

    def vary(now, batch):
        if now == step:
            how()
        return batch

    return vary


def test_a_resumed_run_is_the_unbroken_one_to_the_bit(tiny, phase, params, unbroken, tmp_path):
    run(tiny, phase, params, tmp_path, steps=3)
    reporter = Heard()
    resumed = run(tiny, phase, params, tmp_path, steps=6, reporter=reporter)
    assert reporter.steps("restore") == [3] and reporter.steps("train") == [4, 6]
    assert tiny.bits(resumed) == tiny.bits(unbroken)
    (stage,) = [fields for kind, _, fields in reporter.lines if kind == "stage"]
    assert stage["tokens"] == sum((tiny.make_batch(i)["segment_ids"] > 0).sum() for i in range(1, 7))


def test_a_finished_stage_is_returned_at_once(tiny, phase, params, unbroken, tmp_path):
    run(tiny, phase, params, tmp_path)

    def never(step, batch):
        raise AssertionError("a finished stage took a batch")

    again = run(tiny, phase, params, tmp_path, rows=tiny.Rows(vary=never))
    assert tiny.bits(again) == tiny.bits(unbroken)


def test_a_stage_that_starts_from_a_state_goes_on_with_its_moments(tiny, phase, params, unbroken, tmp_path):
    first = run(tiny, phase, params, tmp_path, steps=2, stage="train")
    stream = tiny.Rows()
    stream.set_state({"step": 2})
    second = run(tiny, phase, first, tmp_path, rows=stream, steps=4, stage="more")
    assert tiny.bits(second) == tiny.bits(unbroken)
    assert not any(x.is_deleted() for x in jax.tree.leaves(first))


def test_a_state_of_another_optimizer_is_refused(tiny, phase, params):
    other = tiny.phase(optax.sgd(0.1, momentum=0.9))
    state = train(other, params, tiny.Rows(), options=dataclasses.replace(OPTIONS, steps=0), mesh=tiny.mesh())
    with pytest.raises(ValueError, match=r"another optimizer.*fresh moments"):
        train(phase, state, tiny.Rows(), options=OPTIONS, mesh=tiny.mesh())


def test_what_is_handed_in_stays_valid(tiny, phase, params, unbroken):
    before = tiny.bits(params)
    on_mesh = jax.device_put(params, jax.tree.map(lambda x: x.sharding, unbroken.params))
    train(phase, on_mesh, tiny.Rows(), options=dataclasses.replace(OPTIONS, steps=1), mesh=tiny.mesh())
    assert tiny.bits(on_mesh) == before == tiny.bits(params)


def test_nothing_is_compiled_after_the_first_update(tiny, phase, params, unbroken, tmp_path):
    """Through accumulation, evaluation, saves, and a resume whose first update shares the program of the run before."""
    evaluate = jax.jit(lambda p: jnp.mean(p["embed"]["table"]))
    counts = []

    def told(step, batch):
        counts.append(len(tiny.compiled))
        return batch

    evaluate(unbroken.params)
    arguments = dict(evaluate=lambda p: {"loss": float(evaluate(p))}, reporter=Heard())
    run(tiny, phase, params, tmp_path, rows=tiny.Rows(vary=told), steps=5, **arguments)
    assert len(counts) == 5 and counts[-1] == counts[1]
    counts.clear()
    run(tiny, phase, params, tmp_path, rows=tiny.Rows(vary=told), steps=8, **arguments)
    assert len(counts) == 3 and counts[-1] == counts[0]
    assert len(tiny.compiled) == counts[-1]


def test_the_reporter_hears_the_run_in_order(tiny, phase, params, tmp_path):
    reporter = Heard()
    names = tiny.Rows.task_names
    run(tiny, phase, params, tmp_path, reporter=reporter, evaluate=lambda p: {"loss": 1.0}, task_names=names)
    assert reporter.steps("eval") == [3, 6] and reporter.steps("train") == [2, 4, 6] == reporter.steps("save")
    line = next(fields for kind, _, fields in reversed(reporter.lines) if kind == "train")
    assert {"loss", "loss/short", "loss/long", "accuracy", "update_norm", "gradient_norm", "tokens"} <= set(line)
    assert line["learning_rate"] == pytest.approx(float(optax.tree.get(TX.init(params), "learning_rate", 0)), abs=1e-2)
    assert line["tokens_per_second"] > 0


def test_sigterm_saves_and_the_same_call_goes_on(tiny, phase, params, unbroken, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    stop = interrupted(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match=r"after step 3 of 6: saved in") as caught:
        run(tiny, phase, params, tmp_path, rows=tiny.Rows(vary=stop), save_every=0)
    assert caught.value.exit_code == 75 and signal.getsignal(signal.SIGTERM) is before
    assert tiny.bits(run(tiny, phase, params, tmp_path)) == tiny.bits(unbroken)


def spoilt(step, name, value):
    """A stream's `vary` that spoils one batch."""
    return lambda now, batch: batch | {name: np.full_like(batch[name], value)} if now == step else batch


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_records(tiny, phase, params, unbroken, tmp_path):
    rows = tiny.Rows(vary=spoilt(5, "loss_weights", np.inf))
    with pytest.raises(ValueError, match=r"step 5 is not finite .*loss nan.*file0:500, .* and 24 more") as caught:
        run(tiny, phase, params, tmp_path, rows=rows, describe=lambda task, record: f"file0:{record}")
    assert "last good checkpoint stays" in str(caught.value)
    assert sorted(os.listdir(tmp_path / "checkpoints" / "train")) == ["2", "4"]
    assert tiny.bits(run(tiny, phase, params, tmp_path)) == tiny.bits(unbroken)


def test_a_batch_without_a_trainable_token_is_refused_by_name(tiny, phase, params, tmp_path):
    rows = tiny.Rows(vary=spoilt(1, "loss_weights", 0))
    with pytest.raises(ValueError, match=r"step 1 has no trainable token.*task \d record 1\d\d"):
        run(tiny, phase, params, tmp_path, rows=rows)
    assert not (tmp_path / "checkpoints" / "train").exists()


def test_the_best_checkpoint_stays(tiny, phase, params, tmp_path):
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    run(
        tiny, phase, params, tmp_path,
        evaluate=lambda p: {"loss": next(losses)}, evaluate_every=1, save_every=1, keep_last=1, keep_best="loss",
    )  # fmt: skip
    kept = {
        int(folder): json.loads((tmp_path / "checkpoints/train" / folder / "checkpoint.json").read_text())
        for folder in os.listdir(tmp_path / "checkpoints/train")
    }
    assert {step: record["metrics"]["loss"] for step, record in kept.items()} == {2: 1.0, 6: 6.0}
    with pytest.raises(ValueError, match=r"keep_best 'los' is none of the held-out metrics \['loss'\]"):
        run(tiny, phase, params, tmp_path / "b", evaluate=lambda p: {"loss": 1.0}, keep_best="los")
    with pytest.raises(ValueError, match=r"keep_best 'loss' needs held-out metrics"):
        run(tiny, phase, params, tmp_path / "c", keep_best="loss", evaluate_every=0)


def test_sizes_that_do_not_fit_are_refused(tiny, phase, params, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size 12 .* multiple of 16: 8 devices .* 2 micro_batches.*16 and 16"):
        run(tiny, phase, params, tmp_path, batch_size=12, mesh=tiny.mesh(8))
    with pytest.raises(ValueError, match=r"batch\['tokens'\] has 16 rows, expected 32"):
        run(tiny, phase, params, tmp_path, batch_size=32)
    with pytest.raises(ValueError, match=r"no get_state and set_state"):
        run(tiny, phase, params, tmp_path, rows=iter([tiny.make_batch(1)]))
    with pytest.raises(ValueError, match=r"batches ended after step 1, 6 were asked for"):
        train(phase, params, iter([tiny.make_batch(1)]), options=OPTIONS, mesh=tiny.mesh())
