# SPDX-License-Identifier: Apache-2.0
"""Adapters start as nothing, merge to the same function, and refuse what they cannot stand beside."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import Lora, Model, ModelConfig, adapted, add_lora, logical_axes, merge_drift, merge_lora

CONFIG = ModelConfig(vocab_size=32, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24, tied=False)
LORA = Lora(rank=3, alpha=6.0)
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


@functools.cache
def start(lora=LORA):
    model = adapted(Model(CONFIG), lora)
    params = jax.jit(model.init)(jax.random.key(0))
    return model, params, add_lora(params, lora, jax.random.key(1))


def shapes(**changes):
    return jax.eval_shape(Model(dataclasses.replace(CONFIG, **changes)).init, jax.random.key(0))


def trained(params):
    """Every adapter moved away from zero."""

    def move(path, x):
        return x + 0.1 * jax.random.normal(jax.random.key(len(path)), x.shape) if "lora_b" in str(path[-1]) else x

    return jax.tree.map_with_path(move, params)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    return model.logits(params, model.apply(params, jnp.asarray(TOKENS)))


def test_adapters_start_as_the_identity():
    model, params, with_adapters = start()
    np.testing.assert_allclose(logits(model, params), logits(model, with_adapters), atol=2e-6)


def test_adapters_leave_the_other_leaves_as_they_are():
    _, params, with_adapters = start()
    for path, leaf in jax.tree.leaves_with_path(params):
        there = with_adapters
        for key in path:
            there = there[key.key]
        assert there is leaf, path


@pytest.mark.parametrize("targets", [LORA.targets, (*LORA.targets, "head")])
def test_merging_changes_logits_by_at_most_1e_5(targets):
    lora = dataclasses.replace(LORA, targets=targets)
    model, params, with_adapters = start(lora)
    moved = trained(with_adapters)
    merged = merge_lora(moved, lora.scale)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    assert float(jnp.max(jnp.abs(logits(model, params) - logits(model, moved)))) > 0.05
    drift = float(merge_drift(model, moved, merged, jnp.asarray(TOKENS)))
    assert drift <= 1e-5
    assert drift == float(jnp.max(jnp.abs(logits(model, moved) - logits(model, merged))))


def test_merging_is_kernel_plus_scaled_product_layer_by_layer():
    _, _, with_adapters = start()
    moved = trained(with_adapters)
    p = moved["blocks"]["mlp"]["down"]
    merged = merge_lora(moved, LORA.scale)["blocks"]["mlp"]["down"]["kernel"]
    for layer in range(2):
        expected = p["kernel"][layer] + 2.0 * np.asarray(p["lora_a"][layer]) @ np.asarray(p["lora_b"][layer])
        np.testing.assert_allclose(merged[layer], expected, atol=1e-6)


def test_gradients_reach_both_factors():
    model, _, with_adapters = start()
    grads = jax.jit(jax.grad(lambda p: jnp.mean(jnp.square(logits(model, p)))))(trained(with_adapters))
    for path, leaf in jax.tree.leaves_with_path(grads):
        if "lora" in str(path[-1]):
            assert jnp.all(jnp.any(leaf != 0, axis=(1, 2))), path


def test_add_lora_is_pure_and_can_be_compiled():
    _, params, with_adapters = start()
    compiled = jax.jit(lambda p, key: add_lora(p, LORA, key))(params, jax.random.key(1))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), compiled, with_adapters)


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        ("embed", {}, "embed/table is refused"),
        ("embed/table", {"tied": True}, "embed/table is refused"),
        (".*", {}, "embed/table is refused"),
        ("head", {"tied": True}, "names the head, tied to embed/table"),
        ("blocks/mlp/gates", {}, "'blocks/mlp/gates' matches no kernel; there are .*blocks/mlp/gate'"),
        ("blocks/attention_norm", {}, "matches no kernel"),
    ],
)
def test_a_target_without_a_kernel_is_refused_by_name(target, changes, message):
    with pytest.raises(ValueError, match=message):
        add_lora(shapes(**changes), Lora(targets=(LORA.targets[0], target)), jax.random.key(1))


def test_an_adapter_on_the_table_is_not_merged():
    params = shapes(tied=True)
    a, b = jnp.zeros((32, 2)), jnp.zeros((2, 16))
    params["embed"] |= {"lora_a": a, "lora_b": b}
    with pytest.raises(ValueError, match="embed/table is refused"):
        merge_lora(params, 1.0)


def test_adding_twice_and_merging_nothing_are_refused():
    _, params, with_adapters = start()
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(with_adapters, LORA, jax.random.key(0))
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge_lora(params, 1.0)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        add_lora(params, Lora(rank=0), jax.random.key(0))


def test_every_adapter_has_logical_axes():
    _, _, with_adapters = start(dataclasses.replace(LORA, targets=(*LORA.targets, "head")))
    axes = logical_axes(with_adapters)
    assert axes["blocks"]["attention"]["key"]["lora_b"] == ("layers", "rank", "kv_heads")
    assert axes["head"]["lora_a"] == ("embed", "rank")
