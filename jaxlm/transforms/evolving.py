# SPDX-License-Identifier: Apache-2.0
"""Evolving parameter isolation: the held set follows a running average of squared gradients.

s: importance, the average; r: s made comparable between layers; D: entries that could be held.
"""

import difflib
import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.transforms.isolation import (
    FIRST,
    HELD,
    ByUpdate,
    Drift,
    EvolvingState,
    Moments,
    check_elementwise,
    forget,
    hold,
    marked,
)
from jaxlm.transforms.normalizers import NORMALIZERS, Normalizer, normalized, statistics
from jaxlm.weights import select as selection
from jaxlm.weights.names import named_leaves
from jaxlm.weights.select import Scope, Scored


class Rule(NamedTuple):
    """The arguments of `evolving_isolation`, checked."""

    fraction: float
    refresh_every: int | None
    decay: float
    warmup: int
    normalizer: Normalizer
    layer: Literal["leaf", "block"]
    scope: Scope
    importance_source: Literal["gradient", "adam_nu"]
    importance_dtype: Literal["float32", "bfloat16"]
    tasks: int | None
    release_fraction: float | None
    select: Literal["top", "bottom", "random"]
    exclude: tuple[str, ...]
    stacked: tuple[str, ...] | None
    apply: bool
    moments: Moments
    seed: int


WORDS = {
    "normalizer": NORMALIZERS,
    "layer": ("leaf", "block"),
    "scope": ("global", "layer"),
    "importance_source": ("gradient", "adam_nu"),
    "importance_dtype": ("float32", "bfloat16"),
    "select": ("top", "bottom", "random"),
    "moments": ("dense", "selected"),
}


