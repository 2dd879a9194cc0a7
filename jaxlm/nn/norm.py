# SPDX-License-Identifier: Apache-2.0
"""RMS and layer normalisation, always computed in float32, cast in the order the checkpoints were trained with."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def rms_norm(p: Mapping[str, jax.Array], x: jax.Array, *, epsilon: float = 1e-6, offset: float = 0.0) -> jax.Array:
    """y = x / sqrt(mean(x^2) + epsilon) * (offset + scale), over the last dimension.

    With offset 0 the normalised value is cast to the dtype of `x` before the scale (Llama); with an offset the product
    is made in float32 and cast afterwards (Gemma).  In float32 both are the same.

    Args:
      p: `scale` [D].
      x: [..., D], any float dtype, which the result keeps.
      epsilon: > 0, added to the mean square.
      offset: what a scale of zero multiplies by.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    scale = p["scale"].reshape((1,) * (x.ndim - 1) + p["scale"].shape)
    if offset:
        return (wide * (offset + scale.astype(jnp.float32))).astype(x.dtype)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


def layer_norm(p: Mapping[str, jax.Array], x: jax.Array, *, epsilon: float = 1e-5, offset: float = 0.0) -> jax.Array:
    """y = (x - mean(x)) / sqrt(var(x) + epsilon) * (offset + scale) + bias, in float32, over the last dimension.

    Args:
      p: `scale` [D] and, where the model has one, `bias` [D].
      x: [..., D], any float dtype, which the result keeps.
      epsilon: > 0, added to the variance.
      offset: what a scale of zero multiplies by.

    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    shape = (1,) * (x.ndim - 1) + p["scale"].shape
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    wide = wide * (offset + p["scale"].astype(jnp.float32).reshape(shape))
    if "bias" in p:
        wide = wide + p["bias"].astype(jnp.float32).reshape(shape)
    return wide.astype(x.dtype)


NORMS = {"rms": rms_norm, "layer": layer_norm}
