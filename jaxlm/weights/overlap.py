# SPDX-License-Identifier: Apache-2.0
"""How much sets of entries share: Jaccard overlap beside its chance level, and the groups that follow from it.

A set of entries, such as a task's core, is a tree of bool arrays shaped like the parameters, True = in the set.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.weights.alike import check_alike
from jaxlm.weights.names import named_leaves

Mode = Literal["threshold", "joint", "separate"]
MODES = ("threshold", "joint", "separate")
_LIMIT = 2**31  # int32 counts fewer entries than this


def jaccard(a: Any, b: Any) -> float:
    """The overlap |a and b| / |a or b| of two sets, from exact counts.

    Args:
      a, b: bool trees of one shape, on any devices; every process gets the number.
    Returns: in [0, 1]; 0 for two empty sets, which share nothing.
    Raises: ValueError for trees that differ or hold something else than bool.

    >>> jaccard({"w": np.array([True, True, False])}, {"w": np.array([False, True, True])})
    0.3333333333333333
    """
    _check_sets([a, b])
    return _jaccard(list(named_leaves(a).values()), list(named_leaves(b).values()))


def chance_jaccard(fraction: float) -> float:
    """The overlap that two random sets of this share have: q / (2 - q).

    Args:
      fraction: share q of the entries that is in each set, [0, 1].
    Raises: ValueError outside of it.

    >>> print(f"{chance_jaccard(0.01):.4f}")
    0.0050
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}: it is the share of the entries in each set")
    return fraction / (2 - fraction)


def overlap_table(cores: Sequence[Any]) -> np.ndarray:
    """Jaccard overlap of every pair of sets: [N, N] float64, symmetric, 1 on the diagonal of sets that hold something.

    Args:
      cores: N bool trees of one shape; N (N + 1) / 2 passes over them.
    Raises: as `jaccard`, with the number of the set.
    """
    _check_sets(cores)
    leaves = [list(named_leaves(core).values()) for core in cores]
    table = np.zeros((len(cores), len(cores)))
    for i in range(len(cores)):
        for j in range(i, len(cores)):
            table[i, j] = table[j, i] = _jaccard(leaves[i], leaves[j])
    return table


def core_groups(cores: Any, *, threshold: float = 0.1, mode: Mode = "threshold") -> list[list[int]]:
    """Groups of tasks whose sets overlap: connected components of the graph with an edge where the overlap is enough.

    Sets joined through a third one share a group even if they have nothing in common.

    Args:
      cores: N bool trees, or their overlap table [N, N].
      threshold: Jaccard overlap of an edge, (0, 1]; .1 means that sets of equal size have 18 % in common.
      mode: "threshold"; "joint", all in one group; "separate", each alone.
    Returns: the numbers of the tasks; each group is sorted, and groups come in the order of their first members.
    Raises: ValueError for an unknown mode or a threshold outside (0, 1]; as `jaccard`.

    >>> core_groups(np.array([[1, 0.2, 0], [0.2, 1, 0], [0, 0, 1]]))
    [[0, 1], [2]]

    Source: CPI-FT, arXiv:2508.21741, stage 2.
    Departs: its sweep calls threshold 0 "no grouping", but every overlap is >= 0; hence the modes.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not 0 < threshold <= 1:
        hint = ": every overlap is >= 0, so that all would share a group; say mode='joint'" if threshold == 0 else ""
        raise ValueError(f"threshold must be in (0, 1], got {threshold}{hint}")
    given = isinstance(cores, np.ndarray)
    if given and (cores.ndim != 2 or cores.shape[0] != cores.shape[1] or not np.array_equal(cores, cores.T)):
        raise ValueError(f"an overlap table is a symmetric [N, N] array without NaN, got shape {cores.shape}")
    if mode == "joint":
        return [list(range(len(cores)))]
    if mode == "separate":
        return [[i] for i in range(len(cores))]
    return _components((cores if given else overlap_table(cores)) >= threshold)


def _components(edges: np.ndarray) -> list[list[int]]:
    """Connected components of a symmetric bool [N, N]."""
    left, groups = list(range(len(edges))), []
    while left:
        group = [left.pop(0)]
        for member in group:  # it grows while it is read
            joined = [other for other in left if edges[member, other]]
            group += joined
            left = [other for other in left if other not in joined]
        groups.append(sorted(group))
    return groups


def _check_sets(cores: Sequence[Any]) -> None:
    for number, core in enumerate(cores):
        for path, leaf in named_leaves(core).items():
            if leaf.dtype != bool:
                raise ValueError(f"set {number} holds {leaf.dtype} in {path!r}: a set is a tree of bool")
        check_alike(cores[0], core, ("set 0", f"set {number}"))


def _jaccard(a: list[Any], b: list[Any]) -> float:
    counts = [_counts(x, y) for x, y in zip(a, b, strict=True)]  # all are queued before any is read
    both, either = (sum(_whole(count[i]) for count in counts) for i in (0, 1))
    return float(Fraction(both, either)) if either else 0.0


@jax.jit
def _counts(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _limbs(a & b), _limbs(a | b)


def _limbs(mask: jax.Array) -> jax.Array:
    """The number of True as four limbs of base 256, not carried: exact in int32 beyond 2^31 entries."""
    kept = next(n for n in range(mask.ndim + 1) if math.prod(mask.shape[n:]) < _LIMIT)
    counts = jnp.sum(mask, axis=tuple(range(kept, mask.ndim)), dtype=jnp.int32)
    return _limbs_of(counts)


def _limbs_of(counts: jax.Array) -> jax.Array:
    """The sum of non-negative int32 counts as four limbs; fewer than 2^23 counts."""
    assert counts.size < 2**23, f"{counts.size} counts could overflow a limb"
    return jnp.stack([jnp.sum(counts >> shift & 0xFF, dtype=jnp.int32) for shift in (0, 8, 16, 24)])


def _whole(limbs: jax.Array) -> int:
    return sum(int(limb) << 8 * i for i, limb in enumerate(np.asarray(limbs)))
