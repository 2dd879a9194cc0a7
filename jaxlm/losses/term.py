# SPDX-License-Identifier: Apache-2.0
"""A sum and the weight it is to be divided by: what every loss returns."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """One part of the objective, or with `coefficient` 0 a metric.

    The objective of an update is the sum over terms of `coefficient * total / weight`, where total and weight are
    first summed over all micro-batches, devices and packs. So cutting a batch differently never changes a gradient.

    Attributes:
      total: float32 sum. A scalar; a metric may be a vector, one entry a task.
      weight: float32, of the shape of `total`, >= 0. Depends on the batch only, never on parameters.
      coefficient: static; 0 marks a metric, which the gradient never sees.
    """

    total: jax.Array
    weight: jax.Array
    coefficient: float = dataclasses.field(default=1.0, metadata={"static": True})
