# SPDX-License-Identifier: Apache-2.0
"""Laws of the account of time: it adds up, to the second and over lives, and each delay stands under its own name."""

import io
import random
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.checkpoints.runs import RunCheckpoints
from jaxlm.losses.term import Term
from jaxlm.train import loop
from jaxlm.train.goodput import MEASURED, PARTS, Clock, add_lives
from jaxlm.train.goodput_page import SHOWN
from jaxlm.train.mesh import make_mesh
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.options import AdamW, MeshOptions, RunOptions
from jaxlm.train.page import write_page
from jaxlm.train.phase import Phase
from jaxlm.train.reporter import RunReporter, read_metrics

PAUSE = 0.15  # seconds of whatever is slow
LONG = 300  # products of a loop that takes longer than that
TX = make_optimizer(AdamW(), 100)


class Rows:
    """The same rows again and again; `before` is called with the number of each batch."""

    def __init__(self, before=lambda step: None, width=64):
        self.before, self.width, self.step = before, width, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        self.before(self.step)
        return {"x": np.ones((2, self.width), np.float32)}

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


def loss_fn(params, batch, rng):
    return {"loss": Term(jnp.sum(jnp.square(batch["x"] @ params["w"])), jnp.float32(len(batch["x"])))}


PHASE = Phase(loss_fn, TX)


def train(folder, rows=None, *, phase=PHASE, width=64, evaluate=None, **options):
    """A stage on one device, reported to a folder; what it has spent so far, in all lives."""
    options = RunOptions(**{"steps": 6, "batch_size": 2, "log_every": 1, "directory": str(folder)} | options)
    params = {"w": np.ones((width, 8), np.float32)}
    reporter = RunReporter(folder, options.steps, stream=io.StringIO())
    mesh = make_mesh(MeshOptions(), devices=jax.devices()[:1])
    axes = {"w": (None, None)}
    arguments = dict(options=options, mesh=mesh, axes=lambda _: axes, reporter=reporter, evaluate=evaluate)
    try:
        loop.train(phase, params, rows or Rows(), **arguments)
    finally:
        reporter.close()
    return add_lives(read_metrics(folder))


def records(folder):
    return [line for line in read_metrics(folder) if line.get("name") == "goodput"]


def test_the_parts_add_up_to_the_wall_time_whatever_comes():
    draw = random.Random(0)
    ticks = [0.0]
    clock = Clock(began=-5.0, now=lambda: ticks[0])
    for _ in range(500):
        ticks[0] += draw.random()
        getattr(clock, draw.choice(["at", "at", "was"]))(draw.choice(MEASURED))
    said = clock.record()
    assert said["wall"] == round(ticks[0] + 5, 3) == pytest.approx(sum(said["parts"].values()), abs=0.005)
    assert set(said["parts"]) == set(MEASURED) and min(said["parts"].values()) > 0


def test_every_report_of_a_real_run_adds_up(tmp_path):
    begin = time.perf_counter()
    found = train(tmp_path, save_every=2, evaluate_every=3, evaluate=lambda params: {"loss": 1.0})
    seconds = time.perf_counter() - begin
    said = records(tmp_path)
    assert [line["step"] for line in said] == [0, 1, 2, 3, 4, 5, 6, 6]
    for line in said:
        assert sum(line["parts"].values()) == pytest.approx(line["wall"], abs=0.01)
    assert 0.9 * seconds - 0.1 < found.wall <= seconds and found.lives == 1
    assert found.seconds["restore"] == found.seconds["repeated"] == 0 and found.seconds["init"] > 0


def test_a_slow_source_shows_as_data(tmp_path):
    slow = train(tmp_path, Rows(lambda step: time.sleep(PAUSE)), steps=4)
    assert 4 * PAUSE <= slow.seconds["data"] < 4 * PAUSE + 0.5
    assert slow.seconds["step"] < 4 * PAUSE


def test_a_slow_save_shows_as_save_and_a_slow_restore_as_restore(tmp_path, monkeypatch):
    for name in ("save", "restore"):
        real = getattr(RunCheckpoints, name)

        def slow(*args, real=real, **named):
            time.sleep(PAUSE)
            return real(*args, **named)

        monkeypatch.setattr(RunCheckpoints, name, slow)
    first = train(tmp_path, save_every=3)
    assert first.seconds["save"] >= 2 * PAUSE and first.seconds["restore"] == 0
    both = train(tmp_path, save_every=3, steps=7)
    assert both.seconds["restore"] >= PAUSE and both.seconds["save"] >= 3 * PAUSE


def test_a_slow_compilation_shows_as_compile_and_a_slow_evaluation_as_evaluate(tmp_path):
    def slow_to_trace(params, batch, rng):
        time.sleep(PAUSE)
        return loss_fn(params, batch, rng)

    def evaluate(params):
        time.sleep(PAUSE)
        return {"loss": 1.0}

    found = train(tmp_path, phase=Phase(slow_to_trace, TX), evaluate=evaluate, evaluate_every=2)
    assert found.seconds["compile"] >= PAUSE and found.seconds["evaluate"] >= 3 * PAUSE
    assert max(found.seconds["step"], found.seconds["data"]) < PAUSE


