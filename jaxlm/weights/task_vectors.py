# SPDX-License-Identifier: Apache-2.0
"""Sums of models and of task vectors: linear merges, soups, task arithmetic, TIES, DARE.

The task vector of a model is its difference from the base.  All arithmetic is float32, leaf by leaf; results keep the
first model's or the base's type and sharding.  A tensor is a leaf, or one slice of a leaf that is stacked over layers.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.weights.alike import check_alike
from jaxlm.weights.merging import like
from jaxlm.weights.names import named_leaves
from jaxlm.weights.select import Scope, Scored, largest, match, place_keys, salts

Weights = float | Sequence[float]
Rescale = Literal["share", "norm", "none"]
RESCALES = ("share", "norm", "none")


def linear(models: Iterable[Any], *, weights: Weights = 1.0, normalize: bool = True) -> Any:
    """The weighted mean of models: sum_i w_i theta_i / sum_i w_i.

    Args:
      models: trees of float arrays of one shape; an iterator may load one at a time.
      weights: one a model, or one for all.
      normalize: divide by the sum of the weights (also mergekit's default); False leaves the sum.
    Raises: ValueError for trees that differ, a NaN or infinity (with path and model), weights that do not fit or that
      add up to 0.

    >>> linear([{"w": jnp.zeros(2)}, {"w": jnp.full(2, 3.0)}], weights=[1, 2])
    {'w': Array([2., 2.], dtype=float32)}

    Source: Wortsman et al. 2022, arXiv:2203.05482.
    """
    models = iter(models)
    first = next(models, None)
    if first is None:
        raise ValueError("no model to merge: give at least one")
    return _summed(None, _again(first, models), weights, scale=1.0, normalize=normalize)


def soup(models: Iterable[Any]) -> Any:
    """The plain mean of models (uniform soup): `linear` with equal weights."""
    return linear(models)


def task_arithmetic(
    base: Any, models: Iterable[Any], *, weights: Weights = 1.0, scale: float = 1.0, normalize: bool = False
) -> Any:
    """The base plus task vectors: theta + scale * sum_i w_i (theta_i - theta).

    Args:
      base: the common base.
      models: as of `linear`; a negative weight takes a task out.
      scale: factor of the sum (mergekit's `lambda`).
      normalize: divide the sum by that of the weights; False by default, as in mergekit.
    Raises: as `linear`.

    >>> task_arithmetic({"w": jnp.ones(2)}, [{"w": jnp.full(2, 3.0)}, {"w": jnp.full(2, 2.0)}], weights=[1, -1])
    {'w': Array([2., 2.], dtype=float32)}

    Source: Ilharco et al. 2022, arXiv:2212.04089.
    """
    return _summed(base, models, weights, scale=scale, normalize=normalize)


def ties(
    base: Any,
    models: Sequence[Any],
    *,
    density: float = 0.2,
    weights: Weights = 1.0,
    scale: float = 1.0,
    normalize: bool = True,
    scope: Scope = "layer",
    stacked: Sequence[str] | None = None,
) -> Any:
    """The base plus task vectors that were trimmed and agree in sign.

    Of each task vector the largest share `density` is kept. For each entry the sign of sum_i w_i d_i is elected, and
    the mean over those that have it is added: theta + scale * sum_agreeing w_i d_i / sum_agreeing w_i.

    Args:
      base, models: as of `task_arithmetic`; all models are read together, one leaf at a time.
      density: (0, 1], share kept, exactly floor(density * size); of equal sizes a fixed hash decides.
      normalize: divide by the weights that agree (mergekit's default too); False leaves the sum.
      scope: "layer": the share of each tensor, as mergekit does; "global": of the whole task vector, as in the paper.
      stacked: patterns of the paths that are stacked over layers; None: those under `blocks/`.
    Raises: as `linear`; ValueError for a density out of range.

    >>> base, a, b = {"w": jnp.zeros(4)}, {"w": jnp.array([3.0, 1, -2, 0])}, {"w": jnp.array([1.0, 0, 4, 0])}
    >>> ties(base, [a, b], density=0.5)
    {'w': Array([2., 0., 4., 0.], dtype=float32)}

    Source: Yadav et al. 2023, arXiv:2306.01708; the density of 20 % is theirs.
    Departs: mergekit 0.1.5 keeps int(density * size) in floats, one at least; its default density is 1.
    """
    check_share(density)
    layered, _ = match(stacked, (), named_leaves(base))
    models = list(models)
    keeps: list[list[Any]] = [[None] * len(models) for _ in layered]
    if density < 1:
        for number, model in enumerate(models):
            check_alike(base, model, ("the base", f"model {number + 1}"), dtypes=False)
            for keep, mask in zip(keeps, _trimmed(base, model, density, scope, layered), strict=True):
                keep[number] = mask
    return _elected(base, models, keeps, [[1.0] * len(models)] * len(keeps), weights, scale, normalize)


def dare(
    base: Any,
    models: Iterable[Any],
    *,
    density: float,
    seed: int = 0,
    weights: Weights = 1.0,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: Rescale = "share",
    stacked: Sequence[str] | None = None,
) -> Any:
    """Task arithmetic of task vectors of which random entries are dropped and the rest is scaled up.

    Args:
      base, models, weights, scale, normalize: as of `task_arithmetic`.
      density: (0, 1], chance of each entry to stay. What stays is a hash of path, place, seed and number of the model,
        the same on any devices.
      seed: >= 0.
      rescale: "share": by 1 / density, as in the paper; "norm": so that each tensor keeps its sum of sizes, as mergekit
        0.1.5 does; "none".
      stacked: as of `ties`.
    Raises: as `ties`.

    Source: Yu et al. 2023, arXiv:2311.03099.
    """
    kept = _Drop(density, seed, rescale, stacked)
    return _summed(base, models, weights, scale=scale, normalize=normalize, drop=kept)


def dare_ties(
    base: Any,
    models: Sequence[Any],
    *,
    density: float,
    seed: int = 0,
    weights: Weights = 1.0,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: Rescale = "share",
    stacked: Sequence[str] | None = None,
) -> Any:
    """`dare` with the sign election of `ties`; what was dropped has no vote. Not normalized, as in mergekit."""
    drop, models = _Drop(density, seed, rescale, stacked), list(models)
    made = [list(drop(base, model, number)) for number, model in enumerate(models, 1)]
    keeps, factors = ([[pair[i] for pair in leaf] for leaf in zip(*made, strict=True)] for i in (0, 1))
    return _elected(base, models, keeps, factors, weights, scale, normalize)


@jax.jit
def add(
    total: jax.Array, base: jax.Array | None, model: jax.Array, weight: Any, keep: jax.Array | None, factor: Any
) -> tuple[jax.Array, jax.Array]:
    """total + weight * (what is kept of the task vector, or the model where there is no base); is it finite?"""
    task = task_vector(base, model)
    return total + weight * (task if keep is None else jnp.where(keep, task, 0.0) * factor), jnp.all(jnp.isfinite(task))


def task_vector(base: jax.Array | None, model: jax.Array) -> jax.Array:
    """In float32; the model itself where there is no base."""
    model = model.astype(jnp.float32)
    return model if base is None else model - base.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("dtype",))
def settle(base: jax.Array | None, total: jax.Array, divisor: Any, scale: Any, dtype: Any) -> jax.Array:
    """base + scale * total / divisor."""
    moved = total / divisor * scale
    return (moved if base is None else base.astype(jnp.float32) + moved).astype(dtype)


@functools.partial(jax.jit, static_argnames=("normalize",))
def elect(
    base: jax.Array,
    models: Sequence[jax.Array],
    weights: Sequence[Any],
    keeps: Sequence[jax.Array | None],
    factors: Sequence[Any],
    normalize: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weighted task vectors that have the elected sign: their sum, what to divide it by, whether all is finite."""
    tasks = [task_vector(base, model) for model in models]
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(task)) for task in tasks]))
    votes = [
        weight * (task if keep is None else jnp.where(keep, task, 0.0) * factor)
        for task, weight, keep, factor in zip(tasks, weights, keeps, factors, strict=True)
    ]
    sign = jnp.where(sum(votes[1:], votes[0]) >= 0, 1.0, -1.0)
    agreeing = [jnp.sign(vote) == sign for vote in votes]
    total = jnp.zeros(base.shape, jnp.float32)
    for agrees, vote in zip(agreeing, votes, strict=True):
        total += jnp.where(agrees, vote, 0.0)
    if not normalize:
        return total, jnp.ones_like(total), finite
    divisor = jnp.zeros(base.shape, jnp.float32)
    for agrees, weight in zip(agreeing, weights, strict=True):
        divisor += jnp.where(agrees, weight, 0.0)
    return total, jnp.where(divisor == 0, 1.0, divisor), finite


