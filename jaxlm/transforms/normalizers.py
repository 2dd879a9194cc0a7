# SPDX-License-Identifier: Apache-2.0
"""Importance made comparable between layers: r = f(s, statistics of s over the layer).

layer: one slice of one leaf, or slice i of all leaves of a stack; s: importance, >= 0, [*leaf]; statistics: [slices].
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.weights.select import Scored, spread

Normalizer = Literal["mean", "max", "minmax", "zscore", "tanh_z", "none"]
NORMALIZERS = ("mean", "max", "minmax", "zscore", "tanh_z", "none")


class Statistics(NamedTuple):
    """What a normalizer subtracts and divides by, float32 [slices]; `scale` is 0 where there is no spread."""

    shift: jax.Array
    scale: jax.Array


def statistics(
    parts: Sequence[Scored], importance: Sequence[jax.Array], stacks: Sequence[int | None], normalizer: Normalizer
) -> list[Statistics]:
    """Statistics of every leaf's slices.

    Args:
      parts: the leaves, for their shapes and slices.
      importance: of each leaf.
      stacks: leaves with the same number share the statistics of slice i; None: a leaf by itself.
      normalizer: which.
    """
    sums = [_sums(part, s, 0.0) for part, s in zip(parts, importance, strict=True)]
    sums = _joined(parts, sums, stacks)
    mean = [total / size for total, _, _, _, size in sums]
    if normalizer in ("zscore", "tanh_z"):
        around = [_sums(part, s, spread(part, m)) for part, s, m in zip(parts, importance, mean, strict=True)]
        around = _joined(parts, around, stacks)
        # What the rounded mean is off by is taken out again.
        spreads = [jnp.maximum(square / size - jnp.square(total / size), 0.0) for total, square, _, _, size in around]
        return [Statistics(m, jnp.sqrt(x)) for m, x in zip(mean, spreads, strict=True)]
    zeros = [jnp.zeros_like(m) for m in mean]
    if normalizer == "mean":
        return [Statistics(zero, m) for zero, m in zip(zeros, mean, strict=True)]
    if normalizer == "max":
        return [Statistics(zero, highest) for zero, (_, _, highest, _, _) in zip(zeros, sums, strict=True)]
    if normalizer == "minmax":
        return [Statistics(lowest, highest - lowest) for _, _, highest, lowest, _ in sums]
    return [Statistics(zero, jnp.ones_like(zero)) for zero in zeros]


def normalized(part: Scored, s: jax.Array, known: Statistics, normalizer: Normalizer) -> jax.Array:
    """r of every entry of a leaf; 0 where the layer has no spread."""
    if normalizer == "none":
        return s
    shift, scale = (spread(part, x) for x in known)
    r = jnp.where(scale > 0, (s - shift) / jnp.where(scale > 0, scale, 1.0), 0.0)
    return jnp.abs(jnp.tanh(r)) if normalizer == "tanh_z" else r


def _sums(part: Scored, s: jax.Array, shift: Any) -> tuple[Any, ...]:
    """Per slice of one leaf: sum and sum of squares of `s - shift`, largest, smallest; and the number of entries.

    Rows first, so that no float adds up millions of terms one by one; one reduction, because it reads the leaf once.
    """
    size = jnp.float32(math.prod(part.shape) // max(1, part.num_slices))
    d = s - shift
    operands, start = (d, d * d, s, s), (0.0, 0.0, -jnp.inf, jnp.inf)
    if len(part.shape) > part.stacked:

        def combine(x: Any, y: Any) -> Any:
            return x[0] + y[0], x[1] + y[1], jnp.maximum(x[2], y[2]), jnp.minimum(x[3], y[3])

        operands = jax.lax.reduce(operands, tuple(map(jnp.float32, start)), combine, (len(part.shape) - 1,))
    totals, squares, highest, lowest = (x.reshape(part.num_slices, -1) for x in operands)
    return totals.sum(1), squares.sum(1), highest.max(1), lowest.min(1), size


def _joined(parts: Sequence[Scored], sums: list[tuple[Any, ...]], stacks: Sequence[int | None]) -> list[Any]:
    for stack in {stack for stack in stacks if stack is not None}:
        members = [i for i, other in enumerate(stacks) if other == stack]
        total, square, highest, lowest, size = zip(*(sums[i] for i in members), strict=True)
        together = (
            sum(total), sum(square), jnp.max(jnp.stack(highest), 0), jnp.min(jnp.stack(lowest), 0), sum(size),
        )  # fmt: skip
        for i in members:
            sums[i] = together
    return sums
