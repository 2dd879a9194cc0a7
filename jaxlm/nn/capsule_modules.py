# SPDX-License-Identifier: Apache-2.0
"""Flax modules over the functions of `capsule` and `plan_decoder`, for NNX and for Linen: they hold parameters only."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jaxlm.nn.capsule import capsule_init, capsule_leaves, capsule_make
from jaxlm.nn.capsule_config import CapsuleConfig, PlanDecoderConfig
from jaxlm.nn.linen_modules import declare
from jaxlm.nn.nnx_modules import held, hold
from jaxlm.nn.plan_decoder import plan_decoder_leaves, plan_greedy, plan_hidden
from jaxlm.nn.shapes import initialise


class CapsuleBottleneck(nnx.Module):
    """Hidden states [B, K, D] to capsule vectors [B, K, d] and the embeddings [B, K, D] that a decoder reads next.

    In mode "autoregressive" it is called with one hidden state after the other, by `capsule_chain`; in "parallel" with
    those of `queries`, the K learned embeddings that are read first.

    >>> bottleneck = CapsuleBottleneck(16, capsule_width=4, num_capsules=2, rngs=nnx.Rngs(0))
    >>> capsule, embeddings = bottleneck(jnp.ones((1, 1, 16)))
    >>> print(capsule.shape, embeddings.shape)
    (1, 1, 4) (1, 1, 16)

    Args:
      width: D.
      capsule_width: d < D.
      num_capsules: K >= 1.
      mode: how the K come about; "parallel" has queries.
      embed_scale: "rms": embeddings have the RMS `rho`; "none": the bare projection.
      table: [V, D], the embedding table whose rows' mean RMS is `rho`; None: rows of unit length.
      rngs: `params` of it makes the parameters.
    """

    def __init__(
        self,
        width: int,
        *,
        capsule_width: int = 128,
        num_capsules: int = 2,
        mode: Literal["autoregressive", "parallel"] = "autoregressive",
        embed_scale: Literal["rms", "none"] = "rms",
        table: jax.Array | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = CapsuleConfig(num_capsules=num_capsules, width=capsule_width, mode=mode, embed_scale=embed_scale)
        hold(self, capsule_init(_unit_row(width) if table is None else table, self.config, rngs.params()))

    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        return capsule_make(held(self), hidden, self.config)


class PlanDecoder(nnx.Module):
    """The plan from its capsule alone: capsule [B, K, d], plan [B, J] and table [V, D] to logits [B, J, V] float32.

    >>> decoder = PlanDecoder(16, capsule_width=4, num_capsules=2, decoder_width=8, heads=2, rngs=nnx.Rngs(0))
    >>> print(decoder(jnp.ones((1, 2, 4)), jnp.array([[3, 1, 2]]), jnp.ones((11, 16))).shape)
    (1, 3, 11)

    Args:
      width: D, of the model whose embedding table is used; the table gets no gradient.
      capsule_width, num_capsules: d and K.
      decoder_width, layers, heads, max_plan: see `PlanDecoderConfig`.
      rngs: `params` of it makes the parameters.
    """

    def __init__(
        self,
        width: int,
        *,
        capsule_width: int = 128,
        num_capsules: int = 2,
        decoder_width: int = 256,
        layers: int = 2,
        heads: int = 4,
        max_plan: int = 128,
        rngs: nnx.Rngs,
    ):
        self.config = PlanDecoderConfig(layers=layers, width=decoder_width, heads=heads, max_plan=max_plan)
        hold(self, initialise(plan_decoder_leaves(width, capsule_width, num_capsules, self.config), rngs.params()))

    def __call__(self, capsule: jax.Array, plan: jax.Array, table: jax.Array) -> jax.Array:
        return _logits(plan_hidden(held(self), capsule, plan, table, self.config), table)

    def read(self, capsule: jax.Array, table: jax.Array) -> jax.Array:
        """The most probable plan, [B, max_plan] int32; what follows an end marker means nothing."""
        return plan_greedy(held(self), capsule, table, self.config)


class LinenCapsuleBottleneck(nn.Module):
    """`CapsuleBottleneck` for Linen."""

    width: int
    capsule_width: int = 128
    num_capsules: int = 2
    mode: Literal["autoregressive", "parallel"] = "autoregressive"
    embed_scale: Literal["rms", "none"] = "rms"

    @nn.compact
    def __call__(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        config = CapsuleConfig(
            num_capsules=self.num_capsules, width=self.capsule_width, mode=self.mode, embed_scale=self.embed_scale
        )
        rho = self.width**-0.5
        leaves = capsule_leaves(self.width, config)
        leaves |= {"rho": leaves["rho"]._replace(mean=rho)} if "rho" in leaves else {}
        leaves |= {"queries": leaves["queries"]._replace(spread=rho)} if "queries" in leaves else {}
        return capsule_make(declare(self, leaves), hidden, config)


class LinenPlanDecoder(nn.Module):
    """`PlanDecoder` for Linen."""

    width: int
    capsule_width: int = 128
    num_capsules: int = 2
    config: PlanDecoderConfig = dataclasses.field(default_factory=PlanDecoderConfig)

    @nn.compact
    def __call__(self, capsule: jax.Array, plan: jax.Array, table: jax.Array) -> jax.Array:
        leaves = plan_decoder_leaves(self.width, self.capsule_width, self.num_capsules, self.config)
        return _logits(plan_hidden(declare(self, leaves), capsule, plan, table, self.config), table)


def _unit_row(width: int) -> jax.Array:
    return jnp.full((1, width), width**-0.5, jnp.float32)


def _logits(hidden: jax.Array, table: jax.Array) -> jax.Array:
    return jnp.einsum("bjd,vd->bjv", hidden, table.astype(jnp.float32))
