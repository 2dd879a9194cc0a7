# SPDX-License-Identifier: Apache-2.0
"""Which rows of a batch a process feeds, and how they come onto its devices.

A batch is one list of rows, the same for any number of processes. Each process takes those that its devices hold, in
their order, so that every row lies where it would lie with one process. Where tensor reaches across processes, several
of them take the same rows.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.train.mesh import row_devices, rows


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Indices, increasing, of the rows of a batch that this process's devices hold: int64 [R].

    Args:
      mesh: of all processes.
      batch_size: rows over all of them.
    Raises: ValueError when the devices do not divide the rows.

    >>> from jaxlm.train.mesh import make_mesh
    >>> from jaxlm.train.options import MeshOptions
    >>> own_rows(make_mesh(MeshOptions()), 8)
    array([0, 1, 2, 3, 4, 5, 6, 7])
    """
    if batch_size < 1 or batch_size % row_devices(mesh):
        raise ValueError(f"{batch_size} rows are not a positive multiple of {row_devices(mesh)} devices that hold rows")
    held = rows(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held.values()]))


def to_devices(mesh: Mesh, value: Any) -> jax.Array:
    """One entry of a batch, divided over the mesh.

    Args:
      mesh: of all processes.
      value: `[R, ...]` on the host, the rows of `own_rows`; or a jax array of all rows, which is moved if need be.
    Returns: `[batch, ...]`.
    Raises: ValueError when the devices of this process do not divide the rows.
    """
    place = rows(mesh)
    if isinstance(value, jax.Array):
        return jax.device_put(value, place)
    value, blocks = np.asarray(value), own_rows(mesh, row_devices(mesh))
    if not len(value) or len(value) % len(blocks):
        raise ValueError(f"{len(value)} rows on a process whose devices hold {len(blocks)} equal parts of them")
    each = len(value) // len(blocks)
    mine = np.repeat(blocks * each, each) + np.tile(np.arange(each), len(blocks))

    def of(index: Any) -> np.ndarray:
        first, end, _ = index[0].indices(each * row_devices(mesh))
        begin = int(np.searchsorted(mine, first))
        return value[(slice(begin, begin + end - first), *index[1:])]

    return jax.make_array_from_callback((each * row_devices(mesh), *value.shape[1:]), place, of)
