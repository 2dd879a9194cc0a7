# SPDX-License-Identifier: Apache-2.0
"""jaxlm's own step: the SFT phase through `make_train_step`, with all its metrics, on one device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arms import shapes
from arms.shapes import Shape
from jaxlm.methods.sft import Sft
from jaxlm.nn.axes import logical_axes
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import Model
from jaxlm.nn.position_kinds import Rope
from jaxlm.train.mesh import make_mesh, shardings
from jaxlm.train.options import AdamW, MeshOptions
from jaxlm.train.state import make_state, state_shardings
from jaxlm.train.step import make_train_step


def model_config(shape: Shape) -> ModelConfig:
    """The shape as a configuration."""
    return ModelConfig(
        vocab_size=shape.V,
        width=shape.D,
        num_layers=shape.L,
        num_heads=shape.N,
        num_kv_heads=shape.K,
        head_width=shape.H,
        mlp_width=shape.F,
        positions=Rope(base=shapes.ROPE_BASE),
        norm_epsilon=shapes.NORM_EPSILON,
        tied=False,
        dtype=shape.dtype,  # type: ignore[arg-type]
    )


def build(shape: Shape):
    """(logits of tokens, one update and its loss)."""
    model, state, compiled = prepared(shape)
    states = [state]

    def step(tokens):
        states[0], metrics = jax.block_until_ready(compiled(states[0], batch_of(shape, tokens)))
        return float(metrics["loss"])

    probe = jax.jit(lambda params, tokens: model.logits(params, model.apply(params, tokens)))
    return lambda tokens: probe(states[0].params, tokens), step


def prepared(shape: Shape, wrap: Callable[[Any], Any] = lambda tx: tx):
    """(model, state, jitted step) of SFT with AdamW, and that optimizer wrapped."""
    model = Model(model_config(shape))
    optimizer = AdamW(
        learning_rate=shapes.LEARNING_RATE,
        schedule="constant",
        warmup=0.0,
        b1=shapes.B1,
        b2=shapes.B2,
        epsilon=shapes.EPSILON,
        weight_decay=shapes.DECAY,
        decayed=(r".*",),
        clip_norm=None,
    )
    phase = Sft(optimizer=optimizer).phase(model, num_tasks=1, steps=1000)
    phase = phase._replace(tx=wrap(phase.tx))
    mesh = make_mesh(MeshOptions(), devices=jax.devices()[:1])
    like = jax.eval_shape(model.init, jax.random.key(0))
    placed = shardings(mesh, logical_axes(like), like)
    places = state_shardings(phase.tx, like, placed, mesh)
    born = functools.partial(make_state, tx=phase.tx, rng=jax.random.key(0))
    make = jax.jit(born, out_shardings=places, donate_argnums=0)
    state = make(jax.tree.map(jnp.array, shapes.weights(shape)))
    return model, state, make_train_step(phase, mesh=mesh, shardings=places)


def batch_of(shape: Shape, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Rows that are one segment each, every token trained on."""
    ones = np.ones_like(tokens)
    return {
        "tokens": tokens,
        "loss_weights": ones.astype(np.float32),
        "positions": np.broadcast_to(np.arange(shape.T, dtype=np.int32), tokens.shape),
        "segment_ids": ones,
        "task_ids": np.zeros_like(tokens),
    }