def kept(places: jax.Array, density: float) -> jax.Array:
    """Whether an entry stays, by its hashed place (uint32, even over all of them)."""
    return places < jnp.uint32(min(int(density * 2**32), 2**32 - 1))


def divisor_of(weights: Sequence[float], normalize: bool) -> float:
    """What a weighted sum is divided by."""
    if normalize and abs(sum(weights)) < 1e-8:
        raise ValueError(f"the weights {list(weights)} add up to 0: nothing to divide by; say normalize=False")
    return sum(weights) if normalize else 1.0


def weights_of(weights: Weights, count: int) -> list[float]:
    """One weight a model."""
    given = [float(weights)] * count if isinstance(weights, int | float) else [float(w) for w in weights]
    if len(given) != count:
        raise ValueError(f"got {len(given)} weights for {count} models: give one each, or one for all")
    return given


class _Drop:
    """What DARE keeps of a model's leaves, and the factors of what is kept."""

    def __init__(self, density: float, seed: int, rescale: Rescale, stacked: Sequence[str] | None):
        check_dare(density, seed, rescale)
        self.density, self.seed, self.rescale, self.stacked = density, seed, rescale, stacked

    def __call__(self, base: Any, model: Any, number: int) -> Iterator[tuple[jax.Array | None, Any]]:
        check_alike(base, model, ("the base", f"model {number}"), dtypes=False)
        layered, _ = match(self.stacked, (), named_leaves(base))
        leaves = zip(jax.tree.leaves(base), jax.tree.leaves(model), strict=True)
        for (path, stacked), (ours, theirs) in zip(layered.items(), leaves, strict=True):
            if self.density == 1:
                yield None, 1.0
                continue
            keep = _dropped(path, ours.shape, stacked, self.seed + number, self.density)
            keep = like(ours, keep)
            if self.rescale == "norm":
                yield keep, _norm_ratio(ours, theirs, keep, tuple(range(int(stacked), ours.ndim)))
            else:
                yield keep, 1 / self.density if self.rescale == "share" else 1.0


