# SPDX-License-Identifier: Apache-2.0
"""Bytes of a run on one device: the state to the byte, what a step adds by the model in `activations`."""

from typing import Any, NamedTuple

import jax

from jaxlm.plan import activations
from jaxlm.plan.outline import Outline, device_bytes
from jaxlm.train.mesh import row_devices
from jaxlm.train.step import trained_leaves
from jaxlm.weights.names import named_leaves

ISOLATION = {"marks", "importance", "held", "drift", "weight", "anchor"}  # fields of the states that hold entries
FLOAT32 = 4


class Memory(NamedTuple):
    """Bytes on one device.

    Attributes:
      parameters: float32 masters, adapters included.
      optimizer: moments and counters.
      isolation: masks, importance, and what pulls (EWC).
      kept: the parameters that the run began with; it keeps them, outside of the step.
      batch: of one update.
      gradients: of what trains, float32; twice that with micro-batches, which are summed.
      saved: by the forward pass of all layers, for the backward pass.
      head: hidden states, a chunk of logits and the head's gradient, at their fullest.
      layer: the backward pass of one layer, at its fullest.
      update: what the optimizer writes down beside gradients and state.
      temporary: what of these is alive together in the fullest moment of a step.
      moment: that moment: "head", "layer" or "update".
    """

    parameters: int
    optimizer: int
    isolation: int
    kept: int
    batch: int
    gradients: float
    saved: float
    head: float
    layer: float
    update: float
    temporary: float
    moment: str

    @property
    def state(self) -> int:
        """What a checkpoint holds."""
        return self.parameters + self.optimizer + self.isolation

    @property
    def step(self) -> float:
        """What the compiled step takes: arguments, outputs that share no argument's place, temporaries."""
        return self.state + self.batch + self.temporary

    @property
    def total(self) -> float:
        """What the run takes while it trains."""
        return self.step + self.kept


def estimate(outline: Outline, *, on_cpu: bool = False) -> Memory:
    """The memory of a run on each of its devices; nothing is allocated or compiled.

    Args:
      outline: of `make_outline`.
      on_cpu: as the CPU backend builds the step, to be held against `compiled_memory`; else as an accelerator does.
    """
    state = outline.state
    isolation = _bytes_where(state.opt_state, ISOLATION)
    parameters = device_bytes(state.params)
    optimizer = device_bytes(state) - parameters - isolation
    trains = trained_leaves(outline.phase.tx, state, jax.eval_shape(outline.phase.extra, outline.batch))
    trained = [leaf for leaf, yes in zip(jax.tree.leaves(state.params), trains, strict=True) if yes]
    parts = outline.config.run.micro_batches
    once = float(device_bytes(trained))
    work = _work(outline, on_cpu=on_cpu)
    adapted = any(path.endswith("lora_a") for path in named_leaves(state.params))
    saved = activations.saved(work, adapted=adapted)
    head_trains = _head_trains(state.params, trains)
    head = activations.head(work, trains=head_trains)
    layer = activations.layer(work, trains=not adapted)
    update = activations.UPDATED * once
    late = once if parts == 1 else 2 * once
    whole_head = 0.0
    if head_trains and not work.config.tied:  # the CPU backend reduces it whole, and cuts it when it is used
        kernel = work.config.width * work.config.vocab_size * FLOAT32 / work.tensor
        whole_head = kernel * (1 - 1 / _parts(outline)) if on_cpu else 0.0
    moments = {
        "head": saved + late + head,
        "layer": saved + late + whole_head + layer,
        "update": late + whole_head + update,
    }
    moment = max(moments, key=lambda name: moments[name])
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        isolation=isolation,
        kept=device_bytes(outline.start),
        batch=device_bytes(outline.batch),
        gradients=late,
        saved=saved,
        head=head,
        layer=layer,
        update=update,
        temporary=moments[moment],
        moment=moment,
    )


def _parts(outline: Outline) -> int:
    """Into how many parts the mesh divides parameters along the width."""
    return outline.mesh.shape["fsdp"] * outline.mesh.shape["sequence"]


def _work(outline: Outline, *, on_cpu: bool) -> activations.Work:
    rows, length = outline.batch["tokens"].shape
    mesh = outline.mesh
    return activations.Work(
        config=outline.model.config,
        rows=max(1, rows // (row_devices(mesh) * outline.config.run.micro_batches)),
        length=length // mesh.shape["sequence"],
        sequence=mesh.shape["sequence"],
        tensor=mesh.shape["tensor"],
        divided=_parts(outline) > 1,
        on_cpu=on_cpu,
    )


def _head_trains(params: Any, trains: list[bool]) -> bool:
    paths = list(named_leaves(params))
    return trains[paths.index("head/kernel" if "head/kernel" in paths else "embed/table")]


def _bytes_where(tree: Any, fields: set[str]) -> int:
    """Bytes of the leaves that lie below a field of one of these names."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    chosen = [leaf for path, leaf in found if any(getattr(key, "name", None) in fields for key in path)]
    return device_bytes(chosen)
