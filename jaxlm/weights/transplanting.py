# SPDX-License-Identifier: Apache-2.0
"""Entries taken over from the models that own them."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.weights.alike import check_alike
from jaxlm.weights.merging import like
from jaxlm.weights.names import named_leaves

Overlap = Literal["largest", "mean", "last", "group"]
OVERLAPS = ("largest", "mean", "last", "group")


class Owned(NamedTuple):
    """What is known of one leaf after some of the models; all of its shape.

    Attributes:
      value: that of the owner so far, or the sum over owners; the base's where there is none.
      rank: uint8, 1 + the group of that owner, 0 for none; the number of owners under "mean".
      size: float32, that owner's; None where sizes are not read.
      shared: bool, whether there are several owners, all of one group; None unless overlap="group".
      mixed: bool, whether there are owners of several groups; None unless overlap="group".
    """

    value: jax.Array
    rank: jax.Array
    size: jax.Array | None
    shared: jax.Array | None
    mixed: jax.Array | None


def transplant(
    base: Any,
    models: Iterable[Any],
    cores: Iterable[Any],
    *,
    sizes: Iterable[Any] | None = None,
    overlap: Overlap = "largest",
    groups: Sequence[Sequence[int]] | None = None,
) -> Any:
    """The base with each model's core as it is in that model; entries of no core keep the base's bits.

    An entry of exactly one core has the bits of that model. An entry of several goes by `overlap`:

        "largest"  to the model with the largest size there; of equal ones to that of the lowest number
        "mean"     mean over its owners
        "last"     to the owner in the last group; inside a group as "largest"
        "group"    the base's value where all owners share a group, else as "largest"

    Args:
      base, models: trees of float arrays of one shape and type; models may come from an iterator, one at a time.
      cores: one bool tree a model, True = owned.
      sizes: one tree a model, how far each entry moved (>= 0), usually |model - weights before tuning|; read where
        cores overlap. Needed unless overlap is "mean", or "last" with groups of one.
      overlap: rule for entries of several cores.
      groups: numbers of the models from 0, each once, in the order of training. None: each model is a group, in the
        order given.
    Raises: ValueError for trees that differ, numbers of models, cores or sizes that differ, a NaN or infinity (with its
      path), missing sizes, an unknown rule.

    >>> cores = [{"w": jnp.array([True, True, False])}, {"w": jnp.array([False, True, False])}]
    >>> transplant({"w": jnp.zeros(3)}, [{"w": jnp.ones(3)}, {"w": jnp.full(3, 2.0)}], cores, overlap="mean")
    {'w': Array([1. , 1.5, 0. ], dtype=float32)}

    Source: CPI-FT, arXiv:2508.21741, stage 3. The paper gives no rule for entries of several cores: ours.
    """
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap must be one of {', '.join(OVERLAPS)}, got {overlap!r}")
    sized = overlap != "mean" and (overlap != "last" or any(len(group) > 1 for group in groups or ()))
    if sized and sizes is None:
        raise ValueError(f"overlap={overlap!r} needs sizes, one tree a model: |model - weights before tuning|")
    if overlap == "group" and groups is None:
        raise ValueError("overlap='group' needs groups: without them each model is its own, which is 'largest'")
    counts = [len(given) for given in (models, cores, sizes) if isinstance(given, Sequence)]
    if len(set(counts)) > 1:
        raise ValueError(f"got {counts} models, cores and sizes: each model has its own")
    bases, paths = jax.tree.leaves(base), list(named_leaves(base))
    owned = [unowned(leaf, overlap, sized) for leaf in bases]
    number = 0
    size: list[Any]
    for model, core, *size in zip(models, cores, *([sizes] if sized else []), strict=True):
        number += 1
        rank = _rank(groups, number - 1)
        check_alike(base, model, ("the base", f"model {number}"))
        check_alike(base, core, ("the base", f"core {number}"), dtypes=False)
        for path, leaf in named_leaves(core).items():
            if leaf.dtype != bool:
                raise ValueError(f"core {number} holds {leaf.dtype} in {path!r}: a core is a tree of bool")
        for tree in size:
            check_alike(base, tree, ("the base", f"sizes {number}"), dtypes=False)
        flags = []
        for i, parts in enumerate(zip(*(jax.tree.leaves(tree) for tree in (model, core, *size)), strict=True)):
            theta, mark, *moved = (like(bases[i], part) for part in parts)
            owned[i], finite = take_over(owned[i], theta, mark, moved[0] if sized else None, rank, overlap)
            flags.append(finite)
        _check_finite(paths, flags, number)
        del model, core, size, parts, theta, mark, moved
    if groups is not None and number != sum(len(group) for group in groups):
        raise ValueError(f"groups number {sum(len(group) for group in groups)} models, got {number}")
    merged = [like(leaf, resolved(leaf, state, overlap)) for leaf, state in zip(bases, owned, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(base), merged)


def _rank(groups: Sequence[Sequence[int]] | None, number: int) -> int:
    """1 + the place of a model's group."""
    if groups is None:
        return number + 1
    places = [place for place, group in enumerate(groups, 1) for member in group if member == number]
    if len(places) != 1:
        raise ValueError(f"model {number} is {len(places)} times in groups {groups}: each stands there once, from 0")
    return places[0]


