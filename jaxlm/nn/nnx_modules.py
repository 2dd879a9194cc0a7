# SPDX-License-Identifier: Apache-2.0
"""Flax NNX modules over the pure functions: they hold parameters, the functions hold the method.

The pure dict of a module's parameters is what the functions take, so `Model(config).apply(params, tokens)` and
`Decoder(config, rngs=...)(tokens)` give the same bits.  `linen_modules` has the same for Linen.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.nn.attention import attention
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import Model
from jaxlm.nn.mlp import mlp
from jaxlm.nn.norm import rms_norm
from jaxlm.nn.positions import encoding
from jaxlm.nn.shapes import attention_leaves, decoder_leaves, initialise, mlp_leaves


class Group(nnx.Module):
    """A branch of the parameter tree: names to parameters and further groups."""

    def __init__(self, tree: Mapping[str, Any]):
        hold(self, tree)


def hold(module: nnx.Module, tree: Mapping[str, Any]) -> None:
    """Gives a module one attribute a name of `tree`: a `Group` for a dict, an `nnx.Param` for an array."""
    for name, value in tree.items():
        setattr(module, name, Group(value) if isinstance(value, Mapping) else nnx.Param(value))


def held(module: nnx.Module) -> dict[str, Any]:
    """The parameters of a module as a plain nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


class RMSNorm(nnx.Module):
    """`rms_norm` over the last dimension, `width` wide."""

    def __init__(self, width: int, *, epsilon: float = 1e-6, offset: float = 0.0, rngs: nnx.Rngs | None = None):
        self.epsilon, self.offset = epsilon, offset
        self.scale = nnx.Param(jnp.full((width,), 1.0 - offset, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(held(self), x, epsilon=self.epsilon, offset=self.offset)


class MLP(nnx.Module):
    """`mlp`, the feed-forward branch of one layer: [..., D] to [..., D]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        hold(self, initialise(mlp_leaves(config), rngs.params()))

    def __call__(self, x: jax.Array) -> jax.Array:
        return mlp(held(self), x, self.config)


class Attention(nnx.Module):
    """`attention`, the attention branch of one layer with its positions: [B, L, D] to [B, L, D].

    The window is the first of `config.windows`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        hold(self, initialise(attention_leaves(config), rngs.params()))

    def __call__(
        self, x: jax.Array, *, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        places = encoding(self.config, x.shape[1], positions, segment_ids)
        window = self.config.windows[0]
        return attention(held(self), x, self.config, encoding=places, segment_ids=segment_ids, window=window)


class Decoder(nnx.Module):
    """A whole decoder: tokens [B, T] to logits [B, T, V] float32.

    `nnx.to_pure_dict(nnx.state(decoder, nnx.Param))` is exactly the parameter dict of `Model(config)`.

    >>> decoder = Decoder(ModelConfig(vocab_size=11, width=8, num_layers=2, num_heads=2), rngs=nnx.Rngs(0))
    >>> print(decoder(jnp.array([[1, 2, 3]])).shape)
    (1, 3, 11)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None = None, params: Mapping[str, Any] | None = None):
        self.config = config
        if rngs is not None and params is None:
            params = initialise(decoder_leaves(config), rngs.params())
        elif params is None or rngs is not None:
            raise ValueError("Decoder needs rngs, to make parameters, or params, to hold loaded ones: give one of them")
        hold(self, params)

    def __call__(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        model, params = Model(self.config), held(self)
        return model.logits(params, model.apply(params, tokens, positions=positions, segment_ids=segment_ids))
