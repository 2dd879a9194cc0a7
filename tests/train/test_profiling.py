# SPDX-License-Identifier: Apache-2.0
"""Laws of a trace: it holds the updates asked for and no others, is there whatever happens, and changes nothing."""

import dataclasses
import gzip
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import RunConfig
from jaxlm.data import DataConfig, Procedural, Task
from jaxlm.losses.term import Term
from jaxlm.methods import Sft
from jaxlm.nn import ModelConfig
from jaxlm.run import run
from jaxlm.train import loop
from jaxlm.train.mesh import make_mesh
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.options import AdamW, MeshOptions, RunOptions
from jaxlm.train.phase import Phase
from jaxlm.train.profiling import read_window
from jaxlm.train.reporter import RunReporter, read_metrics


def loss_fn(params, batch, rng):
    return {"loss": Term(jnp.sum(jnp.square(jnp.tanh(batch["x"] @ params["w"]))), jnp.float32(len(batch["x"])))}


PHASE = Phase(loss_fn, make_optimizer(AdamW(), 100))


class Rows:
    """Batch i is drawn from i; `bad` is refused."""

    def __init__(self, bad=0):
        self.bad, self.step = bad, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        if self.step == self.bad:
            raise ValueError("no such record")
        return {"x": np.random.default_rng(self.step).normal(size=(2, 16)).astype(np.float32)}

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


def go(folder, *, bad=0, phase=PHASE, **options):
    """A stage on one device; its state."""
    named = {name: options.pop(name) for name in ("steps", "stage", "first_step") if name in options}
    whole = {"steps": 8, "batch_size": 2, "log_every": 3, "save_every": 4, "directory": str(folder)}
    whole = RunOptions(**whole | options)
    reporter = RunReporter(folder, whole.steps, stream=io.StringIO())
    mesh = make_mesh(MeshOptions(), devices=jax.devices()[:1])
    params = {"w": np.ones((16, 4), np.float32)}
    axes = {"w": (None, None)}
    try:
        return loop.train(
            phase, params, Rows(bad), options=whole, mesh=mesh, axes=lambda _: axes, reporter=reporter, **named
        )
    finally:
        reporter.close()


def events(folder, name="profile"):
    return [line for line in read_metrics(folder) if line.get("name") == name]


def traced(folder, event):
    """The updates in a trace and its spans, as the file for Perfetto tells them; jax's own lies beside it."""
    path = folder / event["path"]
    assert path.stat().st_size == event["bytes"] > 0
    assert b"update" in path.read_bytes()
    with gzip.open(path.with_name(path.name.replace(".xplane.pb", ".trace.json.gz"))) as file:
        spans = json.load(file)["traceEvents"]
    steps = sorted(int(span["args"]["step_num"]) for span in spans if span.get("name") == "update")
    return steps, spans


def test_the_trace_holds_exactly_the_updates_asked_for_and_changes_no_bit(tmp_path):
    plain = go(tmp_path / "plain")
    state = go(tmp_path / "traced", profile="3:6")
    (event,) = events(tmp_path / "traced")
    assert (event["updates"], event["step"]) == ("3:6", 5) and event["seconds"] > 0
    steps, spans = traced(tmp_path / "traced", event)
    assert steps == [3, 4, 5]
    assert sum("ExecuteHelper" in span.get("name", "") for span in spans) == 3, "programs that ran"
    jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)
    assert not events(tmp_path / "plain") and not (tmp_path / "plain" / "profile").exists()


def long_loss(params, batch, rng):
    """Takes a good part of a second, without the host."""
    square = jnp.broadcast_to(batch["x"][:1, :1], (512, 512))
    tired = jax.lax.fori_loop(0, 100, lambda _, x: jnp.tanh(x @ x), square)
    term = loss_fn(params, batch, rng)["loss"]
    return {"loss": Term(term.total + jnp.sum(tired), term.weight)}


def test_the_devices_are_done_with_all_before_when_it_begins_and_with_the_last_when_it_ends(tmp_path, monkeypatch):
    """With the host one update ahead, as on accelerators."""
    opened, running, seen = loop._Run.open, [], []

    def ahead(self, *args):
        opened(self, *args)
        self.ahead = 1
        running.append(self)

    def telling(real):
        def told(*args):
            seen.append((running[0].step, running[0].state.step.is_ready()))
            real(*args)

        return told

    monkeypatch.setattr(loop._Run, "open", ahead)
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, telling(getattr(jax.profiler, name)))
    go(tmp_path, phase=PHASE._replace(loss_fn=long_loss), profile="3:5", steps=5, log_every=0, save_every=0)
    assert seen == [(2, True), (4, True)]


