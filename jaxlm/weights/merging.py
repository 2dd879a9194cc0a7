# SPDX-License-Identifier: Apache-2.0
"""Models of one base made into one, leaf by leaf, along the arc between them.

Pure functions of trees.  A vector is one leaf, or one slice of the leading axis of a leaf that is stacked over layers:
a stack of L layers and L separate leaves give the same result.  Leaves keep the base's type and sharding.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.weights.alike import check_alike
from jaxlm.weights.names import named_leaves
from jaxlm.weights.select import match

log = logging.getLogger("jaxlm.weights")

Report = Callable[[int, str, np.ndarray], None]


class Arc(NamedTuple):
    """What lies between two leaves; one number a vector.

    Attributes:
      merged: the leaf on the arc.
      angle: radians, [0, pi]; 0 where a vector is zero.
      zero: whether one of the two vectors is zero.
      finite: whether both leaves are, one bool.
    """

    merged: jax.Array
    angle: jax.Array
    zero: jax.Array
    finite: jax.Array


def slerp(
    a: Any, b: Any, weight: float, *, eps: float = 5e-4, rows: bool = False, stacked: Sequence[str] | None = None
) -> Any:
    """The point between two models on the arc between their vectors.

        slerp(a, b, w) = (sin((1 - w) phi) a + sin(w phi) b) / sin(phi)       phi = angle between a and b

    Linear, a + w (b - a), where |cos phi| > 1 - eps (collinear or antipodal) or a vector is zero; antipodal and zero
    vectors are logged as warnings of "jaxlm.weights".  Directions give the angle, the vectors keep their norms.

    Args:
      a, b: trees of float arrays of one shape and type; a single array is a tree too.
      weight: share of b, [0, 1]; 0 gives the bits of a, 1 those of b.
      eps: (0, .1], half-width of the linear zones in the cosine; 5e-4 is 1.81 degrees.
      rows: one vector an output unit (a column of a `kernel`, which is (in, out); a row of any other matrix) instead of
        one a leaf or slice.
      stacked: patterns of the paths that are stacked over layers; None: those under `blocks/`.
    Raises: ValueError for trees that differ, a NaN or infinity (with its path), numbers out of range.

    >>> print(slerp(jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0]), 0.5))
    [0.70710677 1.4142135 ]

    Source: Shoemake 1985; on weights as in mergekit, whose eps and linear zones these are.
    Departs: phi = 2 atan2(|u - v|, |u + v|) of the unit vectors, since an arccos in float32 loses half the digits.
    """
    return interpolate(a, [b], weight=weight, eps=eps, rows=rows, stacked=stacked, _called=("a", "b"))


def interpolate(
    base: Any,
    models: Iterable[Any],
    *,
    weight: float | Literal["mean"] = "mean",
    where: Any = None,
    space: Literal["weights", "task_vectors"] = "weights",
    origin: Any = None,
    eps: float = 5e-4,
    rows: bool = False,
    stacked: Sequence[str] | None = None,
    report: Report | None = None,
    _called: tuple[str, str] | None = None,
) -> Any:
    """Folds models into a base one after another, each time by `slerp`.

        result = base;  for i = 1..N: result = slerp(result, model_i, w_i)       w_i = 1 / (i + 1) for "mean"

    Of nearly collinear models, as models tuned from one base are, "mean" is the mean of the base and all models.

    Args:
      base: where the fold starts.
      models: trees like `base`; an iterator that loads one at a time will do, each is let go before the next is asked.
      weight: "mean", or the same share for each model, [0, 1].
      where: bool tree, the entries that take part; the others keep the base's bits and belong to no vector. None: all.
      space: "weights", or "task_vectors": vectors are differences from `origin`.
      origin: the weights before tuning, for space="task_vectors".
      eps, rows, stacked: as in `slerp`.
      report: called with (number of the model from 1, path, angles in radians, one a vector): how far apart they are.
    Raises: as `slerp`, with the number of the model; ValueError for an unknown space or an origin missing or idle.

    >>> interpolate({"w": jnp.zeros(2)}, [{"w": jnp.ones(2)}, {"w": jnp.full(2, 5.0)}])
    {'w': Array([2., 2.], dtype=float32)}

    Source: CPI-FT, arXiv:2508.21741, stage 3. The paper's weight and fold are not reported: ours.
    """
    if space not in ("weights", "task_vectors"):
        raise ValueError(f"space must be weights or task_vectors, got {space!r}")
    if (origin is None) != (space == "weights"):
        raise ValueError("origin is the tree that space='task_vectors' subtracts: give both or neither")
    if origin is base and base is not None:
        raise ValueError("the base task vector is zero: choose another base, or space='weights'")
    if weight != "mean" and not 0 <= weight <= 1:
        raise ValueError(f"weight must be 'mean' or in [0, 1], got {weight}")
    if not 0 < eps <= 0.1:
        raise ValueError(f"eps must be in (0, .1], got {eps}: it is the width of the linear zones in the cosine")
    paths = list(named_leaves(base))
    layered, _ = match(stacked, (), named_leaves(base))
    for what, other in (("where", where), ("origin", origin)):
        if other is not None:
            check_alike(base, other, ("the base", what), dtypes=what != "where")
    marks = [None] * len(paths) if where is None else jax.tree.leaves(where)
    starts = [None] * len(paths) if origin is None else jax.tree.leaves(origin)
    result = jax.tree.leaves(base)
    for number, model in enumerate(models, 1):
        called = _called or ("the base", f"model {number}")
        check_alike(base, model, called)
        share = 1 / (number + 1) if weight == "mean" else weight
        arcs = []
        for i, (path, leaf) in enumerate(named_leaves(model).items()):
            axes = vector_axes(path, leaf.ndim, stacked=layered[path], rows=rows)
            arc = _arc(result[i], like(result[i], leaf), share, eps, marks[i], starts[i], axes)
            result[i] = like(result[i], arc.merged)
            arcs.append(arc._replace(merged=None))
        _tell(arcs, paths, number, called, report)
        del model, leaf
    return jax.tree.unflatten(jax.tree.structure(base), result)


def vector_axes(path: str, ndim: int, *, stacked: bool, rows: bool) -> tuple[int, ...]:
    """The axes along which one vector lies."""
    first = int(stacked)
    if not rows or ndim - first < 2:
        return tuple(range(first, ndim))
    if path.rpartition("/")[2] == "kernel":
        return tuple(range(first, ndim - 1))
    return tuple(range(first + 1, ndim))


@functools.partial(jax.jit, static_argnames=("axes",))
def _arc(
    a: jax.Array,
    b: jax.Array,
    weight: jax.Array,
    eps: jax.Array,
    where: jax.Array | None,
    origin: jax.Array | None,
    axes: tuple[int, ...],
) -> Arc:
    """Slerp of two leaves, vectors along `axes`."""
    x, y = a.astype(jnp.float32), b.astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(x)) & jnp.all(jnp.isfinite(y))
    if origin is not None:
        start = origin.astype(jnp.float32)
        x, y = x - start, y - start
    marked = (lambda z: z) if where is None else (lambda z: jnp.where(where, z, 0.0))
    u, u_is_zero = _unit(marked(x), axes)
    v, v_is_zero = _unit(marked(y), axes)
    angle = 2 * jnp.arctan2(_norm(u - v, axes), _norm(u + v, axes))
    zero = u_is_zero | v_is_zero
    linear = zero | (jnp.abs(jnp.cos(angle)) > 1 - eps)
    merged = _along(x, y, weight, angle, linear)
    merged = _with_exact_ends(a, b, (merged if origin is None else merged + start).astype(a.dtype), weight, linear)
    if where is not None:
        merged = jnp.where(where, merged, a)
    return Arc(merged, jnp.where(zero, 0.0, angle).reshape(-1), zero.reshape(-1), finite)


@jax.jit
def on_arc(a: jax.Array, b: jax.Array, weight: jax.Array, angle: jax.Array, linear: jax.Array) -> jax.Array:
    """A piece of two vectors whose angle is known, merged; linearly if told so."""
    return _with_exact_ends(a, b, _along(a, b, weight, angle, linear), weight, linear)


def _along(x: jax.Array, y: jax.Array, weight: jax.Array, angle: jax.Array, linear: jax.Array) -> jax.Array:
    safe = jnp.where(linear, 1.0, angle)
    from_x, from_y = jnp.sin((1 - weight) * safe) / jnp.sin(safe), jnp.sin(weight * safe) / jnp.sin(safe)
    return jnp.where(linear, x + weight * (y - x), from_x * x + from_y * y)


def _with_exact_ends(a: jax.Array, b: jax.Array, merged: jax.Array, weight: jax.Array, linear: jax.Array) -> jax.Array:
    same = linear & (a == b)  # keeps -0.0, and the bits of equal task vectors
    return jnp.where(weight == 1, b, jnp.where(same | (weight == 0), a, merged))


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axes, keepdims=True))


def _unit(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The direction of each vector, and whether it has none; its largest entry becomes 1 first: no square is lost."""
    largest = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0.0)
    zero = largest == 0
    x = x / jnp.where(zero, 1.0, largest)
    return x / jnp.where(zero, 1.0, _norm(x, axes)), zero


