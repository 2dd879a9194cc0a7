# SPDX-License-Identifier: Apache-2.0
"""The count of FLOPs against hand counts and against the compiler's."""

import jax
import jax.numpy as jnp
import pytest

from jaxlm.nn import Model, ModelConfig
from jaxlm.nn.flops import model_flops


def test_flops_equal_a_hand_count_for_both_conventions():
    config = ModelConfig(
        vocab_size=11, width=6, num_layers=2, num_heads=3, num_kv_heads=1, head_width=4, mlp_width=5, gated=False
    )
    kernels = 6 * 12 + 6 * 4 + 6 * 4 + 12 * 6 + 2 * 6 * 5
    row = 2 * 7 * (2 * kernels + 6 * 11)
    assert model_flops(config, tokens=7, length=7, causal=False) == row + 2 * 2 * 2 * 12 * 7 * 7
    assert model_flops(config, tokens=7, length=7) == row + 2 * 2 * 2 * 12 * (1 + 2 + 3 + 4 + 5 + 6 + 7)


def test_flops_are_close_to_what_the_compiler_counts():
    config = ModelConfig(vocab_size=256, width=64, num_layers=1, num_heads=4, mlp_width=128, attention="xla")
    model = Model(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    forward = jax.jit(lambda params, tokens: model.logits(params, model.apply(params, tokens)))
    counted = forward.lower(params, tokens).compile().cost_analysis()["flops"]
    assert model_flops(config, tokens=64, length=32, causal=False) == pytest.approx(counted, rel=0.15)
