# SPDX-License-Identifier: Apache-2.0
"""The step one writes by hand in an hour: layer scan, [B, T, D] activations, whole logits, optax.adamw, one jit.

Letters as in `shapes.py`.
"""

import jax
import jax.numpy as jnp
import optax

from arms import shapes
from arms.shapes import Shape


def norm(p, x):
    """RMS norm in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + shapes.NORM_EPSILON)
    return (wide * p["scale"]).astype(x.dtype)


def rotate(x_BTNH):
    """Rotary positions 0 .. T-1, halves against each other."""
    T, H = x_BTNH.shape[1], x_BTNH.shape[3]
    angles = jnp.arange(T)[:, None] * shapes.ROPE_BASE ** (-jnp.arange(0, H, 2) / H)
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    low, high = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x_BTNH.dtype)


def logits(params, tokens, shape: Shape):
    """[B, T] to [B, T, V] float32."""
    B, T = tokens.shape
    dtype = jnp.dtype(shape.dtype)
    past = jnp.tril(jnp.ones((T, T), bool))

    def layer(x, p):
        w = jax.tree.map(lambda leaf: leaf.astype(dtype), p)
        y = norm(p["attention_norm"], x)
        q, k, v = (
            (y @ w["attention"][name]["kernel"]).reshape(B, T, heads, shape.H)
            for name, heads in (("query", shape.N), ("key", shape.K), ("value", shape.K))
        )
        q, k = rotate(q), rotate(k)
        k, v = (jnp.repeat(each, shape.N // shape.K, axis=2) for each in (k, v))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k).astype(jnp.float32) * shape.H**-0.5
        shares = jax.nn.softmax(jnp.where(past, scores, -1e30), axis=-1).astype(dtype)
        x = x + jnp.einsum("BNTS,BSNH->BTNH", shares, v).reshape(B, T, -1) @ w["attention"]["out"]["kernel"]
        y = norm(p["mlp_norm"], x)
        inner = jax.nn.silu(y @ w["mlp"]["gate"]["kernel"]) * (y @ w["mlp"]["up"]["kernel"])
        return x + inner @ w["mlp"]["down"]["kernel"], None

    x, _ = jax.lax.scan(layer, params["embed"]["table"][tokens].astype(dtype), params["blocks"])
    head = params["head"]["kernel"].astype(dtype)
    return jnp.matmul(norm(params["final_norm"], x), head, preferred_element_type=jnp.float32)


def build(shape: Shape):
    """(logits of tokens, one update and its loss)."""
    tx = optax.adamw(shapes.LEARNING_RATE, shapes.B1, shapes.B2, shapes.EPSILON, weight_decay=shapes.DECAY)
    params = jax.tree.map(jnp.asarray, shapes.weights(shape))
    state = [params, tx.init(params)]

    def loss_fn(params, tokens):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, tokens, shape)[:, :-1], tokens[:, 1:])
        return jnp.mean(losses)

    def update(params, opt_state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    compiled = jax.jit(update, donate_argnums=(0, 1))

    def step(tokens):
        state[0], state[1], loss = jax.block_until_ready(compiled(*state, tokens))
        return float(loss)

    probe = jax.jit(lambda params, tokens: logits(params, tokens, shape))
    return lambda tokens: probe(state[0], tokens), step
