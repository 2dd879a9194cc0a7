# SPDX-License-Identifier: Apache-2.0
"""The shallow decoder that rebuilds a plan from its capsule, and from nothing else.

B batch, J plan tokens, K capsule tokens, d capsule width, D model width, V vocabulary, W decoder width, N heads.
It never sees question, steps or answer: otherwise it could copy the plan and would say nothing about the capsule.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn.attention import attention
from jaxlm.nn.capsule_config import PlanDecoderConfig
from jaxlm.nn.config import ModelConfig, attention_config
from jaxlm.nn.dense import dense
from jaxlm.nn.mlp import mlp
from jaxlm.nn.norm import rms_norm
from jaxlm.nn.position_kinds import Nope
from jaxlm.nn.shapes import Leaf, attention_leaves, dense_leaves, mlp_leaves

_CROSS = ("query", "key", "value", "out")


def layer_config(config: PlanDecoderConfig) -> ModelConfig:
    """One of its layers as the config of a model's layer."""
    return attention_config(config.width, num_heads=config.heads, positions=Nope())


def plan_decoder_leaves(
    width: int, capsule_width: int, num_capsules: int, config: PlanDecoderConfig
) -> dict[str, Leaf]:
    """Its parameters; none has the size of the vocabulary.

    Args:
      width: D.
      capsule_width: d.
      num_capsules: K.
    """
    W, layer = config.width, layer_config(config)
    leaves = dense_leaves("token_in", width, W, bias=False) | dense_leaves("token_out", W, width, bias=False)
    leaves |= dense_leaves("memory", capsule_width, W, bias=False) | {"memory/place": Leaf((num_capsules, W), W**-0.5)}
    leaves |= {"start": Leaf((W,), 1.0), "positions": Leaf((config.max_plan, W), 0.3)}
    leaves |= {"final_norm/scale": Leaf((W,), 0.0, 1.0)} | dense_leaves("pool", W, width, bias=True)
    for i in range(config.layers):
        branches = {"self": attention_leaves(layer), "mlp": mlp_leaves(layer)}
        branches["cross"] = {
            path: leaf for name in _CROSS for path, leaf in dense_leaves(name, W, W, bias=False).items()
        }
        for name, inside in branches.items():
            leaves |= {f"layer_{i}/{name}/{path}": leaf for path, leaf in inside.items()}
            leaves[f"layer_{i}/{name}_norm/scale"] = Leaf((W,), 0.0, 1.0)
    return leaves


def plan_hidden(
    p: Mapping[str, Any], capsule_BKd: jax.Array, plan_BJ: jax.Array, table_VD: jax.Array, config: PlanDecoderConfig
) -> jax.Array:
    """What predicts each plan token from the capsule and the plan tokens before it, [B, J, D] float32.

        logits = plan_hidden @ table.T,   M_k = capsule_k @ memory + place_k,   cross-attention to M_1 .. M_K alone

    Args:
      p: as `plan_decoder_leaves` lays them out.
      capsule_BKd: [B, K, d].
      plan_BJ: [B, J] int32, J at most `max_plan`; padding behind the plan changes nothing before it.
      table_VD: the model's embedding table, which gets no gradient from here.
    Raises: ValueError for a plan that is too long.
    """
    B, J = plan_BJ.shape
    if config.max_plan < J:
        raise ValueError(f"a plan of {J} tokens is longer than max_plan {config.max_plan}: raise max_plan")
    layer = layer_config(config)
    memory = plan_memory(p, capsule_BKd)
    before = jnp.take(jax.lax.stop_gradient(table_VD), plan_BJ[:, :-1], axis=0).astype(jnp.float32)
    before = before * jax.lax.rsqrt(
        jnp.mean(jnp.square(before), axis=-1, keepdims=True) + 1e-12
    )  # of any table's scale
    start = jnp.broadcast_to(p["start"][None, None], (B, 1, config.width))
    x = jnp.concatenate([start, dense(p["token_in"], before)], axis=1) + p["positions"][None, :J]
    for i in range(config.layers):
        inside = p[f"layer_{i}"]
        x = x + attention(inside["self"], rms_norm(inside["self_norm"], x), layer)
        x = x + _cross(inside["cross"], rms_norm(inside["cross_norm"], x), memory, config.heads)
        x = x + mlp(inside["mlp"], rms_norm(inside["mlp_norm"], x), layer)
    return dense(p["token_out"], rms_norm(p["final_norm"], x))


def plan_memory(p: Mapping[str, Any], capsule_BKd: jax.Array) -> jax.Array:
    """M_k, all that the decoder is told: [B, K, W]."""
    return dense({"kernel": p["memory"]["kernel"]}, capsule_BKd) + p["memory"]["place"][None]


def plan_pooled(p: Mapping[str, Any], capsule_BKd: jax.Array) -> jax.Array:
    """A guess of the plan's mean embedding, in units of a row's RMS, [B, D]: the other published reading."""
    return dense(p["pool"], jax.nn.silu(jnp.mean(plan_memory(p, capsule_BKd), axis=1)))


def plan_greedy(
    p: Mapping[str, Any], capsule_BKd: jax.Array, table_VD: jax.Array, config: PlanDecoderConfig
) -> jax.Array:
    """The most probable next token again and again, [B, max_plan] int32; what follows an end marker means nothing."""

    def one(j: jax.Array, plan: jax.Array) -> jax.Array:
        hidden = plan_hidden(p, capsule_BKd, plan, table_VD, config)
        now = jax.lax.dynamic_index_in_dim(hidden, j, axis=1, keepdims=False)
        token = jnp.argmax(jnp.dot(now, table_VD.T.astype(jnp.float32)), axis=-1).astype(jnp.int32)
        return jax.lax.dynamic_update_index_in_dim(plan, token, j, axis=1)

    none = jnp.zeros((capsule_BKd.shape[0], config.max_plan), jnp.int32)
    return jax.lax.fori_loop(0, config.max_plan, one, none)


def _cross(p: Mapping[str, Any], x_BJW: jax.Array, memory_BKW: jax.Array, heads: int) -> jax.Array:
    """Attention of every plan place to the whole memory."""

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, -1)

    query, key, value = split(dense(p["query"], x_BJW)), *(split(dense(p[n], memory_BKW)) for n in ("key", "value"))
    scores = jnp.einsum("bjnh,bknh->bnjk", query, key) * query.shape[-1] ** -0.5
    mixed = jnp.einsum("bnjk,bknh->bjnh", jax.nn.softmax(scores, axis=-1), value)
    return dense(p["out"], mixed.reshape(x_BJW.shape))
