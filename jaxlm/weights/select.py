# SPDX-License-Identifier: Apache-2.0
"""The largest entries of a tree, exactly and the same on any number of devices: no sort, no gather.

slice: slice i of the leading axis of a stacked leaf, any other leaf is one slice; key: uint32 that orders like a score.
Counts beyond 2^31 are two limbs, value = high * 2^16 + low.
"""

import functools
import math
import re
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.weights.names import named_leaves

Scope = Literal["global", "layer"]

BITS = 4  # found in one pass over the scores, which counts 2^BITS - 1 candidates at once
MAX_COUNT = 2**31 - 1  # of one int32


class Scored(NamedTuple):
    """The scores of one leaf, made anew in every pass rather than kept.

    Attributes:
      path: of the leaf, seeds the order of ties.
      shape: of the leaf.
      stacked: is the leading axis one of slices?
      arrays: what the scores are made from, a tree of arrays.
      key: `arrays` to uint32 keys of that shape, larger for a larger score (`ordered`).
    """

    path: str
    shape: tuple[int, ...]
    stacked: bool
    arrays: Any
    key: Callable[[Any], jax.Array]

    @property
    def num_slices(self) -> int:
        """Slices of the leaf."""
        return self.shape[0] if self.stacked else 1


class Limbs(NamedTuple):
    """A count, `high * 2^16 + low`, both uint32, low < 2^16."""

    high: jax.Array
    low: jax.Array


def largest(
    scores: Any,
    fraction: float,
    *,
    scope: Scope = "global",
    stacked: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Any:
    """Marks the `k = floor(fraction * D)` largest of all D scores, exactly k of them.

    Ties go by a fixed hash of path and place, never by position, so that no layer is preferred and any number of
    devices and any layout choose the same set. The cut is found bit by bit: eight passes that count how many scores
    reach each of fifteen candidates, and eight more over the ties if some of them must be left out.

    Args:
      scores: tree of floating arrays, ordered as float32; -0.0 equals 0.0 and NaN is below all.
      fraction: share to mark, [0, 1); read as a decimal, so that 0.29 of 100 is 29.
      scope: "global": one cut for the whole tree. "layer": `floor(fraction * size)` of every slice.
      stacked: patterns of whole paths whose leading axis is one of layers; None: paths below `blocks/`.
      exclude: patterns of whole paths that are never marked and do not count.
    Returns: a tree of bools like `scores`. Can be compiled; each leaf is divided over devices like its scores.
    Raises: ValueError for a fraction outside [0, 1), other names, and patterns that match nothing.

    >>> largest({"a": jnp.array([3.0, 1.0, 2.0]), "b": jnp.array([9.0])}, 0.5)
    {'a': Array([ True, False, False], dtype=bool), 'b': Array([ True], dtype=bool)}
    """
    for path, leaf in named_leaves(scores).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"scores at {path} are {leaf.dtype}; give floating numbers")
    return _marked(scores, None, fraction, scope, stacked, exclude)


def random_entries(
    tree: Any,
    fraction: float,
    *,
    seed: Any = 0,
    scope: Scope = "global",
    stacked: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Any:
    """Marks `floor(fraction * D)` entries by a hash of path, place and `seed`: the control for `largest`.

    Args:
      tree: arrays.
      seed: an integer or a traced int32 or uint32.
      fraction, scope, stacked, exclude: as of `largest`.

    >>> random_entries({"a": jnp.ones(8)}, 0.25, seed=1)["a"].tolist()
    [False, False, False, True, False, False, True, False]
    """
    return _marked(tree, seed, fraction, scope, stacked, exclude)


def _marked(tree: Any, seed: Any, fraction: float, scope: Scope, stacked: Any, exclude: Any) -> Any:
    """`largest` if there is no seed, else `random_entries`."""
    leaves = named_leaves(tree)
    slices, free = match(stacked, exclude, leaves)
    rule = tuple((path, slices[path]) for path in free)
    wanted = wanted_counts(_parts(leaves, rule, seed), fraction, scope)
    return _compiled(tree, seed, wanted, rule, scope)


@functools.partial(jax.jit, static_argnames=("rule", "scope"))
def _compiled(tree: Any, seed: Any, wanted: list[Limbs], rule: tuple[tuple[str, bool], ...], scope: Scope) -> Any:
    leaves = named_leaves(tree)
    masks = select(_parts(leaves, rule, seed), wanted, scope=scope, seed=0 if seed is None else seed)
    chosen = dict(zip([path for path, _ in rule], masks, strict=True))
    filled = [chosen.get(path, jnp.zeros_like(leaf, dtype=bool)) for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), filled)


