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

# Found in one pass over the scores, which counts 2^BITS - 1 candidates at once. More of them save passes, but compile
# longer and, on CPU, run no sooner: 4 took 12 s to compile where 2 took 4.6 s, and 20 ms where 2 took 11.
BITS = 2
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
    devices and any layout choose the same set. The cut is found two bits a pass: sixteen passes that count how many
    scores reach each of three candidates, and sixteen more over the ties if some of them must be left out.

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
def _compiled(tree: Any, seed: Any, wanted: Limbs, rule: tuple[tuple[str, bool], ...], scope: Scope) -> Any:
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


def wanted_counts(parts: Sequence[Scored], fraction: float, scope: Scope) -> Limbs:
    """How many entries to mark: of each slice, or for the global scope of all, told to each slice."""
    check_fraction(fraction)
    if scope not in ("global", "layer"):
        raise ValueError(f"scope is 'global' or 'layer', got {scope!r}")
    sizes = slice_sizes(parts)
    return host_limbs([num_held(fraction, sum(sizes) if scope == "global" else size) for size in sizes])


def slice_sizes(parts: Sequence[Scored]) -> list[int]:
    """Entries of every slice of every leaf, in order."""
    return [math.prod(part.shape) // part.num_slices for part in parts for _ in range(part.num_slices)]


def select(
    parts: Sequence[Scored], wanted: Limbs, *, scope: Scope, positive: bool = False, seed: Any = 0, origin: Any = 0
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
    pool = together if scope == "global" else unchanged

    # More than k keys reach the cut, at most k stand above it: it is the (k+1)-th largest key.
    def reaches(part: Scored, arrays: Any, _: Any) -> Callable[[jax.Array], jax.Array]:
        keys = part.key(arrays)
        return lambda candidate: keys >= candidate

    sizes = slice_sizes(parts)
    none = host_limbs([0] * len(sizes))
    cuts, reaching, above = _bisect(parts, {}, reaches, lambda x: more(pool(x), wanted), host_limbs(sizes), none)
    ties, left = minus(reaching, above), minus(wanted, pool(above))
    if positive:
        left = Limbs(*(jnp.where(cuts > ZERO, limb, jnp.uint32(0)) for limb in left))
    fixed = {"cut": cuts, "salt": salts(parts, seed), "origin": jnp.asarray(origin, jnp.uint32)}

    # Places are distinct inside a slice, so at most one a slice equals the end; those go by path and slice.
    def before(part: Scored, arrays: Any, known: Any) -> Callable[[jax.Array], jax.Array]:
        tied, places = part.key(arrays) == spread(part, known["cut"]), place_keys(part, known)
        return lambda candidate: tied & (places < candidate)

    def break_ties() -> tuple[jax.Array, jax.Array]:
        ends, inside, with_end = _bisect(parts, fixed, before, lambda x: ~more(pool(x), left), none, ties)
        missing, equal = minus(left, pool(inside)), minus(with_end, inside).low
        queue = jnp.cumsum(equal) - equal if scope == "global" else jnp.zeros_like(equal)
        return ends, (missing.high > 0) | (missing.low > queue)

    def no_ties() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(len(sizes), jnp.uint32), jnp.zeros(len(sizes), bool)

    ends, takes = jax.lax.cond(jnp.any((left.high > 0) | (left.low > 0)), break_ties, no_ties)

    masks = []
    for part, known in zip(parts, _apart(parts, fixed | {"end": ends, "take": takes}), strict=True):
        # The barrier keeps two uses of the keys from sharing a stored copy.
        keys, places = part.key(jax.lax.optimization_barrier(part.arrays)), place_keys(part, known)
        cut, end, take = (spread(part, known[name]) for name in ("cut", "end", "take"))
        chosen = (keys > cut) | ((keys == cut) & ((places < end) | ((places == end) & take)))
        masks.append(chosen & (keys > ZERO) if positive else chosen)
    return masks


def _bisect(
    parts: Sequence[Scored], fixed: Any, hits: Any, reached: Any, at: Limbs, beyond: Limbs
) -> tuple[jax.Array, Limbs, Limbs]:
    """Per slice the largest uint32 `x` for which `reached` says yes, BITS bits a pass; counts at `x` and at `x + 1`.

    Args:
      fixed: a dict of uint32 [slices], or scalars: handed to `hits`.
      hits: (part, its arrays, its share of `fixed`) to a function from a candidate to the mask that is counted.
      reached: counts [candidates, slices] to bools; yes for small candidates, then no.
      at: counts at 0.
      beyond: counts at 2^32.
    """
    steps = jnp.arange(1, 2**BITS, dtype=jnp.uint32)

    def sweep(i: jax.Array, carried: tuple[jax.Array, Limbs, Limbs]) -> tuple[jax.Array, Limbs, Limbs]:
        shift = (32 - BITS - BITS * i).astype(jnp.uint32)
        # The barrier keeps what is counted from being computed once, outside the loop, and stored.
        arrays, here, carried = jax.lax.optimization_barrier(([part.arrays for part in parts], fixed, carried))
        found, at, beyond = carried
        masks = []
        for part, own, known in zip(parts, arrays, _apart(parts, here | {"found": found}), strict=True):
            mask_of = hits(part, own, known)
            masks.append([mask_of(spread(part, known["found"] + (step << shift))) for step in steps])
        counts = tally(parts, masks)
        yes = jnp.sum(reached(counts), axis=0, dtype=jnp.uint32)
        place = yes.astype(jnp.int32).reshape(1, -1)

        def pick(rows: list[jax.Array]) -> jax.Array:
            return jnp.take_along_axis(jnp.concatenate(rows), place, axis=0).reshape(-1)

        last = Limbs(*(pick([x.reshape(1, -1), y]) for x, y in zip(at, counts, strict=True)))
        next_ = Limbs(*(pick([y, x.reshape(1, -1)]) for x, y in zip(beyond, counts, strict=True)))
        return found + (yes << shift), last, next_

    start = (jnp.zeros(at.low.shape, jnp.uint32), Limbs(*map(jnp.asarray, at)), Limbs(*map(jnp.asarray, beyond)))
    return jax.lax.fori_loop(0, 32 // BITS, sweep, start)


def _apart(parts: Sequence[Scored], values: dict[str, jax.Array]) -> list[dict[str, jax.Array]]:
    """For every leaf its own slices of each vector; scalars as they are."""
    found, begin = [], 0
    for part in parts:
        end = begin + part.num_slices
        found.append({name: x[begin:end] if x.ndim else x for name, x in values.items()})
        begin = end
    return found


def tally(parts: Sequence[Scored], masks: Sequence[Sequence[jax.Array]]) -> Limbs:
    """How many are set in each of some masks of every leaf: [masks, slices of all leaves]."""
    counts = [count(part, own) for part, own in zip(parts, masks, strict=True)]
    pieces = max(x.shape[2] for x in counts)
    return limbs(jnp.concatenate([jnp.pad(x, ((0, 0), (0, 0), (0, pieces - x.shape[2]))) for x in counts], axis=1))


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


def host_limbs(numbers: Sequence[int]) -> Limbs:
    """Numbers of the host."""
    pairs = np.array([divmod(number, 2**16) for number in numbers], np.uint32)
    return Limbs(pairs[:, 0], pairs[:, 1])  # type: ignore[arg-type]


def unchanged(counts: Limbs) -> Limbs:
    """Every slice for itself."""
    return counts


def together(counts: Limbs) -> Limbs:
    """For every slice the sum over all (the last axis)."""
    if counts.low.shape[-1] > 2**15:
        raise ValueError(f"a tree of {counts.low.shape[-1]} slices, at most 2^15 add up exactly: stack fewer layers")
    total = _carry(*(jnp.sum(limb, axis=-1, keepdims=True) for limb in counts))
    return Limbs(*(jnp.broadcast_to(limb, counts.low.shape) for limb in total))


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


def salts(parts: Sequence[Scored], seed: Any) -> jax.Array:
    """Where the hash of each slice begins: uint32 [slices of all leaves]."""
    index = [np.arange(part.num_slices, dtype=np.uint32) * np.uint32(0x9E3779B9) for part in parts]
    own = [x + np.uint32(zlib.crc32(part.path.encode())) for x, part in zip(index, parts, strict=True)]
    return fmix32(jnp.asarray(np.concatenate(own)) + fmix32(jnp.asarray(seed).astype(jnp.uint32)))


def place_keys(part: Scored, known: dict[str, jax.Array]) -> jax.Array:
    """A key for every entry, distinct inside a slice of at most 2^32: a hash of its place in the slice.

    Args:
      part: the leaf.
      known: "salt" [slices], and "origin", 0 (`select`).
    """
    place, stride = known["origin"], 1
    for axis in range(len(part.shape) - 1, part.stacked - 1, -1):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= part.shape[axis]
    return fmix32(jnp.broadcast_to(place, part.shape) ^ spread(part, known["salt"]))


def fmix32(x: jax.Array) -> jax.Array:
    """The last step of MurmurHash3, a bijection of uint32 that mixes all bits.

    >>> hex(int(fmix32(jnp.uint32(1))))
    '0x514e28b7'
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
