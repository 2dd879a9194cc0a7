# SPDX-License-Identifier: Apache-2.0
"""Flax NNX modules over the pure functions: they hold parameters, the functions hold the method.

The pure dict of a module's parameters is what the functions take, so `Model(config).apply(params, tokens)` and
`Decoder(config, rngs=...)(tokens)` give the same bits.  `linen_modules` has the same for Linen.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.nn.attention import attention, place_and_mix
from jaxlm.nn.config import ModelConfig, attention_config
from jaxlm.nn.decoder import Model
from jaxlm.nn.mlp import mlp
from jaxlm.nn.norm import rms_norm
from jaxlm.nn.position_kinds import Hope, Positions
from jaxlm.nn.positions import encoding
from jaxlm.nn.shapes import attention_leaves, decoder_leaves, initialise, mixing_leaves, mlp_leaves


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


class HoPEAttention(Attention):
    """Attention with hyperbolic rotary positions, projections and all: [B, L, D] to [B, L, D].

    >>> layer = HoPEAttention(32, num_heads=4, num_kv_heads=2, positions=Hope(theta_scale=0.02), rngs=nnx.Rngs(0))
    >>> print(layer(jnp.ones((1, 7, 32))).shape)
    (1, 7, 32)

    Args:
      width: D.
      num_heads: N.
      num_kv_heads: K, divides N; None: N.
      head_width: H, even; None: D / N.
      positions: the rates, None: `Hope()`; another kind (`Rope()`, `Alibi()`) gives the same layer with that.
      query_key_norm: "none", "head" (over H) or "full" (over all heads), before the positions.
      use_bias: whether all four projections have one.
      rngs: `params` of it makes the parameters.
      fields: further ones of `ModelConfig`: `attention_sink`, `attention_softcap`, `windows`, `attention`, `dtype`.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_width: int | None = None,
        positions: Positions | None = None,
        query_key_norm: Literal["none", "head", "full"] = "none",
        use_bias: bool = False,
        rngs: nnx.Rngs,
        **fields: Any,
    ):
        fields |= {"num_kv_heads": num_kv_heads, "head_width": head_width, "query_key_norm": query_key_norm}
        fields["positions"] = Hope() if positions is None else positions
        super().__init__(attention_config(width, num_heads=num_heads, use_bias=use_bias, **fields), rngs=rngs)


class DotProductAttention(nnx.Module):
    """Positions and attention between one's own projections: q [B, L, N, H], k, v [B, L, K, H] to [B, L, N, H].

    It holds what positions learn (a gap, slopes, a sink), which with most kinds is nothing.  The config is one of
    `attention_config`, or a model's.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        hold(self, initialise(mixing_leaves(config), rngs.params()))

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        options: dict[str, Any] = {"positions": positions, "segment_ids": segment_ids}
        return place_and_mix(held(self), query, key, value, self.config, **options)


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
