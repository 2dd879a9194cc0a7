# SPDX-License-Identifier: Apache-2.0
"""How one tensor of several models becomes one, piece by piece: the arithmetic of `jaxlm.weights` on flat pieces.

A recipe first walks the pieces for what it must know of the whole tensor (angles, cuts, sums), then makes each piece of
the result from the same piece of every source.  Sources: the base first if the recipe has one, then the models.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.weights.merging import on_arc
from jaxlm.weights.select import Scored, fmix32, num_held, ordered, salt
from jaxlm.weights.task_vectors import (
    Rescale,
    Weights,
    add,
    check_dare,
    check_share,
    divisor_of,
    elect,
    kept,
    ratio,
    settle,
    sums_of_sizes,
    weights_of,
)
from jaxlm.weights.transplanting import Overlap, resolved, take_over, unowned

PIECE, SMALL = 2**19, 2**13  # entries; a piece is one of these two sizes, so that each function compiles twice

Piece = list[jax.Array]  # float32, one a source; zeros where the tensor has ended
Make = Callable[[int, Piece], jax.Array]


class Tensor:
    """One tensor of all sources, in pieces.

    Attributes:
      name: of the tensor.
      size: entries.
      sources: flat maps, one a source.
    """

    def __init__(self, name: str, sources: Sequence[np.ndarray]):
        self.name, self.size, self.sources = name, sources[0].size, sources

    def starts(self) -> Iterator[tuple[int, int]]:
        """(first entry, entries) of each piece."""
        start = 0
        while start < self.size:
            length = PIECE if self.size - start >= PIECE else SMALL
            yield start, min(length, self.size - start)
            start += length

    def piece(self, start: int, count: int, which: Sequence[int] | None = None) -> Piece:
        """The same piece of every source, or of those named."""
        chosen = self.sources if which is None else [self.sources[i] for i in which]
        return [_widen(_padded(source[start : start + count])) for source in chosen]

    def finite(self, pieces: Piece) -> jax.Array:
        """Whether each of these is finite throughout, [sources]."""
        return _finite(pieces)


@jax.jit
def _finite(pieces: Piece) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(part)) for part in pieces])


def _padded(part: np.ndarray) -> np.ndarray:
    length = PIECE if part.size == PIECE else SMALL
    if part.dtype == np.float64:
        part = part.astype(np.float32)
    return part if part.size == length else np.concatenate([part, np.zeros(length - part.size, part.dtype)])


@jax.jit
def _widen(part: jax.Array) -> jax.Array:
    return part.astype(jnp.float32)


class Recipe(Protocol):
    """A method of merging and its numbers.

    Attributes:
      based: whether the first source is a base rather than a model.
    """

    based: ClassVar[bool]

    def check(self, num_models: int) -> None:
        """Raises ValueError if this many models cannot be merged so."""

    def maker(self, tensor: Tensor) -> Make:
        """Looks at a whole tensor and returns what makes a piece of the result: (first entry, sources) to float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """`jaxlm.weights.linear`, the weighted mean of models."""

    based: ClassVar[bool] = False
    weights: Weights = 1.0
    normalize: bool = True

    def check(self, num_models: int) -> None:
        """Weights fit."""
        divisor_of(weights_of(self.weights, num_models), self.normalize)

    def maker(self, tensor: Tensor) -> Make:
        """Nothing to look at."""
        weights = weights_of(self.weights, len(tensor.sources))
        divisor = divisor_of(weights, self.normalize)
        return lambda start, piece: _summed(None, piece, weights, [(None, 1.0)] * len(piece), divisor, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soup:
    """`jaxlm.weights.soup`, the plain mean of models."""

    based: ClassVar[bool] = False

    def check(self, num_models: int) -> None:
        """Any number of models."""

    def maker(self, tensor: Tensor) -> Make:
        """As `Linear`."""
        return Linear().maker(tensor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slerp:
    """`jaxlm.weights.slerp` of two models, one vector a tensor."""

    based: ClassVar[bool] = False
    weight: float = 0.5
    eps: float = 5e-4

    def check(self, num_models: int) -> None:
        """Two models, numbers in range."""
        if num_models != 2:
            raise ValueError(f"slerp merges two models, got {num_models}: merge the result with the next one")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must be in [0, 1], got {self.weight}")
        if not 0 < self.eps <= 0.1:
            raise ValueError(f"eps must be in (0, .1], got {self.eps}")

    def maker(self, tensor: Tensor) -> Make:
        """The angle between the two."""
        angle, zero = _angle(tensor)
        linear = zero or abs(math.cos(angle)) > 1 - self.eps
        return lambda start, piece: on_arc(*piece, self.weight, angle, linear)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskArithmetic:
    """`jaxlm.weights.task_arithmetic`, the base plus task vectors."""

    based: ClassVar[bool] = True
    weights: Weights = 1.0
    scale: float = 1.0
    normalize: bool = False

    def check(self, num_models: int) -> None:
        """Weights fit."""
        divisor_of(weights_of(self.weights, num_models), self.normalize)

    def maker(self, tensor: Tensor) -> Make:
        """Nothing to look at."""
        weights = weights_of(self.weights, len(tensor.sources) - 1)
        divisor, whole = divisor_of(weights, self.normalize), [(None, 1.0)] * len(weights)
        return lambda start, piece: _summed(piece[0], piece[1:], weights, whole, divisor, self.scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ties:
    """`jaxlm.weights.ties`, the largest part of each tensor's task vectors, where signs agree."""

    based: ClassVar[bool] = True
    density: float = 0.2
    weights: Weights = 1.0
    scale: float = 1.0
    normalize: bool = True

    def check(self, num_models: int) -> None:
        """Weights fit, the density is a share."""
        weights_of(self.weights, num_models)
        check_share(self.density)

    def maker(self, tensor: Tensor) -> Make:
        """The cuts that leave the share."""
        weights = weights_of(self.weights, len(tensor.sources) - 1)
        models = range(1, len(tensor.sources))
        cuts = [None if self.density == 1 else _cut(tensor, model, self.density) for model in models]
        start_of_hash = _salt(tensor.name, 0)

        def make(start: int, piece: Piece) -> jax.Array:
            base, *theirs = piece
            keeps = [
                None if cut is None else _above(base, model, *cut, np.uint32(start % 2**32), start_of_hash)
                for model, cut in zip(theirs, cuts, strict=True)
            ]
            return _elected(base, theirs, weights, keeps, [1.0] * len(theirs), self.scale, self.normalize)

        return make


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dare:
    """`jaxlm.weights.dare`, a random part of the task vectors, scaled up; or `dare_ties`, with signs="elected"."""

    based: ClassVar[bool] = True
    density: float
    seed: int = 0
    weights: Weights = 1.0
    scale: float = 1.0
    normalize: bool = False
    rescale: Rescale = "share"
    signs: Literal["all", "elected"] = "all"

    def check(self, num_models: int) -> None:
        """Weights fit, numbers are in range."""
        divisor_of(weights_of(self.weights, num_models), self.normalize and self.signs == "all")
        check_dare(self.density, self.seed, self.rescale)

    def maker(self, tensor: Tensor) -> Make:
        """The factors, if they depend on the tensor."""
        drops = _drops(tensor, self.density, self.seed, self.rescale)
        weights = weights_of(self.weights, len(drops))

        def make(start: int, piece: Piece) -> jax.Array:
            base, *theirs = piece
            dropped = [drop(start, base.size) for drop in drops]
            if self.signs == "elected":
                keeps, factors = ([pair[i] for pair in dropped] for i in (0, 1))
                return _elected(base, theirs, weights, keeps, factors, self.scale, self.normalize)
            return _summed(base, theirs, weights, dropped, divisor_of(weights, self.normalize), self.scale)

        return make


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transplant:
    """`jaxlm.weights.transplant`: entries of a model's core as they are there, all others as in the base.

    Attributes:
      cores: one file or folder of bool safetensors a model, with the models' names and shapes.
      overlap: as of `transplant`, but for "group"; "last" is the last model given.
      origin: folder of the weights before tuning; needed for "largest".
    """

    based: ClassVar[bool] = True
    cores: Sequence[str]
    overlap: Overlap = "largest"
    origin: str | None = None

    def check(self, num_models: int) -> None:
        """A core a model, an origin if sizes are needed."""
        if len(self.cores) != num_models:
            raise ValueError(f"got {len(self.cores)} cores for {num_models} models: each model has its own")
        if self.overlap not in ("largest", "mean", "last"):
            raise ValueError(f"overlap must be largest, mean or last, got {self.overlap!r}")
        if (self.overlap == "largest") != (self.origin is not None):
            raise ValueError("origin, the folder of the weights before tuning, goes with overlap='largest': there it "
                             "says how far each entry moved")  # fmt: skip

    def maker(self, tensor: Tensor) -> Make:
        """Nothing to look at."""
        number = len(self.cores)

        def make(start: int, piece: Piece) -> jax.Array:
            base, models, marks = piece[0], piece[1 : 1 + number], piece[1 + number : 1 + 2 * number]
            owned = unowned(base, self.overlap, self.overlap == "largest")
            for rank, (model, mark) in enumerate(zip(models, marks, strict=True), 1):
                size = _distance(model, piece[-1]) if self.overlap == "largest" else None
                owned, _ = take_over(owned, model, mark != 0, size, rank, self.overlap)
            return resolved(base, owned, self.overlap)

        return make


METHODS: dict[str, tuple[Callable[..., Recipe], dict[str, Any]]] = {
    "linear": (Linear, {}),
    "soup": (Soup, {}),
    "slerp": (Slerp, {}),
    "task_arithmetic": (TaskArithmetic, {}),
    "ties": (Ties, {}),
    "dare_linear": (Dare, {"signs": "all"}),
    "dare_ties": (Dare, {"signs": "elected"}),
    "transplant": (Transplant, {}),
}


def fields_of(method: str, *, needed: bool = False) -> list[str]:
    """The numbers that a method of METHODS reads; or those only that it cannot do without."""
    make, fixed = METHODS[method]
    assert isinstance(make, type) and dataclasses.is_dataclass(make)
    return [
        field.name
        for field in dataclasses.fields(make)
        if field.name not in fixed and not (needed and field.default is not dataclasses.MISSING)
    ]


def _summed(
    base: Any, models: Piece, weights: Sequence[float], kept_of: Sequence[Any], divisor: float, scale: float
) -> jax.Array:
    total = _zeros(models[0].size)
    for model, weight, (keep, factor) in zip(models, weights, kept_of, strict=True):
        total, _ = add(total, base, model, weight, keep, factor)
    return settle(base, total, divisor, scale, jnp.float32)


def _elected(
    base: jax.Array, models: Piece, weights: Any, keeps: Any, factors: Any, scale: float, normalize: bool
) -> jax.Array:
    total, divisor, _ = elect(base, models, weights, keeps, factors, normalize)
    return settle(base, total, divisor, scale, jnp.float32)


@functools.cache
def _zeros(size: int) -> jax.Array:
    return jnp.zeros(size, jnp.float32)


def _each(tensor: Tensor, look: Callable[[int, Piece], Any], which: Sequence[int] | None = None) -> Iterator[Any]:
    """What `look` sees in each piece, on the host. One piece is looked at while the next is read, no more wait."""
    before = None
    for start, count in tensor.starts():
        seen = look(start, tensor.piece(start, count, which))
        if before is not None:
            yield jax.device_get(before)
        before = seen
    if before is not None:
        yield jax.device_get(before)


def _angle(tensor: Tensor) -> tuple[float, bool]:
    """Radians between two sources, and whether one of them is zero."""
    looked = list(_each(tensor, lambda start, piece: _sizes(*piece)))
    largest, squares = np.max([x for x, _ in looked], axis=0), np.sum([x for _, x in looked], axis=0, dtype=np.float64)
    if not largest.all() or not np.isfinite(largest).all():
        return 0.0, True
    scale = np.where((largest > 1e-15) & (largest < 1e15), np.float32(1), largest)
    if (scale != 1).any():  # squares would leave the range of float32
        looked = list(_each(tensor, lambda start, piece: _sizes(piece[0] / scale[0], piece[1] / scale[1])))
        squares = np.sum([x for _, x in looked], axis=0, dtype=np.float64)
    norms = scale.astype(np.float64) * np.sqrt(squares)
    gaps = np.sum(list(_each(tensor, lambda start, piece: _gaps(*piece, *norms))), axis=0, dtype=np.float64)
    return float(2 * np.arctan2(*np.sqrt(gaps))), False


@jax.jit
def _sizes(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    both = jnp.stack([jnp.max(jnp.abs(a)), jnp.max(jnp.abs(b))])
    return both, jnp.stack([jnp.sum(a * a), jnp.sum(b * b)])


@jax.jit
def _gaps(a: jax.Array, b: jax.Array, norm_a: jax.Array, norm_b: jax.Array) -> jax.Array:
    """Squares of the difference and of the sum of two directions."""
    u, v = a / norm_a, b / norm_b
    return jnp.stack([jnp.sum((u - v) ** 2), jnp.sum((u + v) ** 2)])


@jax.jit
def _distance(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.abs(a - b)


def _salt(name: str, seed: int) -> Any:
    return salt(Scored(name, (1,), False, None, ordered), seed)[0]


@jax.jit
def _keys(base: jax.Array, model: jax.Array) -> jax.Array:
    return ordered(jnp.abs(model - base))


@jax.jit
def _places(like: jax.Array, start: jax.Array, salted: jax.Array) -> jax.Array:
    return fmix32((start + jnp.arange(like.size, dtype=jnp.uint32)) ^ salted)


@jax.jit
def _above(
    base: jax.Array, model: jax.Array, cut: jax.Array, end: jax.Array, start: jax.Array, salted: jax.Array
) -> jax.Array:
    keys = _keys(base, model)
    return (keys > cut) | ((keys == cut) & (_places(keys, start, salted) <= end))


def _cut(tensor: Tensor, model: int, density: float) -> tuple[np.uint32, np.uint32]:
    """The key of the last task vector entry that stays, and the last hashed place of those equal to it.

    Found by counting the upper and then the lower half of the keys; the same set as `select.largest` makes.
    """
    wanted = num_held(density, tensor.size)
    if wanted == 0:
        return np.uint32(2**32 - 1), np.uint32(0)

    def keys() -> Iterator[tuple[int, np.ndarray]]:
        each = _each(tensor, lambda start, piece: _keys(*piece), (0, model))
        for (start, count), found in zip(tensor.starts(), each, strict=True):
            yield start, found[:count]

    upper, wanted = _bin(np.sum([np.bincount(k >> 16, minlength=2**16) for _, k in keys()], axis=0), wanted)
    lows = [np.bincount(k[k >> 16 == upper] & 0xFFFF, minlength=2**16) for _, k in keys()]
    counts = np.sum(lows, axis=0)
    lower, wanted = _bin(counts, wanted)
    cut = np.uint32(upper << 16 | lower)
    if wanted == counts[lower]:
        return cut, np.uint32(2**32 - 1)
    salted = _salt(tensor.name, 0)
    ties = [np.asarray(_places(_zeros(_length(k)), np.uint32(start % 2**32), salted))[: k.size][k == cut]
            for start, k in keys()]  # fmt: skip
    return cut, np.partition(np.concatenate(ties), wanted - 1)[wanted - 1]


def _length(part: np.ndarray) -> int:
    return PIECE if part.size == PIECE else SMALL


def _bin(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """The bin, from above, in which the wanted-th entry lies, and how many are wanted of it."""
    reached = np.cumsum(counts[::-1])
    place = int(np.searchsorted(reached, wanted))
    return counts.size - 1 - place, wanted - int(reached[place] - counts[::-1][place])


def _drops(tensor: Tensor, density: float, seed: int, rescale: str) -> list[Callable[[int, int], tuple[Any, Any]]]:
    """For each model what makes (entries that stay, their factor) of a piece."""
    drops: list[Callable[[int, int], tuple[Any, Any]]] = []
    for number in range(1, len(tensor.sources)):
        if density == 1:
            drops.append(lambda start, size: (None, 1.0))
            continue
        salted, factor = _salt(tensor.name, seed + number), 1 / density if rescale == "share" else 1.0
        if rescale == "norm":
            look = functools.partial(_sums_of, salted=salted, density=density)
            whole, part = np.array(list(_each(tensor, look, (0, number))), np.float64).sum(axis=0)
            factor = float(ratio(whole, part))
        drops.append(functools.partial(_drop, salted=salted, density=density, factor=factor))
    return drops


def _drop(start: int, size: int, *, salted: Any, density: float, factor: float) -> tuple[jax.Array, float]:
    return _stays(_zeros(size), np.uint32(start % 2**32), salted, density), factor


@functools.partial(jax.jit, static_argnums=3)
def _stays(like: jax.Array, start: jax.Array, salted: jax.Array, density: float) -> jax.Array:
    return kept(_places(like, start, salted), density)


def _sums_of(start: int, piece: Piece, *, salted: Any, density: float) -> jax.Array:
    return _sums(*piece, np.uint32(start % 2**32), salted, density)


@functools.partial(jax.jit, static_argnums=4)
def _sums(base: jax.Array, model: jax.Array, start: jax.Array, salted: jax.Array, density: float) -> Any:
    sums = sums_of_sizes(base, model, _stays(base, start, salted, density), (0,))
    return jnp.concatenate(sums)
