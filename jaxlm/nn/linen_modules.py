# SPDX-License-Identifier: Apache-2.0
"""Flax Linen modules over the pure functions; their `params` collection is what the functions take."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlm.nn.attention import attention
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import Model
from jaxlm.nn.mlp import mlp
from jaxlm.nn.norm import rms_norm
from jaxlm.nn.positions import encoding
from jaxlm.nn.shapes import Leaf, attention_leaves, decoder_leaves, initialise, mlp_leaves


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


class LinenDecoder(nn.Module):
    """A whole decoder: tokens [B, T] to logits [B, T, V] float32."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        model, params = Model(self.config), declare(self, decoder_leaves(self.config))
        return model.logits(params, model.apply(params, tokens, positions=positions, segment_ids=segment_ids))
