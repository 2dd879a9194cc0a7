# SPDX-License-Identifier: Apache-2.0
"""Flax Linen modules over the pure functions; their `params` collection is what the functions take."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.nn.attention import attention, place_and_mix
from jaxlm.nn.config import ModelConfig, attention_config
from jaxlm.nn.decoder import Model
from jaxlm.nn.mlp import mlp
from jaxlm.nn.norm import rms_norm
from jaxlm.nn.position_kinds import Hope, Positions
from jaxlm.nn.positions import encoding
from jaxlm.nn.shapes import Leaf, attention_leaves, decoder_leaves, initialise, mixing_leaves, mlp_leaves


def declare(module: nn.Module, leaves: dict[str, Leaf]) -> dict[str, Any]:
    """Declares one Linen parameter (an array or a dict of them) for each first name of the paths."""

    def start(key: jax.Array, name: str) -> Any:
        return initialise({path: leaf for path, leaf in leaves.items() if path.split("/")[0] == name}, key)[name]

    return {name: module.param(name, start, name) for name in dict.fromkeys(path.split("/")[0] for path in leaves)}


class LinenRMSNorm(nn.Module):
    """`rms_norm` over the last dimension."""

    epsilon: float = 1e-6
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", lambda _: jnp.full(x.shape[-1:], 1.0 - self.offset, jnp.float32))
        return rms_norm({"scale": scale}, x, epsilon=self.epsilon, offset=self.offset)


class LinenMLP(nn.Module):
    """`mlp`, the feed-forward branch of one layer."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return mlp(declare(self, mlp_leaves(self.config)), x, self.config)


class LinenAttention(nn.Module):
    """`attention`, the attention branch of one layer with its positions; the window is the first of the config's."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, *, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        p = declare(self, attention_leaves(self.config))
        places = encoding(self.config, x.shape[1], positions, segment_ids)
        window = self.config.windows[0]
        return attention(p, x, self.config, encoding=places, segment_ids=segment_ids, window=window)


class LinenHoPEAttention(nn.Module):
    """`HoPEAttention` for Linen: attention with hyperbolic rotary positions, [B, L, D] to [B, L, D]."""

    width: int
    num_heads: int
    num_kv_heads: int | None = None
    head_width: int | None = None
    positions: Positions = Hope()
    query_key_norm: Literal["none", "head", "full"] = "none"
    use_bias: bool = False
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further ones of `ModelConfig`

    @nn.compact
    def __call__(
        self, x: jax.Array, *, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        config = attention_config(
            self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_width=self.head_width,
            positions=self.positions,
            query_key_norm=self.query_key_norm,
            use_bias=self.use_bias,
            **self.fields,
        )
        p = declare(self, attention_leaves(config))
        places = encoding(config, x.shape[1], positions, segment_ids)
        return attention(p, x, config, encoding=places, segment_ids=segment_ids, window=config.windows[0])


class LinenDotProductAttention(nn.Module):
    """`DotProductAttention` for Linen: positions and attention between one's own projections."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        p = declare(self, mixing_leaves(self.config))
        options: dict[str, Any] = {"positions": positions, "segment_ids": segment_ids}
        return place_and_mix(p, query, key, value, self.config, **options)


class LinenDecoder(nn.Module):
    """A whole decoder: tokens [B, T] to logits [B, T, V] float32."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        model, params = Model(self.config), declare(self, decoder_leaves(self.config))
        return model.logits(params, model.apply(params, tokens, positions=positions, segment_ids=segment_ids))
