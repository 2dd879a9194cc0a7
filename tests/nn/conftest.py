# SPDX-License-Identifier: Apache-2.0
"""Layers state every change of dtype: silent promotion raises here.  And the oracle of attention, dense and float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def no_silent_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


def dense_attention(q, k, v, extra, *, clock=None, segment_ids=None, window=None, softcap=None):
    """Every score, with the exponent taken of the difference; `extra` holds rates [N or K, H], slopes, sink."""
    (B, L, N, H), K = q.shape, k.shape[2]
    k, v = jnp.repeat(k, N // K, 2), jnp.repeat(v, N // K, 2)
    index = np.arange(L)
    clock = index[None] if clock is None else clock
    apart = jnp.maximum(jnp.asarray(clock[:, :, None] - clock[:, None, :]), 0).astype(jnp.float64)
    if "rates" in extra:
        rates = extra["rates"] if extra["rates"].ndim == 2 else extra["rates"][None]
        rates = jnp.repeat(rates, N // rates.shape[0], 0)
        scores = jnp.stack(
            [
                jnp.einsum(
                    "blh,bmh,blmh->blm",
                    q[:, :, n],
                    k[:, :, n],
                    jnp.exp(-apart[..., None] * rates[n]) + 0 * q[:, :1, None, 0],
                )
                for n in range(N)
            ],
            1,
        )
    else:
        scores = jnp.einsum("blnh,bmnh->bnlm", q, k)
    scores = scores * H**-0.5
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    if "slopes" in extra:
        scores = scores - extra["slopes"][None, :, None, None] * apart[:, None]
    seen = (index[:, None] >= index[None, :]) & (index[:, None] - index[None, :] < (window or L))
    seen = seen[None] if segment_ids is None else seen[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    if "sink" in extra:
        sink = jnp.broadcast_to(extra["sink"][None, :, None, None], (B, N, L, 1))
        scores = jnp.concatenate([scores, sink], -1)
    weights = jax.nn.softmax(scores, -1)[..., :L]
    return jnp.einsum("bnlm,bmnh->blnh", weights, v)


@partial(jax.jit, static_argnames=("window", "softcap"))
def dense_gradients(args, cotangent, *, clock, segment_ids, **options):
    out, pull = jax.vjp(lambda *a: dense_attention(*a, clock=clock, segment_ids=segment_ids, **options), *args)
    return out, pull(cotangent)


@pytest.fixture
def oracle():
    """(q, k, v, extra, cotangent, **options) -> output and gradients, NumPy float64."""

    def run(q, k, v, extra, cotangent, *, clock=None, segment_ids=None, **options):
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            args, cotangent = jax.tree.map(lambda x: np.asarray(x, np.float64), ((q, k, v, extra), cotangent))
            found = dense_gradients(args, cotangent, clock=clock, segment_ids=segment_ids, **options)
            return jax.tree.map(np.asarray, found)

    return run
