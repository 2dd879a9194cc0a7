# SPDX-License-Identifier: Apache-2.0
"""Laws of attention, and parity with loops in NumPy.  B batch, L tokens, N heads, K key heads, H head width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels.blocked_attention import blocked_attention
from jaxlm.nn.attention import TILED_FROM, attend, visible

B, L, N, K, H = 2, 11, 4, 2, 8
SEGMENTS = np.array([[1] * 4 + [2] * 5 + [0] * 2, [0] * 3 + [1] * 8], np.int32)  # padded on the right, and on the left


def draw(seed=0, heads=(N, K, K), dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(key, (B, L, n, H), dtype) for key, n in zip(keys, heads, strict=True)]


def loops(query, key, value, *, segment_ids=None, window=None, scale=H**-0.5, softcap=None):
    """One score at a time, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros((B, L, N, H))
    for b in range(B):
        for n in range(N):
            for i in range(L):
                past = [j for j in range(i + 1) if window is None or i - j < window]
                if segment_ids is not None:
                    past = [j for j in past if segment_ids[b, j] == segment_ids[b, i]]
                scores = np.array([query[b, i, n] @ key[b, j, n // (N // K)] for j in past]) * scale
                scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[b, i, n] = sum(w * value[b, j, n // (N // K)] for w, j in zip(weights, past, strict=True))
    return out


def plain(query, key, value, *, segment_ids=None, window=None, scale=H**-0.5, softcap=None):
    """The textbook form with whole scores, for gradients."""
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    scores = jnp.einsum("BLNH,BMNH->BNLM", query, key) * scale
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    seen = visible(L, segment_ids, window)[:, None]
    return jnp.einsum("BNLM,BMNH->BLNH", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1), value)


VARIANTS = [
    {},
    {"segment_ids": SEGMENTS},
    {"window": 3},
    {"segment_ids": SEGMENTS, "window": 3, "softcap": 2.0, "scale": 0.7},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_equals_loops_over_single_scores(variant):
    q, k, v = draw()
    given = {name: jnp.asarray(x) if name == "segment_ids" else x for name, x in variant.items()}
    np.testing.assert_allclose(jax.jit(lambda *x: attend(*x, **given))(q, k, v), loops(q, k, v, **variant), atol=2e-6)


@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_change_neither_values_nor_gradients(variant, block):
    q, k, v = draw()
    cotangent = draw(1, (N, N, N))[0]
    given = {"scale": H**-0.5} | variant
    if "segment_ids" in given:
        given["segment_ids"] = jnp.asarray(given["segment_ids"])

    def value_and_pull(attention):
        def run(q, k, v):
            out, pull = jax.vjp(attention, q, k, v)
            return out, pull(cotangent)

        return jax.jit(run)(q, k, v)

    ours = value_and_pull(lambda *x: blocked_attention(*x, block=block, **given))
    theirs = value_and_pull(lambda *x: plain(*x, **given))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-6), ours, theirs)


def test_a_traced_window_equals_a_static_one():
    q, k, v = draw()
    traced = jax.jit(lambda w: jax.grad(lambda q: jnp.sum(jnp.sin(attend(q, k, v, window=w))))(q))
    for window in (1, 4):
        static = jax.jit(jax.grad(lambda q, w=window: jnp.sum(jnp.sin(attend(q, k, v, window=w)))))(q)
        np.testing.assert_allclose(traced(jnp.int32(window)), static, atol=1e-6)


def test_a_window_of_one_returns_the_token_itself():
    q, k, v = draw(heads=(N, N, N))
    np.testing.assert_allclose(attend(q, k, v, window=1), v, atol=1e-6)


def test_shared_key_heads_equal_repeated_ones():
    q, k, v = draw()
    repeated = attend(q, *(jnp.repeat(x, N // K, axis=2) for x in (k, v)))
    np.testing.assert_allclose(attend(q, k, v), repeated, atol=1e-6)


def test_a_key_is_felt_exactly_inside_the_window_the_past_and_the_segment():
    q, k, v = draw()
    window, segments = 3, jnp.asarray(SEGMENTS)

    def out_of(v):
        return blocked_attention(q, k, v, scale=0.3, window=window, segment_ids=segments, block=4)

    moved = jax.jit(jax.jacobian(lambda v: jnp.sum(out_of(v), axis=(2, 3))))(v)  # [B, L, B, L, K, H]
    felt = (np.asarray(moved) != 0).any(axis=(4, 5))
    for b in range(B):
        assert not felt[b, :, 1 - b].any()
        for i in range(L):
            for j in range(L):
                expected = 0 <= i - j < window and SEGMENTS[b, i] == SEGMENTS[b, j]
                assert felt[b, i, b, j] == expected, (b, i, j)


def test_softmax_is_in_float32_under_bfloat16():
    q, k, v = draw(dtype=jnp.bfloat16)
    k = k.at[:, 0].add(jnp.bfloat16(8.0))  # scores whose bfloat16 rounding would show
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), loops(q, k, v), atol=0.02)


def test_long_rows_are_tiled_and_short_ones_are_not():
    for length in (TILED_FROM - 1, TILED_FROM):
        q, k, v = (jax.random.normal(key, (1, length, 1, 8)) for key in jax.random.split(jax.random.key(0), 3))
        tiled = attend(q, k, v, implementation="tiled")
        assert jnp.array_equal(attend(q, k, v), tiled) == (length == TILED_FROM)
        np.testing.assert_allclose(attend(q, k, v), tiled, atol=1e-6)


def test_large_scores_stay_finite():
    q, k, v = draw()
    value, grads = jax.value_and_grad(lambda q: jnp.sum(attend(q * 1e4, k * 1e4, v)))(q)
    assert jnp.isfinite(value) and jnp.all(jnp.isfinite(grads))


def test_a_forced_implementation_that_cannot_names_the_reason():
    q, k, v = draw()
    with pytest.raises(ValueError, match=r"cudnn.*needs an NVIDIA GPU.*cpu"):
        attend(q, k, v, implementation="cudnn")
    with pytest.raises(ValueError, match="'flash'"):
        attend(q, k, v, implementation="flash")