def long_loss(params, batch, rng):
    """Takes a good part of a second, without the host."""
    square = jnp.broadcast_to(batch["x"][:1, :1], (512, 512))
    tired = jax.lax.fori_loop(0, LONG, lambda _, x: jnp.tanh(x @ x), square)
    term = loss_fn(params, batch, rng)["loss"]
    return {"loss": Term(term.total + jnp.sum(tired), term.weight)}


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_a_batch_costs_something_only_if_it_comes_after_the_devices_are_done(tmp_path, monkeypatch, late):
    """With the host one update ahead, as on accelerators; a late source begins when the update before has ended."""
    opened, running = loop._Run.open, []

    def ahead(self, *args):
        opened(self, *args)
        self.ahead = 1
        running.append(self)

    def source(step):
        if late:
            jax.block_until_ready(running[0].state)
        time.sleep(PAUSE if late else PAUSE / 3)

    monkeypatch.setattr(loop._Run, "open", ahead)
    found = train(tmp_path, Rows(source), phase=Phase(long_loss, TX), steps=4, log_every=0)
    if late:
        assert found.seconds["data"] >= 4 * PAUSE
    else:
        assert PAUSE / 3 <= found.seconds["data"] < PAUSE, "the first batch always costs"


class Killed(BaseException):
    """As sudden as a test can be."""


def killed_at(step):
    def before(now):
        time.sleep(0.01)
        if now == step:
            raise Killed

    return before


def test_a_resumed_run_adds_up_and_what_was_lost_is_repeated(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "account", last_words(4))  # a kill leaves no time for them
        with pytest.raises(Killed):
            train(tmp_path, Rows(killed_at(6)), save_every=3, steps=8)
    first = records(tmp_path)
    assert [line["step"] for line in first] == [0, 1, 2, 3, 4], "the run stands at 3, and has said that it did 4"
    found = train(tmp_path, save_every=3, steps=8)
    said = records(tmp_path)
    assert said[: len(first)] == first, "what was spent stays, though step 4 is forgotten"
    assert [line["step"] for line in read_metrics(tmp_path) if line["kind"] == "train"] == list(range(1, 9))
    assert (found.lives, found.repeated) == (2, 1)
    parts = [line["parts"] for line in first]
    assert found.seconds["repeated"] == pytest.approx(parts[4]["step"] - parts[3]["step"])
    walls = first[-1]["wall"] + said[-1]["wall"]
    assert found.wall == pytest.approx(walls, abs=0.02) and found.seconds["step"] > 0
    assert "(2 starts)" in str(found)


def last_words(step):
    """`account`, but mute after a step."""
    real = loop._Run.account
    return lambda self: real(self) if self.step <= step else None


def test_lives_that_fall_back_further_and_further_are_counted_once():
    """20 updates; 16 done and 12 saved; from there to 18, but only 4 can be read; from there to the end."""
    events, lives = [], [(0, 16), (12, 18), (4, 20)]
    for life, (begin, end) in enumerate(lives):
        for step in range(begin, end + 1, 2):
            parts = dict.fromkeys(MEASURED, 0.0) | {"step": 1.0 * (step - begin), "init": 2.0}
            events.append({"name": "goodput", "life": float(life), "step": step, "parts": parts})
    found = add_lives([{"name": "start"}, *events])
    assert (found.seconds["step"], found.seconds["repeated"], found.seconds["init"]) == (20.0, 18.0, 6.0)
    assert (found.repeated, found.lives, found.wall) == (18, 3, 44.0)
    assert add_lives([{"name": "start"}]) is None


def test_a_run_that_ends_by_an_error_has_said_what_it_spent(tmp_path):
    with pytest.raises(ValueError, match="no such record"):
        train(tmp_path, Rows(lambda step: refuse() if step == 4 else None), log_every=0)
    last = records(tmp_path)[-1]
    assert last["step"] == 3 and last["parts"]["step"] > 0


def refuse():
    raise ValueError("no such record")


def test_without_a_watchdog_the_time_is_taken_all_the_same(tmp_path):
    found = train(tmp_path, Rows(lambda step: time.sleep(0.02)), step_timeout=0.0, steps=3)
    assert found.seconds["data"] >= 0.06 and found.seconds["step"] > 0


def test_the_report_page_shows_the_parts_their_sum_and_what_was_lost(tmp_path):
    events = [
        {"life": 1.0, "step": 0, "parts": {"step": 0.0, "init": 10.0}},
        {"life": 1.0, "step": 6, "parts": {"step": 60.0, "init": 10.0}},
        {"life": 2.0, "step": 4, "parts": {"step": 0.0, "init": 5.0}},
        {"life": 2.0, "step": 10, "parts": {"step": 60.0, "init": 5.0}},
    ]
    for name in ("a&b", "short"):
        reporter = RunReporter(tmp_path / name, 10, stream=io.StringIO())
        for event in events:
            parts = dict.fromkeys(MEASURED, 0.0) | event["parts"]
            if name == "a&b" or event["life"] == 1.0:
                reporter.event("goodput", **event | {"parts": parts})
        reporter.train(10, {"loss": 1.0})
        reporter.close()
    text = write_page([tmp_path / "a&b", tmp_path / "short"], tmp_path / "report.html").read_text()
    section = text.partition("<h2>Where the time went</h2>")[2].partition("</section>")[0]
    shown = ("a&amp;b: goodput 44.4 %", "<td>60.0 s</td><td>44.4 %</td>", "<td>15.0 s</td><td>11.1 %</td>", "135.0 s")
    assert [cell for cell in shown if cell not in section] == []
    assert "2 starts, 2 updates done again" in section and "evaluate" not in section
    assert "short: goodput 85.7 %" in section
    bar = section.partition('aria-label="short')[2].partition("</svg>")[0]
    parts = [tuple(map(float, found)) for found in re.findall(r'x="([\d.]+)" y="0" width="([\d.]+)"', bar)]
    assert [begin for begin, _ in parts] == [0.0, 925.71] and [round(width) for _, width in parts] == [926, 154]
    assert "goodput 44 %" in text and "<td>goodput</td>" not in text, "among the facts, not among the events"
    assert set(SHOWN) == set(PARTS) == {"repeated", *MEASURED}
