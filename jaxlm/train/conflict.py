# SPDX-License-Identifier: Apache-2.0
"""Do tasks pull parameters in opposite directions: cosines between their gradients, and how sure those are.

N tasks, M blocks of a task's rows, K = N * M, R resamples.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.losses.term import Term
from jaxlm.train.feeding import own_rows, to_devices
from jaxlm.train.mesh import row_devices
from jaxlm.train.phase import LossFn, Params

GradFn = Callable[[Params, Any], tuple[Params, Any]]
_LEAST_RELIABILITY = 0.05


class Cosines(NamedTuple):
    """Cosines between the tasks' gradients, over all entries or some of them. Arrays are [N, N] unless said.

    Attributes:
      cos: <G_i, G_j> / (|G_i| |G_j|); NaN where a gradient is 0, or of no entries.
      low, high: their 95 % interval over rows; NaN without blocks.
      reliability: [N] cosine between the gradients of a task's two halves; NaN without halves. Noise makes it, and all
        cosines, smaller.
      corrected: cosines of half-sample gradients over sqrt(reliability_i * reliability_j), what they would be without
        that noise, not clipped; NaN where a reliability is 0.05 or less.
      mean_cos: over pairs i < j.
      negative: share of pairs with cos < 0.
      conflict: share of pairs whose whole interval lies below 0; NaN without blocks.
    """

    cos: np.ndarray
    low: np.ndarray
    high: np.ndarray
    reliability: np.ndarray
    corrected: np.ndarray
    mean_cos: float
    negative: float
    conflict: float


class Conflict(NamedTuple):
    """What `gradient_conflict` finds: tasks in order, [N] norms of their mean gradients, cosines of all entries, of the
    held ones and of the free ones (None without a mask), and how many rows of a task were used."""

    tasks: tuple[str, ...]
    norms: np.ndarray
    whole: Cosines
    held: Cosines | None
    free: Cosines | None
    num_rows: int


def gradient_conflict(
    grad_fn: GradFn,
    params: Params,
    batches_by_task: Mapping[str, Iterable[Any]],
    *,
    mask: Any = None,
    samples: int = 512,
    halves: bool = True,
    blocks: int = 16,
    resamples: int = 10_000,
    seed: int = 0,
) -> Conflict:
    """Cosines between the gradients of tasks at the same parameters.

        G_i = sum over rows of the gradient of the summed loss / sum of weights,  cos_ij = <G_i, G_j> / (|G_i| |G_j|)

    Rows are dealt to blocks in turn (row r to block r mod M), so that how they came in batches does not matter; the
    blocks are what the interval is drawn from, every second one makes a half.

    Args:
      grad_fn: `(params, batch) -> (gradient of the SUMMED loss, weight)`, dropout off; `summed_gradient` makes one.
      params: any sharding.
      batches_by_task: task -> batches, any trees of arrays [rows, ...] on the host, this process's rows. With one
        record a row, rows are records.
      mask: a bool tree like `params`, True = held: cosines of both parts are told too.
      samples: rows a task, taken from the front; fewer if a task has fewer, the same number for all.
      halves: tell the reliability.
      blocks: M; 1: no interval. N * M gradients are kept at a time: 0.5 GB each at 135 million parameters.
      resamples, seed: of the interval.
    Returns: `Conflict`. Inner products are taken leaf by leaf, in float32, and added in float64.
    Raises: ValueError for a task with fewer rows than blocks, or without a weighted token.

    >>> grad_fn = jax.grad(lambda w, x: jnp.sum(x @ w))
    >>> found = gradient_conflict(
    ...     lambda w, x: (grad_fn(w, x), len(x)), jnp.zeros(2),
    ...     {"right": [np.array([[1.0, 0.0], [1.0, 0.0]])], "left": [np.array([[-1.0, 0.0], [-1.0, 0.0]])]}, blocks=2,
    ... )
    >>> found.whole.mean_cos, found.whole.conflict
    (-1.0, 1.0)

    Departs: the papers that report a gradient conflict give no definition; this one is ours.
    """
    if blocks < 1 or (halves and blocks % 2):
        raise ValueError(f"blocks must be at least 1, and even for halves; got {blocks}")
    tasks = tuple(batches_by_task)
    given = {task: _first_rows(batches, samples) for task, batches in batches_by_task.items()}
    counts = {task: _num_rows(tree) for task, (tree, _) in given.items()}
    num_rows = min(counts.values()) // blocks * blocks
    if not num_rows:
        least = min(counts, key=counts.__getitem__)
        raise ValueError(f"task {least!r} has {counts[least]} rows for {blocks} blocks: give it more, or fewer blocks")
    gradients, weights = [], np.zeros(len(tasks))
    for i, (tree, batch_rows) in enumerate(given.values()):
        at_once = math.gcd(num_rows // blocks, batch_rows)
        for block in range(blocks):
            mine = jax.tree.map(lambda x, block=block: x[block:num_rows:blocks], tree)
            gradient, weight = _summed(grad_fn, params, mine, at_once)
            gradients.append(jax.tree.leaves(gradient))
            weights[i] += weight
        if not weights[i] > 0:
            raise ValueError(f"task {tasks[i]!r} has no weighted token in {num_rows} rows: it has no gradient")
    leaves = list(zip(*gradients, strict=True))  # for each leaf its K gradients
    draws = np.random.Generator(np.random.PCG64(seed)).multinomial(
        blocks, np.full(blocks, 1 / blocks), (resamples, len(tasks))
    )
    told = functools.partial(_cosines, num_tasks=len(tasks), halves=halves, draws=draws if blocks > 1 else None)
    held, free = None, None
    if mask is None:
        whole = _gram(leaves)
    else:
        masks = jax.tree.leaves(mask)
        of_held, of_free = _gram(leaves, masks), _gram(leaves, [~jnp.asarray(m) for m in masks])
        whole, held, free = of_held + of_free, told(of_held), told(of_free)
    norms = np.sqrt(_of_tasks(whole, len(tasks)).diagonal()) / weights
    return Conflict(tasks, norms, told(whole), held, free, num_rows)


def summed_gradient(loss_fn: LossFn, *, term: str | None = None, mesh: jax.sharding.Mesh | None = None) -> GradFn:
    """The gradient of a loss's total and its weight, as `gradient_conflict` wants them, compiled once a shape.

    Args:
      loss_fn: of a `Phase`; its key is always the same.
      term: whose total; None: the only one with a coefficient.
      mesh: of the devices, rows are filled up with zeros to divide over it, which must weigh nothing. None: the
        default device.
    Raises: ValueError if several terms have a coefficient and none is named.
    """

    def chosen(terms: Mapping[str, Term]) -> Term:
        names = [name for name, one in terms.items() if one.coefficient] if term is None else [term]
        if len(names) != 1 or names[0] not in terms:
            raise ValueError(f"name one term of the loss, term=; it has {', '.join(terms)}, asked for {names}")
        return terms[names[0]]

    def total(params: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
        found = chosen(loss_fn(params, batch, jax.random.key(0)))
        return found.total, found.weight

    compiled = jax.jit(jax.grad(total, has_aux=True))

    def grad_fn(params: Params, batch: Any) -> tuple[Params, Any]:
        batch = {name: x for name, x in batch.items() if name != "record_ids"}
        if mesh is not None:
            missing = -_num_rows(batch) % len(own_rows(mesh, row_devices(mesh)))
            batch = {name: np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for name, x in batch.items()}
            batch = {name: to_devices(mesh, x) for name, x in batch.items()}
        return compiled(params, batch)

    return grad_fn


def _first_rows(batches: Iterable[Any], samples: int) -> tuple[Any, int]:
    """The first rows of a task as one tree on the host, and how many a batch had."""
    parts: list[Any] = []
    batches = iter(batches)
    while sum(map(_num_rows, parts)) < samples and (batch := next(batches, None)) is not None:
        parts.append(jax.tree.map(np.asarray, batch))
    if not parts:
        raise ValueError("a task without batches has no gradient")
    return jax.tree.map(lambda *x: np.concatenate(x)[:samples], *parts), _num_rows(parts[0])


def _num_rows(tree: Any) -> int:
    return len(jax.tree.leaves(tree)[0])


def _summed(grad_fn: GradFn, params: Params, tree: Any, at_once: int) -> tuple[Params, float]:
    """Gradient and weight of rows, `at_once` of them at a time."""
    summed, weight = None, 0.0
    for start in range(0, _num_rows(tree), at_once):
        found, more = grad_fn(params, jax.tree.map(lambda x, start=start: x[start : start + at_once], tree))
        summed = found if summed is None else _add(summed, found)
        weight += float(more)
    return summed, weight


@jax.jit
def _add(a: Params, b: Params) -> Params:
    return jax.tree.map(lambda x, y: x.astype(jnp.float32) + y.astype(jnp.float32), a, b)


def _gram(leaves: list[tuple[jax.Array, ...]], masks: list[Any] | None = None) -> np.ndarray:
    """[K, K] float64 inner products of the gradients, of the masked entries if there are masks."""
    each = [
        _gram_of_leaf(gradients, None if masks is None else masks[number]) for number, gradients in enumerate(leaves)
    ]
    return np.sum([np.asarray(x, np.float64) for x in each], axis=0)


@jax.jit
def _gram_of_leaf(gradients: tuple[jax.Array, ...], mask: jax.Array | None) -> jax.Array:
    stacked = jnp.stack([x.astype(jnp.float32) if mask is None else jnp.where(mask, x, 0.0) for x in gradients])
    inner = tuple(range(1, stacked.ndim))
    return jax.lax.dot_general(
        stacked, stacked, ((inner, inner), ((), ())), precision="highest", preferred_element_type=jnp.float32
    )


def _of_tasks(gram: np.ndarray, num_tasks: int) -> np.ndarray:
    """[K, K] of blocks -> [N, N] of their sums."""
    blocks = len(gram) // num_tasks
    return gram.reshape(num_tasks, blocks, num_tasks, blocks).sum(axis=(1, 3))


def _normalized(gram: np.ndarray) -> np.ndarray:
    """Inner products [..., N, N] -> cosines; NaN where a vector is 0."""
    squares = np.diagonal(gram, axis1=-2, axis2=-1)
    norms = np.sqrt(np.where(squares > 0, squares, np.nan))
    return gram / norms[..., :, None] / norms[..., None, :]


def _cosines(gram: np.ndarray, *, num_tasks: int, halves: bool, draws: np.ndarray | None) -> Cosines:
    """Everything told about one set of entries, from the inner products of all blocks; draws [R, N, M]."""
    cos = _normalized(_of_tasks(gram, num_tasks))
    pairs = np.triu_indices(num_tasks, 1)
    nowhere = np.full(cos.shape, np.nan)
    low, high = nowhere, nowhere
    if draws is not None:
        blocked = gram.reshape(num_tasks, -1, num_tasks, draws.shape[2])
        drawn = np.stack(
            [np.einsum("rjb,rjb->rj", np.tensordot(draws[:, i], blocked[i], 1), draws) for i in range(num_tasks)], 1
        )
        low, high = np.percentile(_normalized(drawn), [2.5, 97.5], axis=0)
    reliability, corrected = np.full(num_tasks, np.nan), nowhere
    if halves:
        reliability, corrected = _without_noise(gram, num_tasks)
    conflict = float(np.mean(high[pairs] < 0)) if draws is not None and np.isfinite(cos[pairs]).all() else np.nan
    mean_cos = float(np.mean(cos[pairs])) if num_tasks > 1 else np.nan
    negative = float(np.mean(cos[pairs] < 0)) if np.isfinite(mean_cos) else np.nan
    return Cosines(cos, low, high, reliability, corrected, mean_cos, negative, conflict)


def _without_noise(gram: np.ndarray, num_tasks: int) -> tuple[np.ndarray, np.ndarray]:
    """[N] cosines between halves, and [N, N] those of halves of different tasks over what noise has left of them."""
    blocks = len(gram) // num_tasks
    split = gram.reshape(num_tasks, blocks // 2, 2, num_tasks, blocks // 2, 2).sum(axis=(1, 4))  # [N, 2, N, 2]
    cos = _normalized(split.reshape(2 * num_tasks, 2 * num_tasks)).reshape(num_tasks, 2, num_tasks, 2)
    reliability = np.array([cos[i, 0, i, 1] for i in range(num_tasks)])
    enough = np.where(reliability > _LEAST_RELIABILITY, reliability, np.nan)
    corrected = cos.mean(axis=(1, 3)) / np.sqrt(enough[:, None] * enough)
    np.fill_diagonal(corrected, np.where(np.isnan(enough), np.nan, 1.0))
    return reliability, corrected
