# SPDX-License-Identifier: Apache-2.0
"""Importance made comparable between layers: r = f(s, statistics of s over the layer).

layer: one slice of one leaf, or slice i of all leaves of a stack; s: importance, >= 0, [*leaf]; statistics: [slices].
"""

import functools
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
    sizes = [jnp.float32(math.prod(part.shape) // max(1, part.num_slices)) for part in parts]
    size = [sum(together) for together in _stacked(sizes, stacks)]
    zeros = [jnp.zeros(part.num_slices, jnp.float32) for part in parts]
    if normalizer == "none":
        return [Statistics(zero, zero + 1) for zero in zeros]
    high: Any
    low: Any
    total: Any
    if normalizer in ("max", "minmax"):
        high, low = zip(*(_extremes(part, s) for part, s in zip(parts, importance, strict=True)), strict=True)
        high = [functools.reduce(jnp.maximum, together) for together in _stacked(high, stacks)]
        low = [functools.reduce(jnp.minimum, together) for together in _stacked(low, stacks)]
        low = zeros if normalizer == "max" else low
        return [Statistics(x, y - x) for x, y in zip(low, high, strict=True)]
    total, _ = zip(*(_sums(part, s, 0.0) for part, s in zip(parts, importance, strict=True)), strict=True)
    mean = [sum(together) / n for together, n in zip(_stacked(total, stacks), size, strict=True)]
    if normalizer == "mean":
        return [Statistics(zero, m) for zero, m in zip(zeros, mean, strict=True)]
    around = [_sums(part, s, spread(part, m)) for part, s, m in zip(parts, importance, mean, strict=True)]
    total, square = (_stacked(each, stacks) for each in zip(*around, strict=True))
    # What the rounded mean is off by is taken out again.
    variance = [sum(x) / n - jnp.square(sum(y) / n) for x, y, n in zip(square, total, size, strict=True)]
    return [Statistics(m, jnp.sqrt(jnp.maximum(v, 0.0))) for m, v in zip(mean, variance, strict=True)]


def normalized(part: Scored, s: jax.Array, known: Statistics, normalizer: Normalizer) -> jax.Array:
    """r of every entry of a leaf; 0 where the layer has no spread."""
    if normalizer == "none":
        return s
    shift, scale = (spread(part, x) for x in known)
    r = jnp.where(scale > 0, (s - shift) / jnp.where(scale > 0, scale, 1.0), 0.0)
    return jnp.abs(jnp.tanh(r)) if normalizer == "tanh_z" else r


def _sums(part: Scored, s: jax.Array, shift: Any) -> tuple[jax.Array, jax.Array]:
    """Sum and sum of squares of `s - shift` over each slice; by rows first, so that no float adds up millions."""
    d = s - shift
    rows = _rows(part, (d, d * d), (0.0, 0.0), jax.lax.add, jax.lax.add)
    return rows[0].sum(1), rows[1].sum(1)


def _extremes(part: Scored, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest and smallest of each slice."""
    high, low = _rows(part, (s, s), (-jnp.inf, jnp.inf), jax.lax.max, jax.lax.min)
    return high.max(1), low.min(1)


def _rows(part: Scored, pair: Any, start: Any, first: Any, second: Any) -> tuple[jax.Array, jax.Array]:
    """Both reduced along the last axis in one pass, [slices, rows]. What is reduced is not stored, as in `count`."""
    if len(part.shape) > part.stacked:

        def combine(x: Any, y: Any) -> Any:
            return first(x[0], y[0]), second(x[1], y[1])

        pair = jax.lax.reduce(pair, tuple(map(jnp.float32, start)), combine, (len(part.shape) - 1,))
    high, low = (x.reshape(part.num_slices, -1) for x in pair)
    return high, low


def _stacked(values: Sequence[Any], stacks: Sequence[int | None]) -> list[list[Any]]:
    """For every leaf the values of all leaves that share its layers: its own alone, or those of its stack."""
    return [
        [own] if stack is None else [value for value, other in zip(values, stacks, strict=True) if other == stack]
        for own, stack in zip(values, stacks, strict=True)
    ]