def unowned(leaf: Any, overlap: Overlap, sized: bool) -> Owned:
    """No entry has an owner yet."""

    def zeros(dtype: Any) -> jax.Array:
        placed = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        return jnp.zeros(leaf.shape, dtype, device=leaf.sharding if placed else None)

    marks = [zeros(bool), zeros(bool)] if overlap == "group" else [None, None]
    return Owned(leaf, zeros(jnp.uint8), zeros(jnp.float32) if sized else None, *marks)


@functools.partial(jax.jit, static_argnames=("overlap",))
def take_over(
    owned: Owned, theta: jax.Array, core: jax.Array, size: Any, rank: jax.Array, overlap: Overlap
) -> tuple[Owned, jax.Array]:
    """One more model; and whether it is finite."""
    finite = jnp.all(jnp.isfinite(theta)) & (True if size is None else jnp.all(jnp.isfinite(size)))
    free = owned.rank == 0
    if overlap == "mean":
        value, more = owned.value.astype(jnp.float32), theta.astype(jnp.float32)
        value = jnp.where(core, jnp.where(free, more, value + more), value)
        return owned._replace(value=value, rank=owned.rank + core.astype(jnp.uint8)), finite
    larger = jnp.zeros((), bool) if owned.size is None else size > owned.size
    if overlap == "last":
        take = core & ((rank > owned.rank) | ((rank == owned.rank) & larger))
    else:
        take = core & (free | larger)
    if owned.mixed is not None and owned.shared is not None:
        again = core & ~free
        mixed = owned.mixed | (again & (rank != owned.rank))
        owned = owned._replace(mixed=mixed, shared=(owned.shared | again) & ~mixed)
    return owned._replace(
        value=jnp.where(take, theta, owned.value),
        rank=jnp.where(take, rank, owned.rank).astype(jnp.uint8),
        size=None if owned.size is None else jnp.where(take, size, owned.size),
    ), finite


@functools.partial(jax.jit, static_argnames=("overlap",))
def resolved(base: jax.Array, owned: Owned, overlap: Overlap) -> jax.Array:
    """The leaf once all models were seen."""
    if overlap == "mean":
        mean = owned.value / jnp.maximum(owned.rank, 1).astype(jnp.float32)
        return jnp.where(owned.rank == 0, base, jnp.where(owned.rank == 1, owned.value, mean)).astype(base.dtype)
    return owned.value if owned.shared is None else jnp.where(owned.shared, base, owned.value)


def _check_finite(paths: Sequence[str], flags: Sequence[jax.Array], number: int) -> None:
    if any(isinstance(flag, jax.core.Tracer) for flag in flags):
        return  # inside somebody's jit there is nothing to read
    for path, finite in zip(paths, jax.device_get(flags), strict=True):
        if not finite:
            raise ValueError(f"{path} of model {number}, or its sizes, holds a NaN or an infinity")
