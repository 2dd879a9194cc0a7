# SPDX-License-Identifier: Apache-2.0
"""Logical axes cover every parameter, and a model laid over devices by them computes what one device computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.nn import Learned, Model, ModelConfig, logical_axes

CONFIG = ModelConfig(
    vocab_size=32, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24, tied=False, attention_bias=True
)
RULES = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "embed": "fsdp"}
EVERYTHING = [
    {},
    {
        "positions": Learned(),
        "norm": "layer",
        "norm_placement": "both",
        "attention_out_bias": True,
        "mlp_bias": True,
        "query_key_norm": "full",
        "tied": True,
    },
    {"gated": False, "norm_placement": "post", "query_key_norm": "head"},
]


def is_axes(x):
    return isinstance(x, tuple)


@pytest.mark.parametrize("changes", EVERYTHING)
def test_axes_name_every_dimension_of_every_leaf(changes):
    model = Model(dataclasses.replace(CONFIG, **changes))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    axes = logical_axes(shapes)
    assert jax.tree.structure(axes, is_leaf=is_axes) == jax.tree.structure(shapes)
    for (path, names), leaf in zip(
        jax.tree.leaves_with_path(axes, is_leaf=is_axes), jax.tree.leaves(shapes), strict=True
    ):
        assert len(names) == leaf.ndim, path
        assert ("layers" in names) == (path[0].key == "blocks"), path
        assert leaf.ndim < 2 or any(name not in (None, "layers") for name in names) or leaf.size < 100, path


def test_a_leaf_without_axes_is_named():
    with pytest.raises(ValueError, match=r"no logical axes for parameter 'blocks/mlp/router/kernel'"):
        logical_axes({"blocks": {"mlp": {"router": {"kernel": np.zeros((2, 3, 4))}}}})
    with pytest.raises(ValueError, match=r"'embed/table' has shape \(3,\)"):
        logical_axes({"embed": {"table": np.zeros(3)}})


def test_a_model_over_eight_devices_equals_one_device():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    seen = []

    def constrain(x, names):
        seen.append(names)
        partition = {"batch": ("data", "fsdp"), "vocab": "tensor"}
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*(partition.get(name) for name in names))))

    one, many = Model(CONFIG), Model(CONFIG, constrain)
    params = jax.jit(one.init)(jax.random.key(0))
    batch = {
        "tokens": np.random.default_rng(0).integers(0, 32, (4, 8)).astype(np.int32),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 2, 2, 0]] * 4, np.int32),
    }

    def loss(model, params, batch):
        return jnp.mean(jnp.sin(model.logits(params, model.apply(params, **batch))))

    def step(model):
        return jax.jit(jax.value_and_grad(lambda p, b: loss(model, p, b)))

    def place(names, x):
        return jax.device_put(x, NamedSharding(mesh, P(*(RULES.get(name) for name in names))))

    expected = step(one)(params, batch)
    spread = jax.tree.map(place, logical_axes(params), params, is_leaf=is_axes)
    rows = jax.device_put(batch, NamedSharding(mesh, P(("data", "fsdp"), None)))
    result = jax.block_until_ready(step(many)(spread, rows))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), result, expected)
    assert set(seen) == {("batch", "length", "embed"), (None, "vocab")}, "the residual stream, and the head"
    assert spread["blocks"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape == (2, 8, 12)