def test_an_error_in_between_leaves_a_whole_trace_of_what_there_was(tmp_path):
    with pytest.raises(ValueError, match="no such record"):
        go(tmp_path, profile="3:7", bad=6)
    (event,) = events(tmp_path)
    assert (event["updates"], event["step"]) == ("3:6", 5)
    steps, _ = traced(tmp_path, event)
    assert steps[:3] == [3, 4, 5]
    go(tmp_path / "next", profile="1:2", steps=1)
    assert len(events(tmp_path / "next")) == 1, "the profiler was free again"


def test_a_run_resumed_in_the_middle_traces_the_rest_and_one_resumed_behind_says_so(tmp_path, capsys):
    with pytest.raises(ValueError, match="no such record"):
        go(tmp_path / "a", bad=6)
    go(tmp_path / "a", profile="3:7")  # it stands at 4
    (event,) = events(tmp_path / "a")
    assert event["updates"] == "5:7" and traced(tmp_path / "a", event)[0] == [5, 6]
    go(tmp_path / "b", steps=4)
    capsys.readouterr()
    go(tmp_path / "b", profile="2:4")
    assert "run.profile=2:4 lies before step 4, where this run goes on: nothing is traced" in capsys.readouterr().err
    assert not events(tmp_path / "b")
    go(tmp_path / "a", profile="3:7", steps=9, stage="train")
    assert "lies before" not in capsys.readouterr().err, "its trace is there"


def test_a_window_over_two_stages_is_two_traces(tmp_path):
    go(tmp_path, profile="3:6", steps=4, stage="one")
    go(tmp_path, profile="3:6", steps=4, stage="two", first_step=4)
    assert [event["updates"] for event in events(tmp_path)] == ["3:5", "5:6"]
    assert [traced(tmp_path, event)[0] for event in events(tmp_path)] == [[3, 4], [5]]


def test_a_trace_that_cannot_be_taken_is_told_and_does_not_end_the_run(tmp_path, capsys):
    jax.profiler.start_trace(tmp_path / "own")
    try:
        go(tmp_path / "run", profile="3:5")
    finally:
        jax.profiler.stop_trace()
    (event,) = events(tmp_path / "run")
    assert "already been started" in event["error"] and "path" not in event
    assert "warning: the trace of updates 3:5 was not written: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("5", "such as 20:23, got '5'"),
        ("a:b", "such as 20:23, got 'a:b'"),
        ("-1:4", "such as 20:23, got '-1:4'"),
        ("0:4", "run.profile=0:4 begins with update 0: the first one is 1"),
        ("7:7", "run.profile=7:7 holds no update: .*; 7:8 is update 7 alone"),
        ("9:3", "run.profile=9:3 holds no update"),
        ("9:12", "ends with update 11, the run with update 10: choose b of at most 11, or more run.steps"),
    ],
)
def test_what_could_not_be_traced_is_refused_with_value_and_remedy(profile, message):
    with pytest.raises(ValueError, match=message):
        read_window(profile, directory="run", last=10)
    with pytest.raises(ValueError, match=r"run\.profile=9:11 needs a place for the trace: set run\.directory"):
        read_window("9:11", directory="", last=10)


def test_a_bad_window_is_refused_before_anything_is_made(tmp_path):
    exercise = Procedural(generator="counting", size=20, options={"length": 3})
    config = RunConfig(
        model=ModelConfig(vocab_size=264, width=16, num_layers=1, num_heads=2, mlp_width=16),
        tokenizer="bytes",
        data=DataConfig(tasks=(Task(name="counting", train=exercise, test=exercise),), length=48),
        method=Sft(),
        run=RunOptions(steps=2, batch_size=8, directory=str(tmp_path / "run"), profile="2:4"),
    )
    with pytest.raises(ValueError, match=r"run\.profile=2:4 ends with update 3, the run with update 2"):
        run(config)
    with pytest.raises(ValueError, match="needs a place for the trace"):
        run(dataclasses.replace(config, run=dataclasses.replace(config.run, directory="", profile="1:2")))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="ends with update 9, the run with update 8"):
        go(tmp_path / "run", profile="2:10")
    assert not (tmp_path / "run" / "checkpoints").exists()
