# SPDX-License-Identifier: Apache-2.0
"""Laws of the whole decoder, for every setting that a family uses.  T tokens, D width."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import Learned, Model, ModelConfig

BASE = ModelConfig(vocab_size=32, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24, max_length=16)
FAMILIES = {
    "llama": {"tied": False},
    "gpt2": {
        "positions": Learned(),
        "norm": "layer",
        "gated": False,
        "activation": "gelu_tanh",
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "num_kv_heads": None,
    },
    "gemma2": {
        "windows": (3, None),
        "norm_placement": "both",
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
        "embedding_scale": 4.0,
        "attention_softcap": 5.0,
        "logit_softcap": 3.0,
        "attention_scale": 0.3,
        "head_width": 6,
    },
    "olmo2": {"norm_placement": "post", "query_key_norm": "full"},
    "qwen3": {"query_key_norm": "head", "windows": (5,)},
}
T = 12


@functools.cache
def start(family="llama", **changes):
    """A model and parameters in which no scale is 1 and no bias is 0."""
    model = Model(dataclasses.replace(BASE, **(FAMILIES[family] | changes)))

    def params(key):
        leaves, tree = jax.tree.flatten(model.init(key))
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(
            tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        )

    return model, jax.jit(params)(jax.random.key(0))


def tokens_of(*lengths, seed=0):
    return [np.random.default_rng(seed + i).integers(0, 32, n).astype(np.int32) for i, n in enumerate(lengths)]


@functools.partial(jax.jit, static_argnums=0)
def compiled_logits(model, params, given):
    return model.logits(params, model.apply(params, **given))


def logits_of(model, params, tokens, **given):
    return compiled_logits(model, params, {"tokens": jnp.asarray(tokens)} | jax.tree.map(jnp.asarray, given))


def packed(*texts, left=0):
    """One row of texts after `left` padding tokens, padded to T."""
    row = {name: np.zeros((1, T), np.int32) for name in ("tokens", "segment_ids", "positions")}
    at = left
    for i, text in enumerate(texts):
        row["tokens"][0, at : at + len(text)] = text
        row["segment_ids"][0, at : at + len(text)] = i + 1
        row["positions"][0, at : at + len(text)] = range(len(text))
        at += len(text)
    return row


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_depend_only_on_the_past_and_on_all_of_it(family):
    model, params = start(family)
    table = params["embed"]["table"][jnp.asarray(tokens_of(T)[0])]
    t = 7

    def total(x_TD):
        return jnp.sum(jnp.sin(model.apply({**params, "embed": {"table": x_TD}}, jnp.arange(T)[None])[0, t]))

    felt = jnp.linalg.norm(jax.jit(jax.grad(total))(table), axis=-1)
    assert jnp.all(felt[t + 1 :] == 0)
    reach = 2 * (5 - 1) if family == "qwen3" else t  # two layers of a window of 5
    assert jnp.all(felt[t - min(reach, t) : t + 1] > 0)


def test_a_stack_of_windows_reaches_exactly_as_far_as_their_sum():
    model, params = start(num_layers=3, windows=(3, 2))  # 3, 2, 3: one token reaches 2 + 1 + 2 back
    table = params["embed"]["table"][jnp.asarray(tokens_of(T)[0])]

    def total(x_TD):
        return jnp.sum(jnp.sin(model.apply({**params, "embed": {"table": x_TD}}, jnp.arange(T)[None])[0, 9]))

    felt = jnp.linalg.norm(jax.jit(jax.grad(total))(table), axis=-1)
    assert [i for i in range(T) if felt[i] > 0] == list(range(9 - 5, 9 + 1))


def test_windows_of_the_whole_row_equal_none():
    model, params = start()
    tokens = tokens_of(T)[0][None]
    wide = dataclasses.replace(model, config=dataclasses.replace(model.config, windows=(T, None)))
    assert jnp.array_equal(logits_of(model, params, tokens), logits_of(wide, params, tokens))


@pytest.mark.parametrize(("family", "left"), [*((family, 0) for family in FAMILIES), ("gemma2", 2)])
def test_packed_equals_unpacked(family, left):
    model, params = start(family)
    texts = tokens_of(4, 4)
    together = logits_of(model, params, **packed(*texts, left=left))
    assert jnp.all(jnp.isfinite(together)), "padding rows must be finite"
    alone = logits_of(model, params, np.stack(texts))
    np.testing.assert_allclose(together[0, left : left + 8], alone.reshape(8, -1), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_changing_one_segment_leaves_its_neighbours_bit_identical(family):
    model, params = start(family)
    first, second, third = tokens_of(3, 4, 3)
    before = packed(first, second, third)
    after = packed(first, (second + 5) % 32, third)
    x, y = (np.asarray(logits_of(model, params, **row)) for row in (before, after))
    beside = before["segment_ids"] != 2
    assert np.array_equal(x[beside].view(np.int32), y[beside].view(np.int32))
    assert (x[~beside] != y[~beside]).any(-1).all()


def test_gradients_of_a_packed_row_are_those_of_its_texts():
    model, params = start()
    texts = tokens_of(4, 4)

    def total(params, keep, **given):
        logits = model.logits(params, model.apply(params, **given))
        return jnp.sum(jnp.where(keep[:, :, None], jnp.sin(logits), 0.0))

    row = jax.tree.map(jnp.asarray, packed(*texts))
    together = jax.jit(jax.grad(total))(params, row["segment_ids"] > 0, **row)
    alone = jax.jit(jax.grad(total))(params, jnp.ones((2, 4), bool), tokens=jnp.asarray(np.stack(texts)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5), together, alone)


def loss_of(model, params):
    tokens = jnp.asarray(np.stack(tokens_of(T, T)))
    return jnp.mean(jnp.sin(model.logits(params, model.apply(params, tokens))))


@pytest.mark.parametrize(("remat", "family"), [("full", "gemma2"), ("dots", "llama")])
def test_remat_keeps_less_and_gives_the_same_loss_and_gradients(remat, family):
    model, params = start(family)
    again = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=remat))
    results = [jax.jit(jax.value_and_grad(functools.partial(loss_of, m)))(params) for m in (model, again)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *results)

    def kept(m):
        pull = jax.eval_shape(lambda p: jax.vjp(functools.partial(loss_of, m), p)[1], params)
        return sum(x.size for x in jax.tree.leaves(pull))

    assert kept(again) < kept(model)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_is_close_to_float32_and_gradients_stay_float32(family):
    model, params = start(family)
    narrow = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype="bfloat16"))
    row = packed(*tokens_of(4, 4))
    exact, rough = logits_of(model, params, **row), logits_of(narrow, params, **row)
    assert rough.dtype == jnp.float32
    assert float(jnp.max(jnp.abs(exact - rough))) < 0.1 * float(jnp.max(jnp.abs(exact)))
    hidden = jax.eval_shape(lambda p: narrow.apply(p, jnp.asarray(row["tokens"])), params)
    assert hidden.dtype == jnp.bfloat16
    grads = jax.eval_shape(jax.grad(functools.partial(loss_of, narrow)), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_the_program_does_not_grow_with_depth():
    def lines(num_layers, **changes):
        model = Model(dataclasses.replace(BASE, num_layers=num_layers, **changes))
        params = jax.eval_shape(model.init, jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
        lowered = jax.jit(jax.grad(lambda p, t: jnp.sum(model.apply(p, t)))).lower(params, tokens)
        return len(lowered.as_text().splitlines())

    assert lines(32) == lines(4)
    assert lines(32, windows=(3, None)) == lines(4, windows=(3, None))
    assert lines(32, remat="dots") == lines(4, remat="dots")


def test_a_seed_names_its_parameters_and_they_start_quietly():
    model = Model(dataclasses.replace(BASE, **FAMILIES["gemma2"]))
    init = jax.jit(model.init)
    params, again, other = init(jax.random.key(3)), init(jax.random.key(3)), init(jax.random.key(4))
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, params, again)))
    assert not jnp.array_equal(params["embed"]["table"], other["embed"]["table"])
    assert float(jnp.std(logits_of(model, params, **packed(*tokens_of(4, 4))))) < 3


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_float32_and_counted_once(family):
    model, params = start(family)
    assert model.num_parameters(params) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert ("head" in params) != model.config.tied


def test_the_head_is_the_table_when_tied_and_its_cap_is_in_the_logits_only():
    model, params = start("gemma2")
    assert jnp.array_equal(model.head(params), params["embed"]["table"].T)
    hidden = model.apply(params, jnp.asarray(tokens_of(T)[0])[None])
    plain = hidden @ model.head(params)
    np.testing.assert_allclose(model.logits(params, hidden), 3 * jnp.tanh(plain / 3), atol=1e-5)


def test_the_embedding_scale_multiplies_the_table_and_is_rounded_to_the_compute_dtype():
    model, params = start("llama", embedding_scale=4.03)  # untied: the head stays
    row = packed(*tokens_of(4, 4))
    plain, _ = start("llama")
    scaled = {**params, "embed": {"table": 4.03 * params["embed"]["table"]}}
    np.testing.assert_allclose(logits_of(model, params, **row), logits_of(plain, scaled, **row), atol=1e-5)

    def embedded(scale, dtype):
        config = dataclasses.replace(model.config, embedding_scale=scale, dtype=dtype, num_layers=0)
        empty = {**params, "blocks": jax.tree.map(lambda x: x[:0], params["blocks"])}
        return Model(config).apply(empty, jnp.asarray(row["tokens"]))

    rounded = float(jnp.bfloat16(4.03))
    assert rounded != 4.03
    assert jnp.array_equal(embedded(4.03, "bfloat16"), embedded(rounded, "bfloat16"))


def test_rows_longer_than_the_learned_positions_are_refused():
    model, params = start("gpt2")
    with pytest.raises(ValueError, match="17 tokens exceed the 16 learned positions"):
        model.apply(params, jnp.zeros((1, 17), jnp.int32))


def test_a_token_outside_the_vocabulary_gives_nan_rather_than_another_token():
    model, params = start()
    logits = logits_of(model, params, np.array([[1, 2, 40], [1, 2, 3]], np.int32))
    assert jnp.all(jnp.isnan(logits[0, 2])) and jnp.all(jnp.isfinite(logits[1]))
