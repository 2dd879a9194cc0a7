# SPDX-License-Identifier: Apache-2.0
"""How one tensor of several models becomes one, piece by piece: the arithmetic of `jaxlm.weights` on flat pieces.

A recipe first looks at all pieces for what it must know of the whole tensor (angles, cuts, sums), then merges piece by
piece.  Sources: the base first if the recipe has one, then the models.
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
from jaxlm.weights.select import Scored, fmix32, num_held, ordered, salts
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
    task_vector,
    weights_of,
)
from jaxlm.weights.transplanting import Overlap, resolved, take_over, unowned

PIECE, STEP, SMALL = 2**18, 2**16, 2**13  # entries; the last piece is padded, so that few sizes are compiled

Piece = list[jax.Array]  # float32, one a source; zeros where the tensor has ended


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
        for start in range(0, self.size, PIECE):
            yield start, min(PIECE, self.size - start)

    def piece(self, start: int, count: int, which: Sequence[int] | None = None) -> list[np.ndarray]:
        """The same piece of every source, or of those named, in the type of its file."""
        chosen = self.sources if which is None else [self.sources[i] for i in which]
        return [_padded(source[start : start + count]) for source in chosen]


def _padded(part: np.ndarray) -> np.ndarray:
    if part.dtype == np.float64:
        part = part.astype(np.float32)
    length = _length(part)
    return part if part.size == length else np.concatenate([part, np.zeros(length - part.size, part.dtype)])


def _length(part: np.ndarray) -> int:
    """What a piece is padded to."""
    return SMALL if part.size <= SMALL else -(-part.size // STEP) * STEP


class Recipe(Protocol):
    """A method of merging and its numbers.

    Attributes:
      based: whether the first source is a base rather than a model.
    """

    based: ClassVar[bool]

    def check(self, num_models: int) -> None:
        """Raises ValueError if this many models cannot be merged so."""

    def look(self, tensor: Tensor) -> Any:
        """What must be known of the whole tensor: a tree of numbers."""

    def merge(self, known: Any, start: Any, piece: Piece) -> jax.Array:
        """A piece of the result, float32, from the same piece of the sources; compiled.

        Args:
          known: what `look` saw.
          start: uint32, number of the first entry modulo 2^32.
          piece: float32, one a source.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """`jaxlm.weights.linear`, the weighted mean of models."""

    based: ClassVar[bool] = False
    weights: Weights = 1.0
    normalize: bool = True

    def check(self, num_models: int) -> None:
        """Weights fit."""
        divisor_of(weights_of(self.weights, num_models), self.normalize)

    def look(self, tensor: Tensor) -> Any:
        """Nothing."""

    def merge(self, known: Any, start: Any, piece: Piece) -> jax.Array:
        """The sum over the divisor."""
        weights = weights_of(self.weights, len(piece))
        return _summed(None, piece, weights, [(None, 1.0)] * len(piece), divisor_of(weights, self.normalize), 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soup:
    """`jaxlm.weights.soup`, the plain mean of models."""

    based: ClassVar[bool] = False

    def check(self, num_models: int) -> None:
        """Any number of models."""

    def look(self, tensor: Tensor) -> Any:
        """Nothing."""

    def merge(self, known: Any, start: Any, piece: Piece) -> jax.Array:
        """As `Linear`."""
        return Linear().merge(known, start, piece)


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

    def look(self, tensor: Tensor) -> Any:
        """The angle between the two, and whether it calls for a line."""
        return _angle(tensor, self.eps)

    def merge(self, known: Any, start: Any, piece: Piece) -> jax.Array:
        """A piece of the arc."""
        return on_arc(piece[0], piece[1], jnp.float32(self.weight), *known)


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

    def look(self, tensor: Tensor) -> Any:
        """Nothing."""

    def merge(self, known: Any, start: Any, piece: Piece) -> jax.Array:
        """The base plus the sum over the divisor."""
        weights = weights_of(self.weights, len(piece) - 1)
        whole = [(None, 1.0)] * len(weights)
        return _summed(piece[0], piece[1:], weights, whole, divisor_of(weights, self.normalize), self.scale)


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

    def look(self, tensor: Tensor) -> Any:
        """The cuts that leave the share, and the salt of the hash that decides among equals."""
        models = range(1, len(tensor.sources))
        return [] if self.density == 1 else [(*_cut(tensor, i, self.density), _salt(tensor.name, 0)) for i in models]

    def merge(self, known: Any, start: Any, piece: Piece) -> jax.Array:
        """Trims, elects signs, adds."""
        base, *theirs = piece
        cuts = known or [None] * len(theirs)
        keeps = [
            None if cut is None else _above(base, model, start, *cut) for model, cut in zip(theirs, cuts, strict=True)
        ]
        weights = weights_of(self.weights, len(theirs))
        return _elected(base, theirs, weights, keeps, [1.0] * len(theirs), self.scale, self.normalize)


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

    def look(self, tensor: Tensor) -> Any:
        """The salts of the hashes that drop, and the factors of what is left."""
        if self.density == 1:
            return []
        known = []
        for number in range(1, len(tensor.sources)):
            salted = _salt(tensor.name, self.seed + number)
            factor = 1 / self.density if self.rescale == "share" else 1.0
            if self.rescale == "norm":
                factor = _factor(tensor, number, salted, self.density)
            known.append((salted, factor))
        return known

    def merge(self, known: Any, start: Any, piece: Piece) -> jax.Array:
        """Drops, adds; elects signs in between if asked to."""
        base, *theirs = piece
        weights = weights_of(self.weights, len(theirs))
        keeps: list[Any] = [kept(_places(base, start, salted), self.density) for salted, _ in known]
        keeps = keeps or [None] * len(theirs)
        factors = [factor for _, factor in known] or [1.0] * len(theirs)
        if self.signs == "elected":
            return _elected(base, theirs, weights, keeps, factors, self.scale, self.normalize)
        pairs = list(zip(keeps, factors, strict=True))
        return _summed(base, theirs, weights, pairs, divisor_of(weights, self.normalize), self.scale)


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

    def look(self, tensor: Tensor) -> Any:
        """Nothing."""

    def merge(self, known: Any, start: Any, piece: Piece) -> jax.Array:
        """Each model's core in turn."""
        number = len(self.cores)
        base, models, marks = piece[0], piece[1 : 1 + number], piece[1 + number : 1 + 2 * number]
        owned = unowned(base, self.overlap, self.overlap == "largest")
        for rank, (model, mark) in enumerate(zip(models, marks, strict=True), 1):
            size = jnp.abs(model - piece[-1]) if self.overlap == "largest" else None
            owned, _ = take_over(owned, model, mark != 0, size, jnp.int32(rank), self.overlap)
        return resolved(base, owned, self.overlap)


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


@functools.partial(jax.jit, static_argnames=("recipe", "num_checked", "dtype"))
def merged_piece(
    recipe: Recipe, known: Any, start: Any, piece: Sequence[np.ndarray], *, num_checked: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """A piece of the result in its type, and for each of the first sources whether it is finite throughout."""
    wide = [jnp.asarray(part).astype(jnp.float32) for part in piece]
    finite = jnp.stack([jnp.all(jnp.isfinite(part)) for part in wide[:num_checked]])
    return recipe.merge(known, start, wide).astype(dtype), finite


def _summed(
    base: Any, models: Piece, weights: Sequence[float], kept_of: Sequence[Any], divisor: float, scale: float
) -> jax.Array:
    total = jnp.zeros(models[0].shape, jnp.float32)
    for model, weight, (keep, factor) in zip(models, weights, kept_of, strict=True):
        total, _ = add(total, base, model, weight, keep, factor)
    return settle(base, total, divisor, scale, jnp.float32)


def _elected(
    base: jax.Array, models: Piece, weights: Any, keeps: Any, factors: Any, scale: float, normalize: bool
) -> jax.Array:
    total, divisor, _ = elect(base, models, weights, keeps, factors, normalize)
    return settle(base, total, divisor, scale, jnp.float32)


def _each(
    tensor: Tensor, look: Callable[[int, list[np.ndarray]], Any], which: Sequence[int] | None = None
) -> Iterator[Any]:
    """What `look` sees in each piece, on the host. One piece is looked at while the next is read, no more wait."""
    before = None
    for start, count in tensor.starts():
        seen = look(start, tensor.piece(start, count, which))
        if before is not None:
            yield jax.device_get(before)
        before = seen
    if before is not None:
        yield jax.device_get(before)


def _angle(tensor: Tensor, eps: float) -> tuple[float, bool]:
    """Radians between two sources, and whether they are to be merged linearly."""
    looked = list(_each(tensor, lambda start, piece: _products(*piece, 1.0, 1.0)))
    largest = np.max([x for x, _ in looked], axis=0)
    products = np.array([x for _, x in looked], np.float64).sum(axis=0)
    if not largest.all() or not np.isfinite(largest).all():
        return 0.0, True
    scale = np.where((largest > 1e-15) & (largest < 1e15), np.float32(1), largest)
    if (scale != 1).any():  # squares would leave the range of float32
        looked = list(_each(tensor, lambda start, piece: _products(*piece, *scale)))
        products = np.array([x for _, x in looked], np.float64).sum(axis=0)
    norms = np.sqrt(products[:2])
    cosine = products[2] / norms[0] / norms[1]
    if 1 - abs(cosine) < min(eps, 1e-4) / 2:
        return 0.0, True
    if abs(cosine) < 0.99:
        return math.acos(cosine), abs(cosine) > 1 - eps
    norms = scale.astype(np.float64) * norms  # an arccos of float32 products would lose digits
    gaps = np.sum(list(_each(tensor, lambda start, piece: _gaps(*piece, *norms))), axis=0, dtype=np.float64)
    angle = float(2 * np.arctan2(*np.sqrt(gaps)))
    return angle, abs(math.cos(angle)) > 1 - eps


@jax.jit
def _products(a: jax.Array, b: jax.Array, scale_a: Any, scale_b: Any) -> tuple[jax.Array, jax.Array]:
    """Largest sizes of two pieces; the products a a, b b, a b once they are divided by the scales."""
    a, b = a.astype(jnp.float32) / scale_a, b.astype(jnp.float32) / scale_b
    return jnp.stack([jnp.max(jnp.abs(a)), jnp.max(jnp.abs(b))]), jnp.stack(
        [jnp.sum(a * a), jnp.sum(b * b), jnp.sum(a * b)]
    )


@jax.jit
def _gaps(a: jax.Array, b: jax.Array, norm_a: jax.Array, norm_b: jax.Array) -> jax.Array:
    """Squares of the difference and of the sum of two directions."""
    u, v = a.astype(jnp.float32) / norm_a, b.astype(jnp.float32) / norm_b
    return jnp.stack([jnp.sum((u - v) ** 2), jnp.sum((u + v) ** 2)])


def _salt(name: str, seed: int) -> Any:
    return salts([Scored(name, (1,), False, None, ordered)], seed)[0]


@jax.jit
def _keys(base: jax.Array, model: jax.Array) -> jax.Array:
    return ordered(jnp.abs(task_vector(base, model)))


@jax.jit
def _places(like: jax.Array, start: jax.Array, salted: jax.Array) -> jax.Array:
    return fmix32((start + jnp.arange(like.size, dtype=jnp.uint32)) ^ salted)


def _above(base: jax.Array, model: jax.Array, start: Any, cut: Any, end: Any, salted: Any) -> jax.Array:
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

    upper, wanted = _bin(_added(np.bincount(k >> 16, minlength=2**16) for _, k in keys()), wanted)
    counts = _added(np.bincount(k[k >> 16 == upper] & 0xFFFF, minlength=2**16) for _, k in keys())
    lower, wanted = _bin(counts, wanted)
    cut = np.uint32(upper << 16 | lower)
    if wanted == counts[lower]:
        return cut, np.uint32(2**32 - 1)
    salted = _salt(tensor.name, 0)
    places = _each(tensor, lambda start, piece: _places(piece[0], np.uint32(start % 2**32), salted), (0,))
    ties = [place[: k.size][k == cut] for place, (_, k) in zip(places, keys(), strict=True)]
    return cut, np.partition(np.concatenate(ties), wanted - 1)[wanted - 1]


def _added(counts: Iterator[np.ndarray]) -> np.ndarray:
    total = np.zeros(2**16, np.int64)
    for more in counts:
        total += more
    return total


def _bin(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """The bin, from above, in which the wanted-th entry lies, and how many are wanted of it."""
    reached = np.cumsum(counts[::-1])
    place = int(np.searchsorted(reached, wanted))
    return counts.size - 1 - place, wanted - int(reached[place] - counts[::-1][place])


def _factor(tensor: Tensor, model: int, salted: Any, density: float) -> float:
    """What gives a model's task vector its sum of sizes back."""

    def look(start: int, piece: list[np.ndarray]) -> jax.Array:
        return _sums(*piece, np.uint32(start % 2**32), salted, density)

    sums = np.array(list(_each(tensor, look, (0, model))), np.float64).sum(axis=0)
    return float(ratio(sums[0], sums[1]))


@functools.partial(jax.jit, static_argnums=4)
def _sums(base: jax.Array, model: jax.Array, start: jax.Array, salted: jax.Array, density: float) -> jax.Array:
    return jnp.concatenate(sums_of_sizes(base, model, kept(_places(base, start, salted), density), (0,)))
