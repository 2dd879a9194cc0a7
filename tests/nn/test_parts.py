# SPDX-License-Identifier: Apache-2.0
"""Norms, rotary positions, the linear map and the feed-forward block against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.config import ModelConfig
from jaxlm.nn.dense import dense
from jaxlm.nn.mlp import mlp
from jaxlm.nn.norm import layer_norm, rms_norm
from jaxlm.nn.position_kinds import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling
from jaxlm.nn.positions import rotary_frequencies, rotary_table, rotate, sharpness_of

LLAMA3 = Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=64)
# transformers 5.23, ROPE_INIT_FUNCTIONS["llama3"], head width 16, base 1e4, the factors above
LLAMA3_GOLDEN = [1.0, 0.24438459, 0.013042256, 0.0039528473, 0.00125, 0.00039528473, 0.00012500001, 3.9528473e-05]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_equals_loops(offset):
    x, scale = 3 * normal(2, 3, 8), normal(8, seed=1)
    expected = np.zeros_like(x)
    for b in range(2):
        for t in range(3):
            expected[b, t] = x[b, t] / math.sqrt(sum(float(c) ** 2 for c in x[b, t]) / 8 + 1e-3) * (offset + scale)
    out = rms_norm({"scale": jnp.asarray(scale)}, jnp.asarray(x), epsilon=1e-3, offset=offset)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_layer_norm_equals_loops():
    x, scale, bias = 3 * normal(2, 3, 8) + 5, normal(8, seed=1), normal(8, seed=2)
    expected = np.zeros_like(x)
    for b in range(2):
        for t in range(3):
            mean = x[b, t].mean(dtype=np.float64)
            variance = ((x[b, t] - mean) ** 2).mean()
            expected[b, t] = (x[b, t] - mean) / math.sqrt(variance + 1e-3) * scale + bias
    out = layer_norm({"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}, jnp.asarray(x), epsilon=1e-3)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_a_norm_casts_before_the_scale_without_an_offset_and_after_it_with_one():
    x = jnp.asarray(normal(1, 64), jnp.bfloat16)
    scale = jnp.asarray(normal(64, seed=1))
    wide = np.asarray(x, np.float32)
    wide = jnp.asarray(wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6))
    before = wide.astype(jnp.bfloat16) * scale.astype(jnp.bfloat16)[None]
    after = (wide * (1.0 + scale)[None]).astype(jnp.bfloat16)
    assert jnp.array_equal(rms_norm({"scale": scale}, x), before)
    assert jnp.array_equal(rms_norm({"scale": scale}, x, offset=1.0), after)


def test_rotation_turns_each_pair_of_halves_by_position_times_frequency():
    x, positions = normal(2, 5, 3, 8), np.array([[0, 1, 2, 3, 4], [7, 0, 1, 900, 2]])
    frequencies = [100.0 ** (-2 * i / 8) for i in range(4)]
    expected = np.zeros_like(x)
    for b in range(2):
        for t in range(5):
            for i, frequency in enumerate(frequencies):
                turned = (x[b, t, :, i] + 1j * x[b, t, :, i + 4]) * np.exp(1j * positions[b, t] * frequency)
                expected[b, t, :, i], expected[b, t, :, i + 4] = turned.real, turned.imag
    table = rotary_table(jnp.asarray(positions, jnp.int32), rotary_frequencies(8, 100.0))
    np.testing.assert_allclose(rotate(jnp.asarray(x), table), expected, atol=1e-4)


def test_rotated_products_depend_on_distance_only():
    q, k = jnp.asarray(normal(1, 1, 1, 8)), jnp.asarray(normal(1, 1, 1, 8, seed=1))

    def product(i, j):
        at = lambda x, t: rotate(x, rotary_table(jnp.full((1, 1), t, jnp.int32), rotary_frequencies(8, 1e4)))  # noqa: E731
        return float(jnp.sum(at(q, i) * at(k, j)))

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)


def test_scaled_frequencies_are_those_of_transformers():
    np.testing.assert_allclose(rotary_frequencies(16, 1e4, LLAMA3), LLAMA3_GOLDEN, rtol=1e-6)
    np.testing.assert_allclose(rotary_frequencies(16, 1e4, LinearScaling(factor=4.0)), rotary_frequencies(16, 1e4) / 4)


def test_scaled_frequencies_equal_live_transformers():
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kinds = {
        "linear": ({"factor": 4.0}, LinearScaling(factor=4.0)),
        "llama3": (
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            LLAMA3,
        ),
        "yarn": (
            {"factor": 4.0, "original_max_position_embeddings": 128},
            YarnScaling(factor=4.0, original_length=128),
        ),
        "dynamic": ({"factor": 2.0}, DynamicScaling(factor=2.0, original_length=512)),
    }
    for kind, (numbers, scaling) in kinds.items():
        rope = {"rope_type": kind, "rope_theta": 1e4, **numbers}
        config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=512, rope_parameters=rope)
        theirs, sharpness = ROPE_INIT_FUNCTIONS[kind](config, None, **({"seq_len": 2000} if kind == "dynamic" else {}))
        ours = rotary_frequencies(16, 1e4, scaling, length=2000)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6)
        np.testing.assert_allclose(sharpness_of(scaling), sharpness, rtol=1e-6)


def test_an_odd_head_width_is_refused_by_rotary_positions():
    with pytest.raises(ValueError, match="even head width, got 7"):
        rotary_frequencies(7, 1e4)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("activation", "function"),
    [("silu", lambda x: x / (1 + np.exp(-x))), ("gelu", gelu), ("gelu_tanh", gelu_tanh)],
)
def test_mlp_equals_numpy(activation, function, gated):
    config = ModelConfig(vocab_size=5, width=6, num_layers=1, num_heads=1, activation=activation, gated=gated)
    x = normal(2, 3, 6)
    p = {"gate": normal(6, 10, seed=1), "up": normal(6, 10, seed=2), "down": normal(10, 6, seed=3)}
    bias = normal(10, seed=4)
    inner = function(x @ p["gate"]) * (x @ p["up"] + bias) if gated else function(x @ p["up"] + bias)
    params = {name: {"kernel": jnp.asarray(kernel)} for name, kernel in p.items()}
    params["up"]["bias"] = jnp.asarray(bias)
    np.testing.assert_allclose(mlp(params, jnp.asarray(x), config), inner @ p["down"], rtol=1e-4, atol=1e-4)


def test_dense_adds_its_bias_and_its_adapter():
    x, kernel, bias, a, b = normal(2, 3, 4), normal(4, 5), normal(5), normal(4, 2), normal(2, 5)
    p = {"kernel": kernel, "bias": bias, "lora_a": a, "lora_b": b}
    out = dense(jax.tree.map(jnp.asarray, p), jnp.asarray(x), 0.5)
    np.testing.assert_allclose(out, x @ (kernel + 0.5 * a @ b) + bias, atol=1e-5)
