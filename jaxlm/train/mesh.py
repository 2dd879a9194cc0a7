# SPDX-License-Identifier: Apache-2.0
"""Devices as a mesh, and the one table that says which mesh axis divides which logical axis."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.train.options import MeshOptions
from jaxlm.weights.names import path_of

# The more an axis sends, the nearer its neighbours: tensor sends activations several times a layer, sequence keys and
# values, fsdp kernels, data gradients once a step.
AXES = ("data", "fsdp", "sequence", "tensor")
ROWS = ("data", "fsdp")  # the rows of a batch are divided over both
SEQUENCE = "sequence"  # divides the tokens of a row inside the model: jaxlm/train/pieces.py
TILE = 128  # tokens, of the tiles of attention where tokens are divided; half of it at least

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ROWS,
    "length": None,  # of what is not in pieces, such as a step of decoding: whole
    "pieces": (*ROWS, SEQUENCE),  # rows cut into pieces
    "layers": None,
    "embed": ("fsdp", SEQUENCE),  # devices with other tokens need not hold the same parameters
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "rank": None,
    None: None,
}


def make_mesh(options: MeshOptions, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, sequence and tensor over all devices of all processes, or over `devices`.

    It is laid out by topology: neighbours along tensor, then along sequence and fsdp, lie on one host or slice wherever
    they fit there, and data goes across.

    Raises: ValueError when the axes do not multiply to the number of devices, or cannot be cut where slices end.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {name: getattr(options, name) for name in AXES}
    wanted = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if any(size == 0 or size < -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh sizes are positive, and at most one is -1 (what is left); got {wanted}")
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if -1 in sizes.values():
        sizes = {name: len(devices) // fixed if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"the mesh {wanted} needs {'a multiple of ' if '-1' in wanted else ''}{fixed} devices, but there are "
            f"{len(devices)}: change mesh.data, mesh.fsdp, mesh.sequence or mesh.tensor, or set one of them to -1"
        )
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(AXES)
    if len({slice_of(device) for device in devices}) == 1:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    return Mesh(across_and_inside(shape, devices), AXES, axis_types=types)


def across_and_inside(shape: Sequence[int], devices: Sequence[jax.Device], *, by_process: bool = False) -> np.ndarray:
    """Devices of several slices in the shape of a mesh, which `jax.make_mesh` refuses.

    Args:
      shape: devices along each of AXES.
      devices: as many.
      by_process: take a process for a slice.
    """
    slices = len({device.process_index if by_process else slice_of(device) for device in devices})
    across = across_slices(shape, slices)
    inside = tuple(size // outer for size, outer in zip(shape, across, strict=True))
    # As jax.make_mesh decides for one slice: on these chips an axis may take a part of a ring.
    split = devices[0].device_kind in ("TPU v5 lite", "TPU v5e")
    return mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, process_is_granule=by_process, allow_split_physical_axes=split
    )


def slice_of(device: jax.Device) -> int:
    """Which slice a device belongs to: those of one are joined by fast links. Of GPUs a host is one."""
    return getattr(device, "slice_index", None) or 0


def across_slices(shape: Sequence[int], slices: int) -> tuple[int, ...]:
    """How many of each axis's parts lie across slices: of the first axes as many as possible.

    Raises: ValueError when the axes do not divide the slices among them.

    >>> across_slices((8, 4, 1, 1), 4), across_slices((2, 8, 1, 1), 4)
    ((4, 1, 1, 1), (2, 2, 1, 1))
    """
    left = slices
    across: list[int] = []
    for size in shape:
        across.append(math.gcd(size, left))
        left //= across[-1]
    if left > 1:
        wanted = ", ".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True))
        raise ValueError(
            f"the mesh {wanted} cannot be cut into {slices} slices, as the devices are: make mesh.data a multiple of "
            f"{slices}, or set it to -1"
        )
    return tuple(across)


def reach(mesh: Mesh) -> dict[str, str]:
    """How far the neighbours along each mesh axis lie apart: "process", "slice" or "slices"; 1 device: "process"."""
    found = {}
    for number, axis in enumerate(mesh.axis_names):
        lines = np.moveaxis(mesh.devices, number, -1).reshape(-1, mesh.shape[axis])
        if all(len({device.process_index for device in line}) == 1 for line in lines):
            found[axis] = "process"
        else:
            found[axis] = (
                "slice" if all(len({slice_of(device) for device in line}) == 1 for line in lines) else "slices"
            )
    return found


def spec(names: Sequence[str | None]) -> P:
    """The partition of one array from the logical names of its dimensions; a mesh axis serves the first that asks.

    >>> tuple(spec(("batch", "length", "embed"))), tuple(spec(("layers", "embed", "mlp")))
    ((('data', 'fsdp'), None, None), (None, ('fsdp', 'sequence'), 'tensor'))
    """
    taken: set[str] = set()
    parts: list[str | tuple[str, ...] | None] = []
    for name in names:
        if name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}; RULES in jaxlm/train/mesh.py has {list(RULES)}")
        rule = RULES[name]
        axes = (rule,) if isinstance(rule, str) else rule or ()
        free = taken.isdisjoint(axes)
        taken.update(axes)
        parts.append(rule if free else None)
    return P(*parts)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def rows(mesh: Mesh) -> NamedSharding:
    """An array `[rows, ...]` whose rows are divided over data and fsdp."""
    return NamedSharding(mesh, P(ROWS))


def shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """A sharding for every parameter.

    Args:
      mesh: from `make_mesh`.
      axes: a tree like `shapes` whose leaves are tuples of logical names, one a dimension (`nn.logical_axes`).
      shapes: parameters, or `ShapeDtypeStruct`s of them.
    Raises: ValueError with the path of a parameter whose dimension the mesh does not divide.
    """

    def one(key_path: Any, shape: Any, names: Any) -> NamedSharding:
        if len(names) != len(shape.shape):
            raise ValueError(f"{path_of(key_path)} has shape {shape.shape} but the logical axes {names}")
        partition = spec(names)
        for dimension, axis in enumerate(partition):
            axes = (axis,) if isinstance(axis, str) else axis or ()
            count = math.prod(mesh.shape[a] for a in axes)
            if shape.shape[dimension] % count:
                names_of = [a for a in axes if mesh.shape[a] > 1]
                raise ValueError(
                    f"{path_of(key_path)} has {shape.shape[dimension]} entries along {names[dimension]!r}, which the "
                    f"{count} devices of mesh axis {' x '.join(map(repr, names_of))} do not divide: choose another "
                    f"{' or '.join(f'mesh.{a}' for a in names_of)}"
                )
        return NamedSharding(mesh, partition)

    return jax.tree.map_with_path(one, shapes, axes)


def constrainer(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """What a model calls on activations, with their logical names, so that they stay divided as the batch is."""
    if mesh.size == 1:
        return lambda x, names: x
    return lambda x, names: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(names)))


def row_devices(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are divided; the others hold parts of the same rows' work."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_rows(mesh: Mesh, batch_size: int, micro_batches: int = 1) -> None:
    """Raises ValueError unless every device gets the same number of rows in every micro-batch."""
    devices = row_devices(mesh)
    if micro_batches < 1:
        raise ValueError(f"micro_batches must be at least 1, got {micro_batches}")
    if batch_size < 1 or batch_size % (devices * micro_batches):
        step = devices * micro_batches
        raise ValueError(
            f"batch_size {batch_size} is not a positive multiple of {step}: {devices} devices (mesh.data x mesh.fsdp) "
            f"times {micro_batches} micro_batches; the nearest that fit are {max(1, batch_size // step) * step} and "
            f"{(batch_size // step + 1) * step}"
        )


def check_length(mesh: Mesh, length: int) -> None:
    """Raises ValueError unless the mesh's `sequence` axis can divide rows of `length` tokens.

    Every device gets two chunks of a row, each of at most TILE tokens or a multiple of half of it.
    """
    devices = mesh.shape[SEQUENCE]
    chunks = 2 * devices
    step = chunks if length <= chunks * TILE else chunks * TILE // 2
    if devices > 1 and (length < 1 or length % step):
        fits = max(1, length // step) * step, (length // step + 1) * step
        raise ValueError(
            f"rows of {length} tokens cannot be divided over mesh.sequence={devices}, which needs a multiple of {step} "
            f"({chunks} chunks, and above {chunks * TILE} tokens chunks in tiles of {TILE // 2}): set data.length to "
            f"{fits[0]} or {fits[1]}, or another mesh.sequence"
        )


def loss_groups(mesh: Mesh) -> int | tuple[int, int]:
    """Into how many groups a loss cuts rows, and where tokens are divided those of each row (`Model.row_groups`)."""
    rows_over = row_devices(mesh)
    return rows_over if mesh.shape[SEQUENCE] == 1 else (rows_over, mesh.shape[SEQUENCE])
