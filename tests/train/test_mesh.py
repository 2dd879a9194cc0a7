# SPDX-License-Identifier: Apache-2.0
"""The mesh: sizes that fit the devices, and a place for every parameter."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlm.train.mesh import across_slices, check_rows, constrainer, make_mesh, reach, shardings, spec
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.options import AdamW, MeshOptions
from jaxlm.train.state import state_shardings
from jaxlm.transforms.frozen import freeze


def test_one_axis_takes_what_is_left():
    mesh = make_mesh(MeshOptions(fsdp=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "sequence": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MeshOptions(data=3), "data=3, fsdp=1, sequence=1, tensor=1 needs 3 devices, but there are 8: change"),
        (MeshOptions(fsdp=3), "a multiple of 3 devices, but there are 8"),
        (MeshOptions(fsdp=16), "a multiple of 16 devices, but there are 8"),
        (MeshOptions(data=-1, fsdp=-1), "at most one is -1"),
        (MeshOptions(data=0), "mesh sizes are positive"),
    ],
)
def test_a_mesh_that_does_not_match_the_devices_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(options)


def test_a_mesh_axis_serves_the_first_dimension_that_asks():
    assert spec(("batch", "length", "embed")) == P(("data", "fsdp"), None, None)
    assert spec(("mlp", "vocab")) == P("tensor", None)
    with pytest.raises(ValueError, match="unknown logical axis 'emb'"):
        spec(("emb",))


def test_a_dimension_that_the_mesh_does_not_divide_is_refused_by_path():
    mesh = make_mesh(MeshOptions(data=1, fsdp=8))
    shapes = {"blocks": {"up": {"kernel": jax.ShapeDtypeStruct((2, 12, 16), jnp.float32)}}}
    axes = {"blocks": {"up": {"kernel": ("layers", "embed", "mlp")}}}
    with pytest.raises(ValueError, match=r"blocks/up/kernel has 12 entries along 'embed', .* 8 devices .* 'fsdp'"):
        shardings(mesh, axes, shapes)
    with pytest.raises(ValueError, match=r"blocks/up/kernel has shape \(2, 12, 16\) but the logical axes"):
        shardings(mesh, {"blocks": {"up": {"kernel": ("embed",)}}}, shapes)


def test_rows_must_be_divided_evenly():
    mesh = make_mesh(MeshOptions(data=2, fsdp=2, tensor=2))
    check_rows(mesh, 16, 4)
    with pytest.raises(ValueError, match=r"batch_size 18 is not .* of 8: 4 devices .* 2 micro_batches.* 16 and 24"):
        check_rows(mesh, 18, 2)
    with pytest.raises(ValueError, match="micro_batches must be at least 1, got 0"):
        check_rows(mesh, 16, 0)


def test_the_constrainer_divides_rows():
    mesh = make_mesh(MeshOptions(data=4, fsdp=2))
    x = jax.jit(lambda x: constrainer(mesh)(x, ("batch", "length", "embed")))(np.zeros((8, 4, 2), np.float32))
    assert {s.data.shape for s in x.addressable_shards} == {(1, 4, 2)}
    one = make_mesh(MeshOptions(), devices=jax.devices()[:1])
    assert constrainer(one)(x, ("batch", "length", "embed")) is x


def test_slices_take_the_first_axes():
    assert across_slices((4, 8, 1, 2), 4) == (4, 1, 1, 1)
    assert across_slices((6, 8, 1, 2), 4) == (2, 2, 1, 1)
    assert across_slices((1, 1, 1, 8), 2) == (1, 1, 1, 2)
    with pytest.raises(
        ValueError, match=r"data=6, fsdp=1, sequence=1, tensor=1 cannot be cut into 4 slices.* mesh.data a multiple"
    ):
        across_slices((6, 1, 1, 1), 4)


@pytest.mark.parametrize("count", [2, 4])
def test_neighbours_along_fsdp_lie_on_one_process_wherever_they_fit(pods, tmp_path, count):
    codes, said = pods.wait(pods.start(tmp_path, "layout", count=count, devices=8 // count), 240)
    assert codes == [0] * count, said
    for sizes, (places, far, as_slices, fed) in json.loads((tmp_path / "layout.json").read_text()).items():
        fsdp, tensor = map(int, sizes.split(","))
        fits = fsdp * tensor <= 8 // count
        assert all(len(set(line)) == 1 for line in places) == fits, (sizes, places)
        assert not fits or far["fsdp"] == far["tensor"] == "process"
        assert as_slices, "where a process is a slice, the mesh is the same one"
        assert far["data"] == ("slice" if fsdp * tensor < 8 else "process")
        # Every row is fed by some process, in the order of the batch; by several only where they share its work.
        assert sorted({row for rows in fed for row in rows}) == list(range(16))
        assert sum(map(len, fed)) == 16 * max(1, tensor * count // 8)
    assert set(reach(make_mesh(MeshOptions(fsdp=2))).values()) == {"process"}


@pytest.mark.parametrize(
    "tx",
    [
        make_optimizer(AdamW(weight_decay=0.1), 10),
        freeze(make_optimizer(AdamW(), 10), [("up/.*", "trained"), (".*", "frozen")]),
        optax.adafactor(1e-3, min_dim_size_to_factor=8),
    ],
    ids=["adamw", "frozen", "adafactor"],
)
def test_optimizer_state_lies_where_its_parameter_lies(tx):
    mesh = make_mesh(MeshOptions(data=1, fsdp=8))
    params = {"up": {"kernel": jnp.ones((16, 32))}, "embed": {"table": jnp.ones((8, 16))}}
    axes = {"up": {"kernel": ("embed", "mlp")}, "embed": {"table": ("vocab", "embed")}}
    places = state_shardings(tx, params, shardings(mesh, axes, params), mesh).opt_state
    state = jax.jit(tx.init, out_shardings=places)(params)
    for leaf in jax.tree.leaves(state):
        whole = {(16, 32): (2, 32), (8, 16): (8, 2)}.get(leaf.shape, leaf.shape)
        assert leaf.addressable_shards[0].data.shape == whole