def _parts(leaves: dict[str, Any], rule: tuple[tuple[str, bool], ...], seed: Any) -> list[Scored]:
    if seed is None:
        return [Scored(path, leaves[path].shape, stacked, leaves[path], ordered) for path, stacked in rule]
    return [constant(path, leaves[path].shape, stacked) for path, stacked in rule]


def constant(path: str, shape: tuple[int, ...], stacked: bool) -> Scored:
    """A leaf whose scores are all equal, so that ties decide."""
    return Scored(path, shape, stacked, (), lambda _: jnp.zeros(shape, jnp.uint32))


def num_held(fraction: float, size: int) -> int:
    """`floor(fraction * size)`, the fraction read as a decimal.

    >>> num_held(0.29, 100), int(0.29 * 100)
    (29, 28)
    """
    check_fraction(fraction)
    return int(Fraction(str(fraction)) * size)


def check_fraction(fraction: float) -> None:
    """Raises ValueError for a share outside [0, 1)."""
    if not 0 <= fraction < 1:
        why = ": holding every entry leaves nothing to train" if fraction >= 1 else ""
        raise ValueError(f"fraction must be in [0, 1), got {fraction}{why}")


def is_stacked(path: str) -> bool:
    """Does the leading axis of this parameter count layers? True below `blocks/`."""
    return path.startswith("blocks/")


