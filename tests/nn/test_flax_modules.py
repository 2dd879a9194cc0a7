# SPDX-License-Identifier: Apache-2.0
"""The Flax modules hold the parameters of the functions and give the same bits."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn as layers
from jaxlm.nn.attention import attention
from jaxlm.nn.dense import dense
from jaxlm.nn.mlp import mlp
from jaxlm.nn.norm import rms_norm
from jaxlm.nn.positions import encoding

CONFIG = layers.ModelConfig(
    vocab_size=32, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24, windows=(4,), tied=False
)
X = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)
SEGMENTS = np.array([[1, 1, 2, 2, 2, 0]] * 2, np.int32)


def pure(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def parts():
    places = encoding(CONFIG, 6)
    return {
        "Attention": lambda p, x: attention(p, x, CONFIG, encoding=places, window=4),
        "MLP": lambda p, x: mlp(p, x, CONFIG),
        "RMSNorm": lambda p, x: rms_norm(p, x),
    }


@pytest.mark.parametrize("name", ["Attention", "MLP", "RMSNorm"])
def test_a_part_gives_the_bits_of_its_function_in_nnx_and_in_linen(name):
    function, x = parts()[name], jnp.asarray(X)
    module = getattr(layers, name)(16 if name == "RMSNorm" else CONFIG, rngs=nnx.Rngs(0))
    assert jnp.array_equal(module(x), function(pure(module), x))
    linen = getattr(layers, f"Linen{name}")(*([] if name == "RMSNorm" else [CONFIG]))
    variables = linen.init(jax.random.key(0), x)
    assert shapes(variables["params"]) == shapes(pure(module))
    assert jnp.array_equal(linen.apply(variables, x), function(variables["params"], x))
    assert jnp.array_equal(linen.apply({"params": pure(module)}, x), module(x))


def test_a_decoder_holds_exactly_the_parameter_dict_and_gives_the_bits_of_the_model():
    model, decoder = layers.Model(CONFIG), layers.Decoder(CONFIG, rngs=nnx.Rngs(0))
    params, tokens, segments = pure(decoder), jnp.asarray(TOKENS), jnp.asarray(SEGMENTS)
    assert shapes(params) == shapes(jax.eval_shape(model.init, jax.random.key(0)))
    expected = model.logits(params, model.apply(params, tokens, segment_ids=segments))
    assert jnp.array_equal(decoder(tokens, segment_ids=segments), expected)
    loaded = layers.Decoder(CONFIG, params=params)
    assert jnp.array_equal(loaded(tokens, segment_ids=segments), expected)
    linen = layers.LinenDecoder(CONFIG)
    assert shapes(jax.eval_shape(linen.init, jax.random.key(0), tokens)["params"]) == shapes(params)
    assert jnp.array_equal(linen.apply({"params": params}, tokens, segment_ids=segments), expected)


def test_a_split_decoder_is_a_pure_function_of_the_plain_dict():
    decoder = layers.Decoder(dataclasses.replace(CONFIG, num_layers=1), rngs=nnx.Rngs(0))
    graph, state = nnx.split(decoder, nnx.Param)
    tokens = jnp.asarray(TOKENS)
    grads = jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(nnx.merge(graph, p)(tokens)))))(nnx.to_pure_dict(state))
    assert shapes(grads) == shapes(pure(decoder))
    assert all(jax.tree.leaves(jax.tree.map(lambda g: bool(jnp.any(g != 0)), grads)))


def test_a_decoder_needs_either_keys_or_parameters():
    with pytest.raises(ValueError, match="give one of them"):
        layers.Decoder(CONFIG)


def test_a_config_is_imported_without_jax():
    code = "import sys; from jaxlm.nn import Lora, ModelConfig; assert not {'jax', 'flax', 'optax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hope_attention_is_the_function_in_nnx_and_in_linen():
    kind = layers.Hope(theta_scale=0.05, damping="per_pair", learn_gap="head", slopes="learned")
    options = {"num_heads": 4, "num_kv_heads": 2, "positions": kind, "query_key_norm": "head", "use_bias": True}
    module = layers.HoPEAttention(16, **options, attention_sink=True, rngs=nnx.Rngs(0))
    x, segments = jnp.asarray(X), jnp.asarray(SEGMENTS)
    config = module.config
    out = attention(pure(module), x, config, encoding=encoding(config, 6, None, segments), segment_ids=segments)
    assert jnp.array_equal(module(x, segment_ids=segments), out)
    linen = layers.LinenHoPEAttention(16, **options, fields={"attention_sink": True})
    variables = linen.init(jax.random.key(0), x)
    assert list(variables) == ["params"] and shapes(variables["params"]) == shapes(pure(module))
    assert jnp.array_equal(linen.apply({"params": pure(module)}, x, segment_ids=segments), out)


def test_hope_attention_crosses_the_bridge_to_linen():
    bridged = nnx.bridge.to_linen(layers.HoPEAttention, 16, num_heads=2, positions=layers.Hope())
    x = jnp.asarray(X)
    variables = bridged.init(jax.random.key(0), x)
    native = layers.LinenHoPEAttention(16, num_heads=2)
    ours = {name: dict(value) for name, value in variables["params"].items()}
    assert set(variables) == {"params"}
    assert jnp.array_equal(bridged.apply(variables, x), native.apply({"params": ours}, x))


@pytest.mark.parametrize("kind", [layers.Rope(), layers.Alibi(), layers.Hope(learn_gap="layer"), layers.Xpos()])
def test_attention_between_projections_is_the_middle_of_the_whole_layer(kind):
    config = layers.attention_config(16, num_heads=4, num_kv_heads=2, positions=kind)
    whole, middle = layers.Attention(config, rngs=nnx.Rngs(0)), layers.DotProductAttention(config, rngs=nnx.Rngs(0))
    p, x = pure(whole), jnp.asarray(X)
    heads = {"query": 4, "key": 2, "value": 2}
    q, k, v = (dense(p[name], x, 1.0).reshape(2, 6, count, 4) for name, count in heads.items())
    out = dense(p["out"], middle(q, k, v).reshape(2, 6, 16), 1.0)
    assert jnp.array_equal(out, whole(x))
    linen = layers.LinenDotProductAttention(config)
    assert jnp.array_equal(linen.apply(linen.init(jax.random.key(0), q, k, v), q, k, v), middle(q, k, v))
