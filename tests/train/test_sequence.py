# SPDX-License-Identifier: Apache-2.0
"""Laws of rows whose tokens lie on several devices: the same numbers, no more exchanged than keys and values."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.losses.next_token import next_token_terms
from jaxlm.nn.attention import attend
from jaxlm.nn.config import Lora
from jaxlm.nn.decoder import Model
from jaxlm.nn.lora import adapted, add_lora, merge_drift
from jaxlm.nn.position_kinds import Alibi, Hope
from jaxlm.train.held_out import score_items
from jaxlm.train.mesh import constrainer, loss_groups, make_mesh
from jaxlm.train.options import MeshOptions
from jaxlm.train.phase import Phase
from jaxlm.train.pieces import make_pieces
from jaxlm.train.step import make_train_step

LENGTH, ROWS = 64, 4
TOLERANCE = 1e-5  # of a leaf's largest entry: sums in another order


def mesh_of(**sizes):
    return make_mesh(MeshOptions(**{"data": 1} | sizes), devices=jax.devices()[: math.prod(sizes.values())])


def divided(config, mesh):
    return Model(config, constrainer(mesh), loss_groups(mesh), make_pieces(mesh))


def packed(seed, rows=ROWS, length=LENGTH):
    """Three segments a row, whose borders lie anywhere, so that they reach across cuts, and some padding."""
    draw = np.random.default_rng(seed)
    batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "positions", "segment_ids", "task_ids")}
    batch["tokens"][:] = draw.integers(0, 64, (rows, length))
    batch["task_ids"][:] = np.arange(rows)[:, None] % 2
    for row in range(rows):
        borders = np.sort(draw.choice(np.arange(1, length - 4), 2, replace=False))
        for segment, (begin, end) in enumerate(zip([0, *borders], [*borders, length - 3], strict=True)):
            batch["segment_ids"][row, begin:end] = segment + 1
            batch["positions"][row, begin:end] = np.arange(end - begin)
    batch["loss_weights"] = (draw.random((rows, length)) < 0.7).astype(np.float32)
    return batch


def loss_fn_of(model):
    def loss_fn(params, batch, rng):
        hidden = model.apply(params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        return next_token_terms(hidden, model.head(params), batch, num_tasks=2, groups=model.row_groups)

    return loss_fn


@functools.cache
def whole_gradient(config, length):
    """Parameters, a batch, and its loss and gradients on one device."""
    params, batch = Model(config).init(jax.random.key(0)), packed(1, length=length)
    return params, batch, gradient(Model(config), params, batch)


def gradient(model, params, batch):
    def loss(params):
        term = loss_fn_of(model)(params, batch, None)["loss"]
        return term.total / term.weight

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_near(tree, other, tolerance=TOLERANCE):
    def near(path, x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.max(np.abs(x - y), initial=0) <= tolerance * np.max(np.abs(y), initial=1e-3), path

    jax.tree.map_with_path(near, tree, other)


LEARNED = Hope(learn_gap="head", gap_max=0.1, slopes="learned")


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({}, {"sequence": 2, "fsdp": 2, "tensor": 2}),
        ({"windows": (12, None), "attention_softcap": 5.0, "attention_sink": True}, {"sequence": 4, "fsdp": 2}),
        ({"positions": LEARNED}, {"sequence": 4}),
        ({"positions": LEARNED, "attention": "tiled"}, {"sequence": 2, "tensor": 4}),
        ({"positions": Alibi(), "remat": "dots"}, {"data": 2, "sequence": 3}),
    ],
    ids=["rope", "windows, cap and sink", "hope folded", "hope in tiles, heads copied", "alibi, three pieces"],
)
def test_divided_tokens_give_the_loss_and_the_gradients_of_whole_rows(tiny, fields, sizes):
    config = dataclasses.replace(tiny.config, **fields)
    whole = dataclasses.replace(config, attention="auto", remat="none")
    params, batch, expected = whole_gradient(whole, 48 if sizes["sequence"] == 3 else LENGTH)
    assert_near(gradient(divided(config, mesh_of(**sizes)), params, batch), expected)


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_pieces_see_equally_many_keys_and_join_to_the_rows_they_were(count):
    pieces = make_pieces(mesh_of(sequence=count))
    positions = np.arange(2 * 48, dtype=np.int32).reshape(2, 48) % 48
    cut = pieces.cut(positions)
    seen = {int(np.sum(np.asarray(shard.data)[0] + 1)) for shard in cut.addressable_shards}
    assert len(seen) == 1 and len(cut.addressable_shards) == count, "keys under the diagonal, of each device"
    np.testing.assert_array_equal(pieces.join(cut), positions)


def plain_attention(query, key, value, segments, *, rates, slopes, sink, window, softcap):
    """The formula in float64, one query after the other; a key head for every query head."""
    L, heads, width = query.shape
    out = np.zeros(query.shape)
    for n in range(heads):
        for i in range(L):
            j = np.arange(max(0, i - window + 1), i + 1)
            j = j[segments[j] == segments[i]]
            fade = np.exp(-rates[n] * (i - j)[:, None])
            scores = softcap * np.tanh((key[j, n] * fade) @ query[i, n] / width**0.5 / softcap) - slopes[n] * (i - j)
            weights = np.exp(scores)
            out[i, n] = weights @ value[j, n] / (weights.sum() + np.exp(sink[n]))
    return out


@pytest.mark.parametrize("implementation", ["auto", "tiled"])
def test_attention_across_the_cuts_is_the_formula(implementation):
    """Chunks of several tiles, rates folded and from tile to tile."""
    L, N, H = 768, 2, 4
    draw = np.random.default_rng(0)
    query, key, value = draw.normal(size=(3, 1, L, N, H))
    segments = np.repeat([1, 2, 3], [100, 415, 253])
    rates = draw.uniform(0, 0.1, (N, H))
    slopes, sink = draw.uniform(0, 0.01, (2, N))
    numbers = {"rates": rates, "slopes": slopes, "sink": sink}
    pieces = make_pieces(mesh_of(sequence=2, tensor=2))

    def across(query, key, value, numbers):
        cut = (pieces.cut(x) for x in (query, key, value))
        options = {"window": 300, "softcap": 3.0, "max_rate": 0.1, "implementation": implementation}
        return pieces.join(attend(*cut, segment_ids=jnp.asarray(segments)[None], pieces=pieces, **options, **numbers))

    arrays = jax.tree.map(jnp.float32, (query, key, value, numbers))
    expected = plain_attention(query[0], key[0], value[0], segments, window=300, softcap=3.0, **numbers)
    np.testing.assert_allclose(jax.jit(across)(*arrays)[0], expected, atol=2e-5)


def train_step(tiny, config, sizes, params, batch, *, parts=1):
    mesh = mesh_of(**sizes)
    model = divided(config, mesh)
    tx = optax.sgd(0.1)  # adaptive ones hide wrong scales and magnify rounding
    state, places = tiny.start(tx, mesh, params)
    step = make_train_step(Phase(loss_fn_of(model), tx), mesh=mesh, shardings=places, num_parts=parts)
    return step, state


def test_a_whole_step_moves_parameters_as_on_one_device(tiny):
    lora = Lora(rank=2)
    config = adapted(Model(tiny.config), lora).config
    params = add_lora(Model(config).init(jax.random.key(0)), lora, jax.random.key(1))
    batch = packed(2)
    found = []
    for sizes, parts in (({}, 1), ({"sequence": 2, "fsdp": 2}, 2)):
        step, state = train_step(tiny, config, sizes, params, batch, parts=parts)
        state, metrics = step(state, batch)
        metrics = {name: metrics[name] for name in ("loss", "accuracy", "loss_by_task", "gradient_norm", "tokens")}
        found.append(jax.device_get((state.params, metrics)))
    assert_near(*found)
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(found[0][0]), jax.tree.leaves(params), strict=True))


def test_held_out_records_score_as_on_whole_rows(tiny):
    mesh = mesh_of(sequence=2, data=2)
    params = Model(tiny.config).init(jax.random.key(0))
    batches = [packed(3)]
    whole, cut = (
        score_items(Model(tiny.config), params, batches),
        score_items(divided(tiny.config, mesh), params, batches, mesh),
    )
    assert np.array_equal(whole.task_ids, cut.task_ids) and np.array_equal(whole.correct, cut.correct)
    assert_near(cut.nll, whole.nll)


def test_decoding_with_a_cache_has_whole_rows(tiny):
    model = divided(tiny.config, mesh_of(sequence=4))
    params, tokens = model.init(jax.random.key(0)), jnp.asarray(packed(4)["tokens"][:, :17])
    hidden, cache = model.prefill(params, tokens[:, :16], size=32)
    hidden, _ = model.extend(params, tokens[:, 16:], cache)
    expected = Model(tiny.config).apply(params, tokens)[:, -1:]
    assert_near(hidden, expected)


def test_a_merge_is_looked_at_on_tokens_that_cannot_be_cut(tiny):
    model, tokens = divided(tiny.config, mesh_of(sequence=4)), jnp.asarray(packed(5)["tokens"][:, :7])
    params = model.init(jax.random.key(0))
    assert merge_drift(model, params, params, tokens) == 0