def _tell(arcs: list[Arc], paths: list[str], number: int, called: tuple[str, str], report: Report | None) -> None:
    """Refuses what is not finite, logs what had no arc, hands on the angles; waits for one model."""
    if any(isinstance(arc.finite, jax.core.Tracer) for arc in arcs):
        return  # inside somebody's jit there is nothing to read
    for path, arc in zip(paths, jax.device_get(arcs), strict=True):
        if not arc.finite:
            raise ValueError(f"{path} holds a NaN or an infinity in {called[1]} or {called[0]}: it cannot be merged")
        if zeros := int(arc.zero.sum()):
            log.warning("%s: %d of %d vectors are zero in %s or %s; merged linearly",
                        path, zeros, arc.zero.size, *called)  # fmt: skip
        if opposite := int((arc.angle > math.pi - 1e-3).sum()):
            log.warning("%s: %d of %d vectors of %s point away from %s; merged linearly, so they may cancel",
                        path, opposite, arc.zero.size, called[1], called[0])  # fmt: skip
        if report is not None:
            report(number, path, arc.angle)


def like(leaf: Any, other: Any) -> Any:
    """`other` where `leaf` lives: the same devices, divided in the same way."""
    if isinstance(leaf, jax.core.Tracer) or isinstance(other, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return other
    return jax.device_put(other, leaf.sharding)
