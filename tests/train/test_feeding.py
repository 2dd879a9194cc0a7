# SPDX-License-Identifier: Apache-2.0
"""The rows of a batch onto the devices of one process; test_mesh.py looks at those of several."""

import jax
import numpy as np
import pytest

from jaxlm.train.feeding import own_rows, to_devices
from jaxlm.train.mesh import make_mesh, rows
from jaxlm.train.options import MeshOptions


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 8}])
def test_one_process_feeds_all_rows_in_their_order(sizes):
    mesh = make_mesh(MeshOptions(**sizes), devices=jax.devices()[:8])
    assert own_rows(mesh, 24).tolist() == list(range(24))
    value = np.arange(24 * 3).reshape(24, 3).astype(np.float32)
    placed = to_devices(mesh, value)
    np.testing.assert_array_equal(placed, value)
    assert placed.sharding == rows(mesh)
    np.testing.assert_array_equal(to_devices(mesh, jax.numpy.asarray(value)), value)


def test_rows_that_devices_do_not_divide_are_refused():
    mesh = make_mesh(MeshOptions(data=8), devices=jax.devices()[:8])
    with pytest.raises(ValueError, match="12 rows are not a positive multiple of 8 devices"):
        own_rows(mesh, 12)
    for count in (12, 0):
        with pytest.raises(ValueError, match=f"{count} rows on a process whose devices hold 8 equal parts"):
            to_devices(mesh, np.zeros((count, 2)))
