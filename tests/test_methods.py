# SPDX-License-Identifier: Apache-2.0
"""The five laws that every method obeys, by the table METHODS: to be in it is to be tested.

A method is tested as its `tiny()` makes it, where it has one (numbers that move a tiny model within 20 updates), else
with its defaults, on batches of text as its `tiny_batch` makes them its own, where it has one.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.methods import METHODS
from jaxlm.nn.axes import logical_axes
from jaxlm.nn.config import Lora, ModelConfig
from jaxlm.nn.decoder import Model
from jaxlm.train.loop import train
from jaxlm.train.mesh import constrainer, make_mesh
from jaxlm.train.options import MeshOptions, RunOptions

CONFIG = ModelConfig(vocab_size=64, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=32, tied=False)
STEPS = 6
COMPILED: list[float] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(seconds) if event.endswith("backend_compile_duration") else None
)


class Rows:
    """Batches of the next token of a counting rhyme; `fixed` gives one batch for ever."""

    def __init__(self, fixed=False):
        self.step, self.fixed, self.seen, self.change = 0, fixed, [], lambda batch: batch

    def __iter__(self):
        return self

    def __next__(self):
        self.step += 1
        self.seen.append(len(COMPILED))
        draw = np.random.default_rng(0 if self.fixed else self.step)
        shape = rows, length = (16, 16)
        lengths = draw.integers(4, length + 1, (rows, 1))
        inside = np.arange(length)[None, :] < lengths
        batch = {
            "tokens": ((draw.integers(0, 64, (rows, 1)) + 3 * np.arange(length)) % 64).astype(np.int32),
            "loss_weights": (inside & (np.arange(length) > 1)[None, :]).astype(np.float32),
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy(),
            "segment_ids": inside.astype(np.int32),
            "task_ids": np.repeat(draw.integers(0, 2, (rows, 1)).astype(np.int32), length, axis=1),
            "record_ids": np.where(inside, 0, -1).astype(np.int32),
        }
        return self.change(batch)

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


class Losses:
    """A reporter that keeps the objective of every update."""

    def __init__(self):
        self.objectives = []

    def train(self, step, metrics):
        self.objectives.append(metrics["objective"])

    def evaluation(self, step, metrics): ...
    def event(self, name, **fields): ...
    def rewind(self, step): ...
    def close(self): ...


def methods():
    """Every method of the table, and variants that take another way through it."""
    for name, kind in sorted(METHODS.items()):
        method = getattr(kind, "tiny", kind)()
        yield pytest.param(method, id=name)
        if any(field.name == "lora" for field in dataclasses.fields(method)):
            yield pytest.param(dataclasses.replace(method, lora=Lora(rank=2)), id=f"{name}-lora")


@functools.cache
def place(axes):
    """A mesh and a model on it, the same for all methods: those with one update function share their programs."""
    devices = jax.devices()[: int(np.prod(axes))]
    mesh = make_mesh(MeshOptions(data=axes[0], fsdp=axes[1], tensor=axes[2]), devices=devices)
    return mesh, Model(CONFIG, constrain=constrainer(mesh))


@functools.cache
def weights():
    return jax.jit(Model(CONFIG).init)(jax.random.key(0))


@pytest.fixture(scope="module", params=methods())
def start(request):
    """(devices) -> a function that trains this method there, and once for all tests what it does unless told."""
    jax.config.update("jax_disable_most_optimizations", True)
    method = request.param

    @functools.cache
    def on(axes=(1, 1, 1)):
        mesh, model = place(axes)
        phase = method.phase(method.model(model), num_tasks=2, steps=STEPS)

        def run(rows=None, **options):
            reporter, rows = Losses(), rows or Rows()
            rows.change = getattr(method, "tiny_batch", rows.change)
            options = RunOptions(**({"steps": STEPS, "batch_size": 16, "log_every": 1} | options))
            state = train(phase, weights(), rows, options=options, mesh=mesh, reporter=reporter)
            return types.SimpleNamespace(state=state, objectives=reporter.objectives, seen=rows.seen)

        run.whole = functools.cache(run)
        return run

    yield on
    jax.config.update("jax_disable_most_optimizations", False)


def bits(tree):
    raw = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(raw)]


def test_lowers_the_loss_on_one_batch(start):
    objectives = start()(Rows(fixed=True), steps=20).objectives
    assert objectives[-1] < objectives[0]


def test_compiles_once(start):
    seen = start().whole().seen
    assert len(seen) == STEPS and seen[-1] == seen[1]


def test_the_state_keeps_shapes_dtypes_and_shardings(start):
    before, after = start((2, 2, 2))(steps=1).state, start((2, 2, 2)).whole().state
    described = [[(x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(state)] for state in (before, after)]
    assert described[0] == described[1]
    assert all(jnp.issubdtype(x.dtype, jnp.float32) for x in jax.tree.leaves(after.params))
    assert jax.tree.structure(logical_axes(after.params), is_leaf=lambda x: isinstance(x, tuple)) == jax.tree.structure(
        after.params
    )


def test_resuming_equals_not_stopping(start, tmp_path):
    start()(directory=str(tmp_path), steps=STEPS // 2)
    assert bits(start()(directory=str(tmp_path)).state) == bits(start().whole().state)


def test_eight_devices_equal_one(start):
    """Before rounding has had the time to grow through the optimizer's quotient of moments."""
    one, eight = start().whole().objectives, start((2, 2, 2)).whole().objectives
    np.testing.assert_allclose(eight, one, rtol=2e-5)
