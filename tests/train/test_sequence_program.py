# SPDX-License-Identifier: Apache-2.0
"""Laws of programs that divide tokens: what they exchange, what they hold, and what they refuse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from jaxlm.losses.next_token import next_token_terms
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import Model
from jaxlm.plan.hlo import read_program
from jaxlm.train.mesh import check_length, constrainer, loss_groups, make_mesh
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.options import AdamW, MeshOptions
from jaxlm.train.phase import Phase
from jaxlm.train.pieces import make_pieces
from jaxlm.train.step import make_train_step

# Parameters smaller than activations: every large array that a collective moves tells by its size what it is.
SMALL = ModelConfig(
    vocab_size=32, width=32, num_layers=3, num_heads=4, num_kv_heads=2, mlp_width=32, tied=False, attention="tiled"
)
ROWS, LENGTH = 2, 4096


def mesh_of(sequence, fsdp=1, tensor=1):
    options = MeshOptions(data=1, fsdp=fsdp, sequence=sequence, tensor=tensor)
    return make_mesh(options, devices=jax.devices()[: fsdp * sequence * tensor])


def divided(config, mesh):
    return Model(config, constrainer(mesh), loss_groups(mesh), make_pieces(mesh))


@functools.cache
def compiled_step(shapes, sequence, fsdp=1):
    mesh = mesh_of(sequence, fsdp)
    model, tx = divided(SMALL, mesh), make_optimizer(AdamW(), 10)

    def loss_fn(params, batch, rng):
        hidden = model.apply(params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        return next_token_terms(hidden, model.head(params), batch, num_tasks=1, groups=model.row_groups)

    state, places = shapes(tx, mesh, jax.eval_shape(model.init, jax.random.key(0)))
    step = make_train_step(Phase(loss_fn, tx), mesh=mesh, shardings=places)
    dtypes = dict.fromkeys(("tokens", "positions", "segment_ids", "task_ids"), jnp.int32) | {
        "loss_weights": jnp.float32
    }
    return step.lower(state, {name: jax.ShapeDtypeStruct((ROWS, LENGTH), dtypes[name]) for name in dtypes}).compile()


@pytest.mark.parametrize(("sequence", "fsdp"), [(4, 1), (2, 2)])
def test_only_keys_and_values_of_whole_rows_are_gathered(tiny, sequence, fsdp):
    program = read_program(compiled_step(tiny.shapes, sequence, fsdp).as_text())
    size = Model(SMALL).num_parameters(jax.eval_shape(Model(SMALL).init, jax.random.key(0))) * 4
    rows, layers, kv_width = ROWS // fsdp, SMALL.num_layers, 16
    large = [one for one in program.collectives if one.payload > size and one.size > 1]
    sent = {
        kind: (sum(x.times for x in large if x.kind == kind), {x.payload for x in large if x.kind == kind})
        for kind in {x.kind for x in large}
    }
    keys, half_a_piece = rows * LENGTH * kv_width * 4, rows * LENGTH // sequence // 2 * SMALL.width * 4
    assert sent == {
        "all-gather": (layers * 2 * 2, {keys}),  # keys and values, forwards and again backwards
        "reduce-scatter": (layers * 2, {keys}),
        "collective-permute": (4, {half_a_piece}),  # hidden states back in their order, and their gradients
    }


def test_activations_of_a_device_shrink_with_the_axis(tiny):
    one, two, four = (
        compiled_step(tiny.shapes, *sizes).memory_analysis().temp_size_in_bytes for sizes in ((1,), (2, 2), (4,))
    )
    # Of keys and values a device holds those of whole rows, one layer's at a time.
    assert four < one / 3 and two < one / 3, (one, two, four)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (30, "mesh.sequence=4, which needs a multiple of 8 .* data.length to 24 or 32, or another mesh.sequence"),
        (1096, "a multiple of 512 .* data.length to 1024 or 1536"),
    ],
)
def test_lengths_that_cannot_be_cut_are_refused_with_those_that_can(length, message):
    mesh = mesh_of(4)
    with pytest.raises(ValueError, match=message):
        check_length(mesh, length)
    check_length(mesh, 1024), check_length(mesh, 24), check_length(mesh_of(1), length)


@pytest.mark.parametrize(
    ("fields", "sizes", "message"),
    [
        ({"attention": "pallas"}, (2,), "'pallas' cannot attend across mesh.sequence=2: use 'auto' or"),
        ({"attention": "xla"}, (2,), "'xla' cannot attend across"),
        ({"num_heads": 2, "width": 8}, (2, 1, 4), "2 query heads and 2 key heads cannot be divided"),
    ],
)
def test_what_cannot_attend_across_cuts_is_refused_before_compiling(tiny, fields, sizes, message):
    config = dataclasses.replace(tiny.config, **fields)
    model = divided(config, mesh_of(*sizes))
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.apply, params, jax.ShapeDtypeStruct((4, 64), jnp.int32))
