# SPDX-License-Identifier: Apache-2.0
"""Scores whose channels decay with distance, through factors at queries and at keys.

For an anchor r, exp(-rate (m - n)) = exp(-rate (m - r)) exp(-rate (r - n)): with r between n and m both exponents are
<= 0 and nothing can overflow; with r in the middle of a row that is short enough neither leaves float32's range.
"""

from typing import Any

import jax
import jax.numpy as jnp

REACH = 80.0  # rate * span up to which centred factors stay exact: within exp(+-40), of the 88 that float32 has


def centred_refusal(max_rate: float | None, span: int, dtype: Any) -> str | None:
    """Why `centred` cannot be used, or None if it can.

    Args:
      max_rate: what no rate exceeds, or None if that is not known.
      span: largest difference of clocks in a row.
      dtype: of queries and keys.
    """
    if max_rate is None:
        return "its rates are learned without a bound (give gap_max, or max_rate)"
    if max_rate * span > REACH:
        return f"it needs max rate x span <= {REACH:g}, got {max_rate:g} x {span} = {max_rate * span:.1f}"
    if dtype == jnp.float16:
        return "float16 ends at exp(11): use bfloat16 or float32"
    return None


def centred(
    query_BLNH: jax.Array, key_BLKH: jax.Array, rates_KH: jax.Array, clock: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys whose plain products are the decayed ones, for any attention that selects its mask.

    query * exp(-rate (clock - r)), key * exp(rate (clock - r)), r the middle of the row.  Products with keys of the
    future are large and finite: attention that masks by adding a number would let them through.

    Args:
      query_BLNH: [B, L, N, H].
      key_BLKH: [B, L, K, H].
      rates_KH: float32 [1 or K, H].
      clock: [B or 1, L] int32, never decreasing.  A row whose span times the largest rate exceeds `REACH` becomes NaN.
    """
    middle = clock[:, :1] + (clock[:, -1:] - clock[:, :1]) // 2
    place = (clock - middle)[:, :, None, None].astype(jnp.float32)
    span = (clock[:, -1] - clock[:, 0]).astype(jnp.float32)
    lost = jnp.where(span * jnp.max(rates_KH) > 1.001 * REACH, jnp.nan, 1.0)[:, None, None, None]
    rates_NH = rates_KH
    if rates_KH.shape[0] > 1:
        rates_NH = jnp.repeat(rates_KH, query_BLNH.shape[2] // rates_KH.shape[0], axis=0)
    down, up = jnp.exp(-rates_NH * place) * lost, jnp.exp(rates_KH * place)
    query = (query_BLNH.astype(jnp.float32) * down).astype(query_BLNH.dtype)
    return query, (key_BLKH.astype(jnp.float32) * up).astype(key_BLKH.dtype)