def check_dare(density: float, seed: int, rescale: str) -> None:
    """Raises ValueError for what DARE cannot do."""
    check_share(density)
    if rescale not in RESCALES:
        raise ValueError(f"rescale must be one of {', '.join(RESCALES)}, got {rescale!r}")
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 4))
def _dropped(path: str, shape: tuple[int, ...], stacked: bool, seed: jax.Array, density: float) -> jax.Array:
    part = Scored(path, shape, stacked, None, lambda _: jnp.zeros(shape, jnp.uint32))
    known = {"salt": salts([part], seed), "origin": jnp.uint32(0)}
    return kept(place_keys(part, known), density)


@functools.partial(jax.jit, static_argnames=("axes",))
def _norm_ratio(base: jax.Array, model: jax.Array, keep: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return ratio(*sums_of_sizes(base, model, keep, axes))


def sums_of_sizes(
    base: jax.Array, model: jax.Array, keep: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Sums of |task vector|, of all entries and of those kept."""
    size = jnp.abs(task_vector(base, model))
    return jnp.sum(size, axes, keepdims=True), jnp.sum(jnp.where(keep, size, 0.0), axes, keepdims=True)


def ratio(whole: Any, part: Any) -> Any:
    """whole / part, 1 where one of them is nothing (mergekit's bound)."""
    nothing = (whole < 1e-7) | (part < 1e-7)
    return jnp.where(nothing, 1.0, whole / jnp.where(nothing, 1.0, part))


def _trimmed(base: Any, model: Any, density: float, scope: Scope, layered: dict[str, bool]) -> list[jax.Array]:
    """The largest share of a task vector, a mask a leaf."""
    pairs = list(zip(layered.items(), jax.tree.leaves(base), jax.tree.leaves(model), strict=True))
    if scope == "global":
        return _largest([x for _, x, _ in pairs], [y for *_, y in pairs], tuple(layered.items()), density, scope)
    return [_largest([x], [like(x, y)], (name,), density, scope)[0] for name, x, y in pairs]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _largest(base: list[Any], model: list[Any], names: Any, density: float, scope: Scope) -> list[jax.Array]:
    sizes = {path: jnp.abs(task_vector(x, y)) for (path, _), x, y in zip(names, base, model, strict=True)}
    stacked = tuple(re.escape(path) for path, layered in names if layered)
    chosen = largest(sizes, density, scope=scope, stacked=stacked)
    return [chosen[path] for path, _ in names]


def _elected(
    base: Any, models: list[Any], keeps: Any, factors: Any, weights: Weights, scale: float, normalize: bool
) -> Any:
    if not models:
        raise ValueError("no model to merge: give at least one")
    shares = weights_of(weights, len(models))
    for number, model in enumerate(models, 1):
        check_alike(base, model, ("the base", f"model {number}"), dtypes=False)
    merged, flags, paths = [], [], list(named_leaves(base))
    columns = zip(jax.tree.leaves(base), *map(jax.tree.leaves, models), strict=True)
    for (leaf, *theirs), keep, factor in zip(columns, keeps, factors, strict=True):
        total, divisor, finite = elect(leaf, [like(leaf, x) for x in theirs], shares, keep, factor, normalize)
        merged.append(like(leaf, settle(leaf, total, divisor, scale, leaf.dtype)))
        flags.append(finite)
    _check_finite(paths, flags, "the base or a model")
    return jax.tree.unflatten(jax.tree.structure(base), merged)


def _summed(
    base: Any, models: Iterable[Any], weights: Weights, *, scale: float, normalize: bool, drop: _Drop | None = None
) -> Any:
    """Model by model; `base` None: a sum of models."""
    given = None if isinstance(weights, int | float) else [float(w) for w in weights]
    used: list[float] = []
    first, totals, paths = base, None, []
    for number, model in enumerate(models, 1):
        first = model if first is None else first
        check_alike(first, model, ("model 1" if base is None else "the base", f"model {number}"), dtypes=False)
        if given is not None and number > len(given):
            raise ValueError(f"got {len(given)} weights for more models: give one each, or one for all")
        used.append(float(weights) if given is None else given[number - 1])  # type: ignore[arg-type]
        starts, paths = jax.tree.leaves(first), list(named_leaves(first))
        bases = [None] * len(starts) if base is None else starts
        if totals is None:
            totals = [like(leaf, jnp.zeros(leaf.shape, jnp.float32)) for leaf in starts]
        keeps = drop(base, model, number) if drop else iter([(None, 1.0)] * len(starts))
        flags = []
        for i, (leaf, (keep, factor)) in enumerate(zip(jax.tree.leaves(model), keeps, strict=True)):
            totals[i], finite = add(totals[i], bases[i], like(starts[i], leaf), used[-1], keep, factor)
            flags.append(finite)
        _check_finite(paths, flags, f"model {number}" + ("" if base is None else " or the base"))
    if totals is None:
        raise ValueError("no model to merge: give at least one")
    weights_of(weights, len(used))
    divisor = divisor_of(used, normalize)
    leaves = jax.tree.leaves(first)
    bases = [None] * len(leaves) if base is None else leaves
    merged = [
        like(leaf, settle(start, total, divisor, scale, leaf.dtype))
        for leaf, start, total in zip(leaves, bases, totals, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(first), merged)


def _again(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def check_share(density: float) -> None:
    """Raises ValueError for a density out of range."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}: it is the share of a task vector that is kept")


def _check_finite(paths: Sequence[str], flags: Sequence[jax.Array], where: str) -> None:
    if any(isinstance(flag, jax.core.Tracer) for flag in flags):
        return  # inside somebody's jit there is nothing to read
    for path, finite in zip(paths, jax.device_get(flags), strict=True):
        if not finite:
            raise ValueError(f"{path} holds a NaN or an infinity in {where}: it cannot be merged")
