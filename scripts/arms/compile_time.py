# SPDX-License-Identifier: Apache-2.0
"""How long tracing and compiling one training step takes as the model gets deeper."""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from arms.ours import model_config
from arms.shapes import Shape
from jaxlm.methods.sft import Sft
from jaxlm.nn.axes import logical_axes
from jaxlm.nn.decoder import Model
from jaxlm.train.mesh import make_mesh, shardings
from jaxlm.train.options import MeshOptions
from jaxlm.train.state import make_state, state_shardings
from jaxlm.train.step import make_train_step


def seconds_of(shape: Shape, num_layers: int) -> float:
    """Trace and compile the SFT step of `shape` with that many layers, caches emptied; nothing is run."""
    model = Model(dataclasses.replace(model_config(shape), num_layers=num_layers))
    phase = Sft().phase(model, num_tasks=1, steps=1000)
    mesh = make_mesh(MeshOptions(), devices=jax.devices()[:1])
    like = jax.eval_shape(model.init, jax.random.key(0))
    places = state_shardings(phase.tx, like, shardings(mesh, logical_axes(like), like), mesh)
    state = jax.eval_shape(lambda: make_state(model.init(jax.random.key(0)), phase.tx, jax.random.key(0)))
    names = ("tokens", "positions", "segment_ids", "task_ids", "loss_weights")
    batch = {name: jax.ShapeDtypeStruct((shape.B, shape.T), jnp.int32) for name in names[:4]}
    batch[names[4]] = jax.ShapeDtypeStruct((shape.B, shape.T), jnp.float32)
    jax.clear_caches()
    begin = time.perf_counter()
    step: Any = make_train_step(phase, mesh=mesh, shardings=places)
    step.lower(state, batch).compile()
    return time.perf_counter() - begin


def table(name: str, shape: Shape, *, depths: tuple[int, ...] = (4, 8, 16, 32), repeats: int = 5) -> str:
    """Median and range of the seconds at each depth, turn by turn, and the ratio to the first depth."""
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    seconds_of(shape, depths[0])  # the first compilation of a process loads the compiler
    for _ in range(repeats):
        for depth in depths:
            seconds[depth].append(seconds_of(shape, depth))
    lines = [f"| {name}: layers | seconds | range | ratio |", "|---|---|---|---|"]
    first = statistics.median(seconds[depths[0]])
    for depth, values in seconds.items():
        median = statistics.median(values)
        lines.append(f"| {depth} | {median:.2f} | {min(values):.2f}-{max(values):.2f} | {median / first:.2f} |")
    return "\n".join(lines)
