# SPDX-License-Identifier: Apache-2.0
"""The real train step of an outline, lowered and compiled but never run, and what XLA says that it takes."""

import time
from typing import Any, NamedTuple

import jax

from jaxlm.plan.outline import Outline
from jaxlm.train.step import make_train_step


class Compiled(NamedTuple):
    """A compiled step.

    Attributes:
      arguments, outputs, aliased, temporary: bytes on one device, XLA's own.
      seconds: of lowering and compiling.
      text: the optimised HLO.
    """

    arguments: int
    outputs: int
    aliased: int
    temporary: int
    seconds: float
    text: str

    @property
    def step(self) -> int:
        """Bytes that the step takes on one device."""
        return self.arguments + self.outputs - self.aliased + self.temporary


def compile_step(outline: Outline) -> Compiled:
    """Compiles the step for the devices of the outline's mesh. Takes shapes only: no parameter is allocated.

    On virtual CPU devices the collectives are those of the mesh, but the backend is CPU's: other fusions, chunks of
    256 tokens' logits, float32 in place of much bfloat16, and gradients reduced whole where an accelerator scatters.

    Raises: ValueError where XLA gives no figures.
    """
    begin = time.perf_counter()
    places: Any = jax.tree.map(lambda leaf: leaf.sharding, outline.state)
    step = make_train_step(
        outline.phase, mesh=outline.mesh, shardings=places, num_parts=outline.config.run.micro_batches
    )
    compiled = step.lower(outline.state, outline.batch).compile()  # type: ignore[attr-defined]  # a jitted function
    figures = compiled.memory_analysis()
    if figures is None:
        raise ValueError(f"the backend {jax.default_backend()!r} tells no memory figures of a program: use the CPU's")
    return Compiled(
        arguments=figures.argument_size_in_bytes,
        outputs=figures.output_size_in_bytes,
        aliased=figures.alias_size_in_bytes,
        temporary=figures.temp_size_in_bytes,
        seconds=time.perf_counter() - begin,
        text=compiled.as_text(),
    )
