# SPDX-License-Identifier: Apache-2.0
"""A run as shapes with shardings: the same model, phase, state and batch that `jaxlm.run` makes, and no array."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.checkpoints.sources import load_config as load_model_config
from jaxlm.config import Pretrained, RunConfig
from jaxlm.methods import CpiFt, Dpi, Epi, Ewc, MultiStage, Sft
from jaxlm.nn.axes import logical_axes
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import Model
from jaxlm.nn.position_kinds import Rope
from jaxlm.train.loop import plan
from jaxlm.train.mesh import check_length, check_rows, constrainer, loss_groups, make_mesh, rows, shardings
from jaxlm.train.phase import Phase
from jaxlm.train.pieces import make_pieces
from jaxlm.train.state import State

PLANNED = (Sft, Epi, MultiStage, Dpi, CpiFt, Ewc)  # whose step is next-token prediction on plain batches

# Llama 3.1 (arXiv:2407.21783, table 3), for plans where the checkpoint is not at hand.
_LLAMA: dict[str, Any] = {"vocab_size": 128_256, "num_kv_heads": 8, "positions": Rope(base=500_000.0), "tied": False}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": _LLAMA | {"width": 4096, "num_layers": 32, "num_heads": 32, "mlp_width": 14_336},
    "llama-70b": _LLAMA | {"width": 8192, "num_layers": 80, "num_heads": 64, "mlp_width": 28_672},
}


class Outline(NamedTuple):
    """What a run puts on its devices, as `ShapeDtypeStruct`s that say where they lie.

    Attributes:
      config: of the run.
      model: that is trained, with its constraints on the mesh.
      phase: of the first stage.
      mesh: of the run.
      start: the parameters that the run begins with and keeps: evaluation and later stages need them.
      state: parameters, optimizer, isolation.
      batch: of one update.
    """

    config: RunConfig
    model: Model
    phase: Phase
    mesh: jax.sharding.Mesh
    start: Any
    state: State
    batch: dict[str, jax.ShapeDtypeStruct]


def make_outline(
    config: RunConfig, *, num_devices: int, shape: str = "", devices: Sequence[jax.Device] | None = None
) -> Outline:
    """The outline of a run.

    Args:
      config: its data is not opened, of a checkpoint only the config is read.
      num_devices: of the run; as many must be there, virtual ones do.
      shape: "", or a name of SHAPES: the model has that shape, and the config's dtype, remat and attention.
      devices: None takes those that are here; those of a topology (`jax.experimental.topologies`) do too.
    Raises: ValueError for a mesh that does not fit devices, rows or parameters, a method whose step is another, and an
      unknown shape.
    """
    there = jax.devices() if devices is None else devices
    if not 1 <= num_devices <= len(there):
        raise ValueError(f"a plan for {num_devices} devices needs as many, virtual ones do: {len(there)} here")
    mesh = make_mesh(config.mesh, devices=there[:num_devices])
    run = config.run
    check_rows(mesh, run.batch_size, run.micro_batches)
    check_length(mesh, config.data.length)
    if not isinstance(config.method, PLANNED):
        raise ValueError(
            f"{type(config.method).__name__} has a step of its own and holds more than a state (rollouts, references): "
            f"plan its parameters and optimizer with one of {', '.join(cls.__name__ for cls in PLANNED)}"
        )
    model = Model(
        model_config(config, shape), constrain=constrainer(mesh), row_groups=loss_groups(mesh), pieces=make_pieces(mesh)
    )
    bare = jax.eval_shape(model.init, jax.random.key(0))
    start = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        bare,
        shardings(mesh, logical_axes(bare), bare),
    )
    model = config.method.model(model)
    phase = config.method.phase(model, num_tasks=len(config.data.task_names), steps=max(1, run.steps))
    state, _ = plan(phase, bare, mesh=mesh, seed=run.seed, stage="train", axes=logical_axes, first_step=0)
    place = rows(mesh)
    size = (run.batch_size, config.data.length)
    integers = dict.fromkeys(("tokens", "positions", "segment_ids", "task_ids"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct(size, dtype, sharding=place)
        for name, dtype in (integers | {"loss_weights": jnp.float32}).items()
    }
    return Outline(config, model, phase, mesh, start, state, batch)


def model_config(config: RunConfig, shape: str = "") -> ModelConfig:
    """The model of a run: its own, its checkpoint's, or the named shape."""
    ours = config.model
    if shape:
        if shape not in SHAPES:
            raise ValueError(f"there is no shape {shape!r}: choose one of {', '.join(SHAPES)}")
        return ModelConfig(
            **SHAPES[shape],
            max_length=config.data.length,
            dtype=ours.dtype,
            remat=ours.remat,
            attention=ours.attention,
        )
    return load_model_config(ours.path, **ours.overrides()) if isinstance(ours, Pretrained) else ours


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device; keys count as the words they are made of."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        dtype = leaf.dtype
        if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, dtype))
            total += words.size * words.dtype.itemsize
            continue
        count = 1
        for side in leaf.sharding.shard_shape(leaf.shape):
            count *= side
        total += count * dtype.itemsize
    return total
