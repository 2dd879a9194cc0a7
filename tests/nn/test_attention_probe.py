# SPDX-License-Identifier: Apache-2.0
"""Laws of the probe: weights and scores by distance are those of a loop in NumPy over the model's own queries."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import Alibi, Hope, Model, ModelConfig, Nope, Rope, Xpos
from jaxlm.nn.attention import project
from jaxlm.nn.attention_probe import look
from jaxlm.nn.positions import encoding, falloff

CONFIG = ModelConfig(vocab_size=32, width=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=16, norm="rms")
KINDS = {
    "rope": {"positions": Rope(), "attention_softcap": 0.5},
    "alibi": {"positions": Alibi(), "windows": (5,)},
    "xpos": {"positions": Xpos(scale_base=8.0)},
    "hope": {"positions": Hope(theta_scale=0.5, slopes="alibi"), "attention_sink": True},
    "per head": {"positions": Hope(theta_scale=0.5, learn_gap="head", damping="per_pair", rotating=0.5)},
}


def tokens(batch=3, length=12):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, 32)


def by_loops(config, params, tokens, queries):
    """Weights and scores of the first layer by distance, [N, L] each."""
    p = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    x = np.asarray(params["embed"]["table"])[np.asarray(tokens)]
    x = jnp.asarray(x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon))  # the norm's scale is 1
    query, key, _ = (
        np.asarray(x, np.float64) for x in project(p["attention"], x, config, encoding=encoding(config, 12))
    )
    fall = falloff(p["attention"], config)
    rates = np.zeros(8) if fall.rates is None else np.asarray(fall.rates, np.float64)
    slopes = np.zeros(2) if fall.slopes is None else np.asarray(fall.slopes, np.float64)
    B, L, N, H = query.shape
    weight, score, count = np.zeros((N, L)), np.zeros((N, L)), np.zeros(L)
    for b, n, m in np.ndindex(B, N, L):
        if m < L - queries:
            continue
        distances = [d for d in range(m + 1) if d < (config.windows[0] or L)]
        s = [
            np.sum(query[b, m, n] * key[b, m - d, 0] * np.exp(-rates.reshape(-1, H)[0] * d)) / np.sqrt(H)
            for d in distances
        ]
        bent = np.array(s) if config.attention_softcap is None else 0.5 * np.tanh(np.array(s) / 0.5)
        e = np.exp(bent - slopes[n] * np.array(distances))
        total = e.sum() + (np.exp(float(p["attention"]["sink"][n])) if config.attention_sink else 0.0)
        for d, w, x in zip(distances, e, s, strict=True):
            weight[n, d] += w / total / (B * queries)
            score[n, d] += abs(x) / B
            count[d] += n == 0 and b == 0
    return weight, score / np.maximum(count, 1)


@pytest.mark.parametrize("name", KINDS)
def test_the_probe_sees_what_a_loop_sees(name):
    model = Model(dataclasses.replace(CONFIG, **KINDS[name]))
    params = model.init(jax.random.key(0))
    if model.config.attention_sink:
        params["blocks"]["attention"]["sink"] = jnp.array([[0.7, -0.3]])
    seen = look(model, params, tokens(), queries=4)
    weight, score = by_loops(model.config, params, tokens(), queries=4)
    np.testing.assert_allclose(seen.weight[0], weight, atol=1e-6)
    np.testing.assert_allclose(seen.score[0], score, atol=2e-6)


def test_deeper_layers_are_looked_at_as_the_model_reaches_them():
    """Under a first layer that adds nothing the second sees what it would see alone; under another, something else."""
    model = Model(dataclasses.replace(CONFIG, num_layers=2, positions=Rope()))
    params = model.init(jax.random.key(0))
    silent = {"attention": "out", "mlp": "down"}
    blocks = {**params["blocks"]}
    for branch, kernel in silent.items():
        leaf = blocks[branch][kernel]["kernel"]
        blocks[branch] = blocks[branch] | {kernel: {"kernel": leaf.at[0].set(0.0)}}
    alone = params | {"blocks": jax.tree.map(lambda leaf: leaf[1:], params["blocks"])}
    seen = look(model, params | {"blocks": blocks}, tokens(), queries=4)
    wanted = look(Model(dataclasses.replace(model.config, num_layers=1)), alone, tokens(), queries=4)
    np.testing.assert_allclose(seen.weight[1], wanted.weight[0], atol=1e-6)
    moved = look(model, params, tokens(), queries=4)
    assert float(jnp.abs(moved.weight[1] - wanted.weight[0]).max()) > 1e-3


def test_weights_sum_to_one_and_even_attention_is_even():
    model = Model(dataclasses.replace(CONFIG, positions=Nope()))
    params = model.init(jax.random.key(0))
    params["blocks"]["attention"]["query"]["kernel"] *= 0
    seen = look(model, params, tokens(), queries=1)
    np.testing.assert_allclose(seen.weight, 1 / 12, rtol=1e-5)
    assert not np.any(seen.score)


def test_queries_that_are_not_there_are_refused():
    model = Model(CONFIG)
    with pytest.raises(ValueError, match=r"queries must be in \[1, 12\]"):
        look(model, model.init(jax.random.key(0)), tokens(), queries=13)