def evolving_isolation(
    inner: optax.GradientTransformation,
    *,
    fraction: float = 0.01,
    refresh_every: int | None = 100,
    decay: float = 0.99,
    warmup: int = 100,
    normalizer: Normalizer = "mean",
    layer: Literal["leaf", "block"] = "leaf",
    scope: Scope = "global",
    importance_source: Literal["gradient", "adam_nu"] = "gradient",
    importance_dtype: Literal["float32", "bfloat16"] = "float32",
    tasks: int | None = None,
    release_fraction: float | None = None,
    select: Literal["top", "bottom", "random"] = "top",
    exclude: Sequence[str] = (),
    stacked: Sequence[str] | None = None,
    apply: bool = True,
    moments: Moments = "dense",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, but the share of entries with the largest running squared gradient is held, and chosen anew again and
    again.

        s = decay * s + (1 - decay) * g^2                    every update; an entry whose g^2 is not finite keeps its s
        at updates t >= max(warmup, 1) with (t - warmup) mod refresh_every == 0:
            r = s / mean of s over its layer;  held = the floor(fraction * D) largest r of the tree, without s = 0
        update_j = -0.0 if held_j else inner's update_j

    Held entries keep every bit (see `isolate`, also for where to wrap: last, and inside `optax.MultiSteps`). A choice
    never recompiles and costs less than a training step. Calls with equal arguments and `inner.update` share one
    `update`.

    Args:
      inner: an element-wise optimizer; the parameters are float32 masters.
      fraction: share of all entries that could be held, [0, 1).
      refresh_every: updates between choices, at least 1; None: one choice, at max(warmup, 1).
      decay: of the average, [0, 1); it remembers about 1 / (1 - decay) updates.
      warmup: updates before the first choice.
      normalizer: r = "mean": s / mean; "max": s / max; "minmax": (s - min) / (max - min); "zscore": (s - mean) / std;
        "tanh_z": |tanh(zscore)|; "none": s. Over the layer, and 0 where it has no spread.
      layer: "leaf": every slice of every stacked leaf, and every other leaf. "block": slice i of all leaves of a stack
        together; a stack is what one pattern of `stacked` matches.
      scope: "global": one cut for the tree. "layer": the same share of every slice.
      importance_source: "gradient": the average above, 4 bytes an entry. "adam_nu": Adam's own second moment after
        this update, no memory; `decay` is then Adam's b2.
      importance_dtype: "bfloat16" keeps the average in 2 bytes, rounded up or down at random so that it does not stall.
      tasks: None, or N: an average for each task, ranked by the largest r; `update` then needs `task=`, the index of
        the task that the gradient is of.
      release_fraction: None, or a share of at least `fraction`: held entries leave only when they fall out of it.
      select: "top"; the controls "bottom" and "random" (drawn at each choice) hold as many.
      exclude: patterns of whole paths that are never held and do not count in D.
      stacked: patterns of whole paths whose leading axis is one of layers; None: paths below `blocks/`.
      apply: False: choose and count, but hold nothing.
      moments: "dense": `inner` sees the whole gradient. "selected": held entries give nothing to moments, clips and
        decay inside `inner`, and the moments of entries that change sides are zeroed.
      seed: of random choices and roundings.
    State: `EvolvingState`, 1 byte an entry and the average. `isolation_metrics` reads it.
    Raises: ValueError for numbers out of range, unknown words, patterns that match nothing, optimizers that mix
      entries, parameters that are not float32, stacks of different lengths in one block, "adam_nu" without exactly one
      second moment, and a missing `task=`.

    >>> from jaxlm.transforms import isolation_metrics
    >>> loss = lambda params: jnp.sum(jnp.square(params["w"] - jnp.arange(1.0, 11.0)))
    >>> tx = evolving_isolation(optax.adamw(0.1, weight_decay=0.0), fraction=0.2, warmup=3, refresh_every=3)
    >>> params = {"w": jnp.zeros(10)}
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
    ...     return optax.apply_updates(params, updates), state
    >>> for _ in range(20):
    ...     params, state = step(params, state)
    >>> " ".join(f"{x:.1f}" for x in params["w"])
    '1.3 1.8 1.9 1.9 1.9 2.0 2.0 2.0 0.2 0.2'
    >>> f"{isolation_metrics(state)['isolation/held']:.2f}"
    '0.20'

    Source: Evolving Parameter Isolation, arXiv:2604.14010; the form of the normalizer, warm-up and defaults are ours.
    Departs: "adam_nu", `tasks` and `release_fraction` are ours.
    """
    rule = Rule(
        fraction, refresh_every, decay, warmup, normalizer, layer, scope, importance_source, importance_dtype, tasks,
        release_fraction, select, tuple(exclude), None if stacked is None else tuple(stacked), apply, moments, seed,
    )  # fmt: skip
    check_rule(rule)
    for name, patterns in (("exclude", exclude), ("stacked", stacked)):
        if isinstance(patterns, str):
            raise ValueError(f"{name} is a tuple of patterns, got {patterns!r}: write ({patterns!r},)")
    check_elementwise(inner)

    def init(params: Any) -> EvolvingState:
        inner_state = inner.init(params)
        leaves = named_leaves(params)
        for path, leaf in leaves.items():
            if leaf.dtype != jnp.float32:
                raise ValueError(
                    f"parameter {path} is {leaf.dtype}: evolving isolation needs float32 masters, in which small "
                    "updates are not lost; cast the parameters, and compute in another dtype"
                )
        if leaves:
            parts = layout(params, rule)[0]
            if importance_source == "adam_nu":
                second_moment(inner_state, params)
        counts = (len(leaves), max([part.num_slices for part in parts], default=1), 2) if leaves else (0, 1, 2)
        held, first, previous, entered, left = (jnp.zeros((), jnp.float32) for _ in range(5))
        return EvolvingState(
            jnp.zeros((), jnp.int32),
            _initial_importance(params, rule),
            jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.uint8), params),
            inner_state,
            jnp.zeros((), jnp.int32),
            Drift(jnp.zeros((), jnp.int32), held, first, previous, entered, left, jnp.zeros(counts, jnp.uint32)),
        )

    return optax.GradientTransformationExtraArgs(init, _evolving_update(ByUpdate(inner), rule))


def check_rule(rule: Rule) -> None:
    """Raises ValueError for arguments that make no sense, with the remedy."""
    for name, words in WORDS.items():
        value = getattr(rule, name)
        if value not in words:
            near = difflib.get_close_matches(str(value), words, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name} is one of {', '.join(words)}, got {value!r}{hint}")
    selection.check_fraction(rule.fraction)
    if rule.refresh_every is not None and rule.refresh_every < 1:
        raise ValueError(f"refresh_every must be at least 1 update, or None for one choice, got {rule.refresh_every}")
    if not 0 <= rule.decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {rule.decay}")
    if rule.warmup < 0:
        raise ValueError(f"warmup must be at least 0 updates, got {rule.warmup}")
    if rule.tasks is not None and rule.tasks < 1:
        raise ValueError(f"tasks must be a number of tasks, or None for one average, got {rule.tasks}")
    if rule.release_fraction is not None and not rule.fraction <= rule.release_fraction < 1:
        raise ValueError(
            f"release_fraction must be in [fraction, 1) = [{rule.fraction}, 1), got {rule.release_fraction}: held "
            "entries leave when they fall below it"
        )
    if rule.importance_dtype == "bfloat16" and 1 - rule.decay <= 0.002:
        raise ValueError(f"a bfloat16 average with decay {rule.decay} stalls; use float32, or a decay below 0.998")
    if rule.importance_source == "adam_nu":
        if rule.tasks is not None:
            raise ValueError("adam_nu is one average over all tasks: with tasks=N use importance_source='gradient'")
        if rule.moments == "selected":
            raise ValueError(
                "moments='selected' zeroes the second moment of held entries, by which adam_nu would rank them: use "
                "moments='dense' or importance_source='gradient'"
            )
        if rule.importance_dtype == "bfloat16":
            raise ValueError("adam_nu keeps no average of its own: leave importance_dtype at float32")


@functools.lru_cache(maxsize=64)
def _evolving_update(key: ByUpdate, rule: Rule) -> Any:
    inner = optax.with_extra_args_support(key.tx)

    def update(
        updates: Any, state: EvolvingState, params: Any = None, *, task: Any = None, **extra: Any
    ) -> tuple[Any, EvolvingState]:
        if rule.tasks is None:
            extra = extra if task is None else extra | {"task": task}
        elif task is None:
            raise ValueError(f"tasks={rule.tasks}: give update the index of the gradient's task, task=")
        step = optax.safe_increment(state.step)
        importance = state.importance
        if rule.importance_source == "gradient":
            importance = _averaged(updates, state, step, task, rule)
            marks, drift = _refreshed(importance, state, step, rule)
        inner_state, seen, weights = state.inner, updates, params
        if rule.moments == "selected" and rule.apply:
            held, before = marked(marks, HELD), marked(state.marks, HELD)
            inner_state = forget(inner.init, inner_state, jax.tree.map(jnp.not_equal, held, before))
            seen = hold(held, updates, 0.0)
            weights = None if params is None else hold(held, params, 0.0)
        moves, inner_state = inner.update(seen, inner_state, weights, **extra)
        if rule.importance_source == "adam_nu":
            marks, drift = _refreshed(second_moment(inner_state, updates), state, step, rule)
        if rule.apply:
            moves = hold(marked(marks, HELD), moves, -0.0)
        skipped = state.skipped + _num_not_finite(updates)
        return moves, EvolvingState(step, importance, marks, inner_state, skipped, drift)

    return update


def _initial_importance(params: Any, rule: Rule) -> Any:
    if rule.importance_source == "adam_nu":
        return ()
    dtype = jnp.dtype(rule.importance_dtype)
    one = lambda: jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)  # noqa: E731
    return one() if rule.tasks is None else tuple(one() for _ in range(rule.tasks))


def _averaged(updates: Any, state: EvolvingState, step: jax.Array, task: Any, rule: Rule) -> Any:
    """The average after this gradient."""

    def leaf(path: Any, s: jax.Array, g: jax.Array, ours: Any) -> jax.Array:
        square = jnp.square(g.astype(jnp.float32))
        new = rule.decay * s.astype(jnp.float32) + (1 - rule.decay) * square
        if s.dtype == jnp.bfloat16:
            new = _rounded_at_random(new, jax.tree_util.keystr(path), step, rule.seed)
        return jnp.where(jnp.isfinite(square) & ours, new, s)

    def averaged(tree: Any, ours: Any) -> Any:
        return jax.tree.map_with_path(lambda path, s, g: leaf(path, s, g, ours), tree, updates)

    if rule.tasks is None:
        return averaged(state.importance, True)
    return tuple(averaged(tree, jnp.asarray(task) == i) for i, tree in enumerate(state.importance))


def _rounded_at_random(x: jax.Array, path: str, step: jax.Array, seed: int) -> jax.Array:
    """To bfloat16, up with the probability that makes the mean right. x >= 0 and finite."""
    start = jnp.uint32(zlib.crc32(path.encode()) ^ (seed & 0xFFFFFFFF)) + step.astype(jnp.uint32) * jnp.uint32(
        0x9E3779B9
    )
    part = selection.constant(path, x.shape, False)
    noise = selection.place_keys(part, {"salt": selection.fmix32(start).reshape(1), "origin": jnp.uint32(0)}) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def second_moment(inner_state: optax.OptState, params: Any) -> Any:
    """Adam's `nu`.

    Raises: ValueError unless there is exactly one tree of that name with the shapes of the parameters.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    found = [tree for _, tree in optax.tree.get_all_with_path(inner_state, "nu")]
    found = [tree for tree in found if [leaf.shape for leaf in jax.tree.leaves(tree)] == shapes]
    if len(found) != 1:
        raise ValueError(f"found {len(found)} second-moment trees; use importance_source='gradient'")
    return found[0]


def _num_not_finite(updates: Any) -> jax.Array:
    """How many entries are not finite. A sum, the fastest way to read a leaf, says whether there are any to count."""
    leaves = jax.tree.leaves(updates)

    def count() -> jax.Array:
        total = jnp.int32(0)
        for g in leaves:
            total += jnp.sum(selection.count(selection.constant("", g.shape, False), [jnp.isnan(g), jnp.isinf(g)]))
        return total

    return jax.lax.cond(jnp.isfinite(sum(jnp.sum(g) for g in leaves)), lambda: jnp.int32(0), count)


def layout(tree: Any, rule: Rule) -> tuple[list[Scored], list[bool], list[int | None]]:
    """Every leaf with its slices; whether it can be held; and which stack's blocks it belongs to."""
    leaves = named_leaves(tree)
    slices, free = selection.match(rule.stacked, rule.exclude, leaves)
    parts = [selection.constant(path, leaf.shape, slices[path]) for path, leaf in leaves.items()]
    stacks: list[int | None] = [None] * len(parts)
    if rule.layer == "block":
        first: dict[int, Scored] = {}
        for i, part in enumerate(parts):
            if not part.stacked:
                continue
            stack = selection.pattern_of(part.path, rule.stacked)
            known = first.setdefault(stack, part)
            if known.num_slices != part.num_slices:
                raise ValueError(
                    f"layer='block' needs stacks of one length, but {known.path} has {known.num_slices} and "
                    f"{part.path} {part.num_slices}: give each stack a pattern of its own in `stacked`"
                )
            stacks[i] = stack
    return parts, [part.path in set(free) for part in parts], stacks


def _refreshed(importance: Any, state: EvolvingState, step: jax.Array, rule: Rule) -> tuple[Any, Drift]:
    """Marks and drift after this update: chosen anew if it is time, else as they were."""
    first = max(rule.warmup, 1)
    if rule.refresh_every is None:
        due = step == first
    else:
        due = (step >= first) & ((step - rule.warmup) % rule.refresh_every == 0)

    def choose(_: jax.Array, known: tuple[Any, Drift]) -> tuple[Any, Drift]:
        # Tied to what the loop carries, or the compiler would do half of the work before the loop, at every update.
        now, origin, (marks, drift) = jax.lax.optimization_barrier((importance, jnp.uint32(0), known))
        return _chosen(now, marks, drift, rule, origin)

    # A loop of one or no turn: unlike the branches of a cond it leaves marks in place and copies nothing.
    return jax.lax.fori_loop(0, due.astype(jnp.int32), choose, (state.marks, state.drift))


def _chosen(importance: Any, marks: Any, drift: Drift, rule: Rule, origin: jax.Array) -> tuple[Any, Drift]:
    parts, free, stacks = layout(marks, rule)
    treedef, old = jax.tree.structure(marks), jax.tree.leaves(marks)
    trees = importance if rule.tasks is not None else (importance,)
    averages = list(zip(*map(jax.tree.leaves, trees), strict=True))  # of every leaf: one a task
    scored = _scored(parts, averages, stacks, rule)
    if rule.select == "random":
        scored = parts
    eligible = [part for part, can in zip(scored, free, strict=True) if can]
    positive = rule.select == "top" and rule.normalizer in ("mean", "max", "none")
    # Ties of a random choice are all entries: the seed draws them.
    drawn = selection.fmix32(jnp.uint32(rule.seed & 0xFFFFFFFF) + drift.choices.astype(jnp.uint32) + jnp.uint32(1))
    seed = drawn if rule.select == "random" else 0

    def take(fraction: float) -> list[jax.Array]:
        wanted = selection.wanted_counts(eligible, fraction, rule.scope)
        found = iter(selection.select(eligible, wanted, scope=rule.scope, positive=positive, seed=seed, origin=origin))
        return [next(found) if can else jnp.zeros(part.shape, bool) for part, can in zip(parts, free, strict=True)]

    masks = take(rule.fraction)
    if rule.release_fraction is not None:
        stay = take(rule.release_fraction)
        masks = [new | (wide & ((m & HELD) != 0)) for new, wide, m in zip(masks, stay, old, strict=True)]
    if rule.select == "top" and not positive:
        masks = [mask & (_largest_of(each) > 0) for mask, each in zip(masks, averages, strict=True)]
    is_first = drift.choices == 0
    new = [
        jnp.where(h, jnp.uint8(HELD), jnp.uint8(0)) | jnp.where(is_first & h, jnp.uint8(FIRST), m & FIRST)
        for h, m in zip(masks, old, strict=True)
    ]
    drift = _drifted(parts, free, new, old, drift)
    return jax.tree.unflatten(treedef, new), drift


def _largest_of(averages: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.maximum, [s.astype(jnp.float32) for s in averages])


def _scored(
    parts: Sequence[Scored], averages: Sequence[tuple[jax.Array, ...]], stacks: Sequence[int | None], rule: Rule
) -> list[Scored]:
    """Every leaf with the keys of its r, the largest over tasks; the smallest first for "bottom"."""
    by_task = []
    for task in range(len(averages[0])):
        finite = [_finite(jax.lax.optimization_barrier(each[task]), rule) for each in averages]
        by_task.append(statistics(parts, finite, stacks, rule.normalizer))

    def score(part: Scored, arrays: Any, known: Any) -> Scored:
        def key(both: Any) -> jax.Array:
            scores = [normalized(part, _finite(s, rule), own, rule.normalizer) for s, own in zip(*both, strict=True)]
            keys = selection.ordered(functools.reduce(jnp.maximum, scores))
            return ~keys if rule.select == "bottom" else keys

        return part._replace(arrays=(arrays, known), key=key)

    return [score(part, arrays, known) for part, arrays, *known in zip(parts, averages, *by_task, strict=True)]


def _finite(s: jax.Array, rule: Rule) -> jax.Array:
    """Float32. Adam's second moment, unlike our average, may hold what is not finite: it must not spoil its layer."""
    wide = s.astype(jnp.float32)
    return jnp.where(wide < jnp.inf, wide, 0.0) if rule.importance_source == "adam_nu" else wide


def _drifted(
    parts: Sequence[Scored], free: Sequence[bool], new: Sequence[jax.Array], old: Sequence[jax.Array], drift: Drift
) -> Drift:
    """How the new set compares with the first and the previous one, by exact counts."""
    masks = []
    for after, before in zip(new, old, strict=True):
        held, was, first = (after & HELD) != 0, (before & HELD) != 0, (after & FIRST) != 0
        masks.append([held, was, first, held & was, held & first])
    counts = selection.tally(parts, masks)
    totals = selection.together(counts)
    held, was, first, kept, common = totals.high[:, 0].astype(jnp.float32) * 65536 + totals.low[:, 0]
    size = sum(math.prod(part.shape) for part, can in zip(parts, free, strict=True) if can)
    # Slices of leaf after leaf become rows; the last place holds the zero that fills short rows.
    index = np.full(drift.counts.shape[:2], counts.low.shape[1])
    begin = 0
    for row, part in zip(index, parts, strict=True):
        row[: part.num_slices] = np.arange(begin, begin + part.num_slices)
        begin += part.num_slices
    own = [jnp.append(limb[0], jnp.uint32(0))[index] for limb in counts]
    some = jnp.maximum(held, 1)
    return Drift(
        optax.safe_increment(drift.choices),
        held / np.float32(max(size, 1)),  # a model of 8B has more entries than an int32 counts
        common / jnp.maximum(held + first - common, 1),
        kept / jnp.maximum(held + was - kept, 1),
        (held - kept) / some,
        (was - kept) / some,
        jnp.stack(own, axis=-1),
    )
