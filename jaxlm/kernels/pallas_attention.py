# SPDX-License-Identifier: Apache-2.0
"""Decaying attention as Pallas kernels."""

from typing import Any

import jax


def pallas_attention(query_BLNH: jax.Array, key_BLKH: jax.Array, value_BLKH: jax.Array, **options: Any) -> jax.Array:
    """Not there yet."""
    raise ValueError("attention 'pallas' is not built yet: use 'tiled'")