def match(
    stacked: Sequence[str] | None, exclude: Sequence[str], leaves: dict[str, Any]
) -> tuple[dict[str, bool], list[str]]:
    """(path -> is it stacked?, paths not excluded), by patterns of whole paths.

    Raises: ValueError for a pattern that matches no path.
    """
    for name, patterns in (("stacked", stacked or ()), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ValueError(f"{name} is a tuple of patterns, got {patterns!r}: write ({patterns!r},)")
        for pattern in patterns:
            if leaves and not any(re.fullmatch(pattern, path) for path in leaves):
                raise ValueError(f"{name} pattern {pattern!r} matches no path; paths look like {next(iter(leaves))!r}")

    slices = {path: len(leaf.shape) > 0 and pattern_of(path, stacked) >= 0 for path, leaf in leaves.items()}
    return slices, [path for path in leaves if pattern_of(path, exclude) < 0]


def pattern_of(path: str, patterns: Sequence[str] | None) -> int:
    """Index of the first pattern that matches, -1 if none does; without patterns 0 for what `is_stacked` says."""
    if patterns is None:
        return 0 if is_stacked(path) else -1
    return next((i for i, pattern in enumerate(patterns) if re.fullmatch(pattern, path)), -1)


def ordered(scores: jax.Array) -> jax.Array:
    """Uint32 keys that compare as the scores do: both zeros are equal, NaN is below all. Integer work only, because
    comparisons of floats on CPU take subnormal numbers for zeros.
    """
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    size = bits & ~sign
    keys = jnp.where((bits >= sign) & (size > 0), ~bits, size | sign)
    return jnp.where(size > jnp.uint32(0x7F800000), jnp.uint32(0), keys)


ZERO = np.uint32(1 << 31)  # the key of a score of 0


def wanted_counts(parts: Sequence[Scored], fraction: float, scope: Scope) -> list[Limbs]:
    """How many entries to mark: of each slice, or for the global scope of all, told to each slice."""
    check_fraction(fraction)
    if scope not in ("global", "layer"):
        raise ValueError(f"scope is 'global' or 'layer', got {scope!r}")
    total = sum(math.prod(part.shape) for part in parts)
    sizes = [total if scope == "global" else math.prod(part.shape) // max(1, part.num_slices) for part in parts]
    limbs = [divmod(num_held(fraction, size), 2**16) for size in sizes]
    return [
        Limbs(*(np.full(part.num_slices, limb, np.uint32) for limb in both))  # type: ignore[arg-type]
        for part, both in zip(parts, limbs, strict=True)
    ]


def select(
    parts: Sequence[Scored],
    wanted: Sequence[Limbs],
    *,
    scope: Scope,
    positive: bool = False,
    seed: Any = 0,
    origin: Any = 0,
) -> list[jax.Array]:
    """A mask for every leaf: the largest share of the keys, as `largest` says.

    Args:
      parts: the leaves, in an order that is always the same.
      wanted: from `wanted_counts`; may be traced.
      scope: that of `wanted`.
      positive: never mark a score of 0 or less, even if fewer than the share are marked.
      seed: changes the order of ties; an integer, or a traced one.
      origin: 0. Inside a loop, a 0 of which the compiler does not know that it never changes: it would store the place
        of every entry before the loop.
    """
    if not parts:
        return []
    pool = together if scope == "global" else list

    # More than k keys reach the cut, at most k stand above it: it is the (k+1)-th largest key.
    def reaches(part: Scored, arrays: Any, _: None) -> Callable[[jax.Array], jax.Array]:
        keys = part.key(arrays)
        return lambda candidate: keys >= candidate

    def too_many(counts: list[Limbs]) -> list[jax.Array]:
        return [more(count, want) for count, want in zip(pool(counts), wanted, strict=True)]

    cuts = _bisect(parts, [None] * len(parts), reaches, too_many)
    above = pool([_above(part, cut) for part, cut in zip(parts, cuts, strict=True)])
    left = [minus(want, count) for want, count in zip(wanted, above, strict=True)]
    if positive:
        left = [Limbs(*(jnp.where(c > ZERO, x, jnp.uint32(0)) for x in y)) for y, c in zip(left, cuts, strict=True)]
    salts = [(salt(part, seed), jnp.asarray(origin, jnp.uint32)) for part in parts]
    ends, takes = jax.lax.cond(
        jnp.any(jnp.stack([jnp.any((x.high > 0) | (x.low > 0)) for x in left])),
        lambda: _break_ties(parts, cuts, left, salts, scope),
        lambda: (
            [jnp.zeros(part.num_slices, jnp.uint32) for part in parts],
            [jnp.zeros(part.num_slices, bool) for part in parts],
        ),
    )

    masks = []
    for part, cut, end, take, mixed in zip(parts, cuts, ends, takes, salts, strict=True):
        keys, places = _keys(part), place_keys(part, *mixed)
        ties = (places < spread(part, end)) | ((places == spread(part, end)) & spread(part, take))
        chosen = (keys > spread(part, cut)) | ((keys == spread(part, cut)) & ties)
        masks.append(chosen & (keys > ZERO) if positive else chosen)
    return masks


def _keys(part: Scored) -> jax.Array:
    """The keys, behind a barrier, so that no two uses share a stored copy."""
    return part.key(jax.lax.optimization_barrier(part.arrays))


def _above(part: Scored, cut: jax.Array) -> Limbs:
    keys = _keys(part)
    # Counting two things, because of one the CPU's compiler makes a loop without vectors on one core.
    above, _ = count(part, [keys > spread(part, cut), keys == spread(part, cut)])
    return limbs(above)


def _bisect(parts: Sequence[Scored], fixed: Any, hits: Any, reached: Any) -> list[jax.Array]:
    """Per slice the largest uint32 `x` for which `reached` says yes, BITS bits a pass.

    Args:
      fixed: per part, what is handed to `hits`.
      hits: (part, its arrays, its fixed) to a function from a candidate to the mask that is counted.
      reached: counts [candidates, slices] of every part to bools; yes for small candidates, then no.
    """
    num_candidates = 2**BITS - 1
    steps = jnp.arange(1, num_candidates + 1, dtype=jnp.uint32)

    def sweep(i: jax.Array, found: list[jax.Array]) -> list[jax.Array]:
        shift = (32 - BITS - BITS * i).astype(jnp.uint32)
        # The barrier keeps what is counted from being computed once, outside the loop, and stored.
        arrays, here, found = jax.lax.optimization_barrier(([part.arrays for part in parts], fixed, found))
        counts = []
        for part, own, fix, x in zip(parts, arrays, here, found, strict=True):
            mask_of = hits(part, own, fix)
            counts.append(limbs(count(part, [mask_of(spread(part, x + (step << shift))) for step in steps])))
        return [
            x + (jnp.sum(yes, axis=0, dtype=jnp.uint32) << shift) for x, yes in zip(found, reached(counts), strict=True)
        ]

    return jax.lax.fori_loop(0, 32 // BITS, sweep, [jnp.zeros(part.num_slices, jnp.uint32) for part in parts])


def _break_ties(
    parts: Sequence[Scored], cuts: Sequence[jax.Array], left: Sequence[Limbs], salts: Sequence[Any], scope: Scope
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Per slice: ties whose place key is below the first result are in, and the one that equals it if the second says.

    Place keys are distinct inside a slice, so at most one a slice equals the end; those go by path and slice.
    """
    pool = together if scope == "global" else list

    def before(part: Scored, arrays: Any, fixed: tuple[jax.Array, Any]) -> Callable[[jax.Array], jax.Array]:
        cut, mixed = fixed
        ties, places = part.key(arrays) == spread(part, cut), place_keys(part, *mixed)
        return lambda candidate: ties & (places < candidate)

    def fit(counts: list[Limbs]) -> list[jax.Array]:
        return [~more(count, most) for count, most in zip(pool(counts), left, strict=True)]

    ends = _bisect(parts, list(zip(cuts, salts, strict=True)), before, fit)
    inside, equal = [], []
    for part, cut, end, mixed in zip(parts, cuts, ends, salts, strict=True):
        ties, places = _keys(part) == spread(part, cut), place_keys(part, *mixed)
        low, at = count(part, [ties & (places < spread(part, end)), ties & (places == spread(part, end))])
        inside.append(limbs(low))
        equal.append(jnp.sum(at, axis=-1))
    missing = [minus(most, count) for most, count in zip(left, pool(inside), strict=True)]
    if scope == "global":
        ends_at = np.cumsum([part.num_slices for part in parts])[:-1]
        queue = jnp.cumsum(jnp.concatenate(equal))
        before_it = [x - own for x, own in zip(jnp.split(queue, ends_at), equal, strict=True)]
    else:
        before_it = [jnp.zeros_like(own) for own in equal]
    return ends, [(x.high > 0) | (x.low > n.astype(jnp.uint32)) for x, n in zip(missing, before_it, strict=True)]


def count(part: Scored, masks: Sequence[jax.Array]) -> jax.Array:
    """How many are set in each mask: int32 [masks, slices, pieces], pieces so small that int32 holds their counts.

    One reduction with many operands reads the leaf once and, on CPU, uses all cores and vector units.
    """
    axis = piece_axis(part.shape, part.stacked)
    kept = (0,) * part.stacked + (() if axis is None else (axis,))
    axes = tuple(i for i in range(len(part.shape)) if i not in kept)
    zero = jnp.int32(0)
    operands = tuple(mask.astype(jnp.int32) for mask in masks)
    counts = jax.lax.reduce(operands, (zero,) * len(masks), lambda x, y: tuple(map(jax.lax.add, x, y)), axes)
    return jnp.stack(counts).reshape(len(masks), part.num_slices, -1)


def piece_axis(shape: tuple[int, ...], stacked: bool, *, most: int = MAX_COUNT) -> int | None:
    """The axis to keep so that no count passes `most`, the shortest that does; None if a slice is small enough.

    >>> piece_axis((262_144, 16_384), False), piece_axis((32, 4096, 4096), True)
    (1, None)
    """
    size = math.prod(shape[stacked:])
    if size <= most:
        return None
    enough = [axis for axis in range(int(stacked), len(shape)) if size // shape[axis] <= most]
    if not enough:
        raise ValueError(f"a slice of {shape} has too many entries to count: no axis of it is long enough")
    return min(enough, key=lambda axis: shape[axis])


def limbs(counts: jax.Array) -> Limbs:
    """The sum over the last axis, of at most 2^15 counts below 2^31, exactly."""
    if counts.shape[-1] > 2**15:
        raise ValueError(f"{counts.shape[-1]} counts to add, at most 2^15 are exact")
    wide = counts.astype(jnp.uint32)
    return _carry(jnp.sum(wide >> 16, axis=-1), jnp.sum(wide & jnp.uint32(0xFFFF), axis=-1))


def _carry(high: jax.Array, low: jax.Array) -> Limbs:
    return Limbs(high + (low >> 16), low & jnp.uint32(0xFFFF))


def together(counts: Sequence[Limbs]) -> list[Limbs]:
    """For every part the sum over all slices (the last axis) of all parts."""
    if sum(count.low.shape[-1] for count in counts) > 2**15:
        raise ValueError("a tree of more than 2^15 slices: stack fewer, larger leaves")
    highs, lows = ([jnp.sum(x, axis=-1) for x in each] for each in zip(*counts, strict=True))
    total = _carry(sum(highs[1:], highs[0]), sum(lows[1:], lows[0]))
    return [Limbs(*(jnp.broadcast_to(x[..., None], count.low.shape) for x in total)) for count in counts]


def more(count: Limbs, most: Limbs) -> jax.Array:
    """`count > most`; leading axes of `count` are candidates."""
    high, low = (jnp.broadcast_to(limb, count.low.shape) for limb in most)
    return (count.high > high) | ((count.high == high) & (count.low > low))


def minus(count: Limbs, less: Limbs) -> Limbs:
    """`count - less`, which must not be negative."""
    borrow = (count.low < less.low).astype(jnp.uint32)
    return Limbs(count.high - less.high - borrow, count.low + (borrow << 16) - less.low)


def spread(part: Scored, values: jax.Array) -> jax.Array:
    """One value a slice, [slices], in a shape that meets the leaf's."""
    return values.reshape((-1,) + (1,) * (len(part.shape) - 1)) if part.stacked else values.reshape(())


def salt(part: Scored, seed: Any) -> jax.Array:
    """Where the hash of each slice begins: uint32 [slices]."""
    index = np.arange(part.num_slices, dtype=np.uint32) * np.uint32(0x9E3779B9)
    own = jnp.asarray(index + np.uint32(zlib.crc32(part.path.encode())))
    return fmix32(own + fmix32(jnp.asarray(seed).astype(jnp.uint32)))


def place_keys(part: Scored, salts: jax.Array, origin: Any = 0) -> jax.Array:
    """A key for every entry, distinct inside a slice of at most 2^32: a hash of its place in the slice.

    `origin` is 0 (`select`).
    """
    place, stride = jnp.asarray(origin, jnp.uint32), 1
    for axis in range(len(part.shape) - 1, part.stacked - 1, -1):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= part.shape[axis]
    return fmix32(jnp.broadcast_to(place, part.shape) ^ spread(part, salts))


def fmix32(x: jax.Array) -> jax.Array:
    """The last step of MurmurHash3, a bijection of uint32 that mixes all bits.

    >>> hex(int(fmix32(jnp.uint32(1))))
    '0x514e28b7'
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
