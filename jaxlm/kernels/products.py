# SPDX-License-Identifier: Apache-2.0
"""The matrix products of attention."""

import jax
import jax.numpy as jnp


def contract(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """An einsum in the narrower dtype of the two, summed in float32.

    float32 operands are not rounded, which some devices would do by themselves.
    """
    dtype = left.dtype if left.dtype.itemsize <= right.dtype.itemsize else right.dtype
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    left, right = left.astype(dtype), right.astype(dtype)
    return jnp.einsum(spec, left, right, precision=exact, preferred_element_type=jnp.float32)
