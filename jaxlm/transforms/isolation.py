# SPDX-License-Identifier: Apache-2.0
"""Entries that do not move: `isolate` wraps a whole optimizer and selects its final update by a mask in the state.

held: a tree of bools like the parameters, True = held.
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.weights.names import named_leaves

Moments = Literal["selected", "dense"]

# Links whose update of one entry depends on its layer's other entries: held ones would push the free ones about.
LAYERWISE = (
    "adafactor", "adaptive_grad_clip", "clip_by_block_rms", "fromage", "lamb", "lars", "muon", "novograd",
    "scale_by_factored_rms", "scale_by_muon", "scale_by_novograd", "scale_by_param_block_rms", "scale_by_sm3",
    "scale_by_trust_ratio", "sm3",
)  # fmt: skip
# Links that keep or guess another point than the parameters, and would take held entries there.
ELSEWHERE = (
    "dadapt_adamw", "lookahead", "mechanize", "momo", "momo_adam", "prodigy", "sam", "scale_by_backtracking_linesearch",
    "scale_by_dog", "scale_by_dowg", "scale_by_lbfgs", "scale_by_zoom_linesearch", "schedule_free",
)  # fmt: skip


class IsolateState(NamedTuple):
    """State of `isolate`.

    Attributes:
      held: bool, one an entry, divided over devices like the parameters.
      inner: of the wrapped optimizer.
    """

    held: Any
    inner: optax.OptState


class Drift(NamedTuple):
    """What the last choice of `evolving_isolation` came to; all shares are 0 before the first.

    Attributes:
      choices: int32, how many there were.
      held: float32, held entries over those that could be.
      overlap_first, overlap_previous: float32, |A and B| / |A or B| of the set with the first and the previous one.
      entered, left: float32, entries that changed sides over the held ones.
      counts: uint32 [leaves, slices, 2], held entries of every slice as high * 2^16 + low; rows of short leaves end
        in zeros.
    """

    choices: jax.Array
    held: jax.Array
    overlap_first: jax.Array
    overlap_previous: jax.Array
    entered: jax.Array
    left: jax.Array
    counts: jax.Array


class EvolvingState(NamedTuple):
    """State of `evolving_isolation`.

    Attributes:
      step: int32, updates done.
      importance: like the parameters, float32 or bfloat16: the running average of squared gradients; a tuple of such
        trees with `tasks=N`, the empty tuple with `importance_source="adam_nu"`.
      marks: uint8, one an entry, divided over devices like the parameters: bit 0 held, bit 1 in the first set.
      inner: of the wrapped optimizer.
      skipped: int32, gradient entries so far that were not finite and left importance as it was.
      drift: of the last choice.
    """

    step: jax.Array
    importance: Any
    marks: Any
    inner: optax.OptState
    skipped: jax.Array
    drift: Drift


def isolate(
    inner: optax.GradientTransformation, mask: Any = None, *, moments: Moments = "selected"
) -> optax.GradientTransformationExtraArgs:
    """`inner`, but held entries keep their bits: update_j = -0.0 if held_j else inner's update_j.

    The final update is selected by `where`, so momentum, weight decay and NaN cannot move a held entry, and it is -0.0
    because `-0.0 + 0.0` is `+0.0`. Wrap last: a clip may stand before it or inside; nothing after it may add to
    updates, and what multiplies them or writes zeros (a skipping `apply_if_finite`) turns held -0.0 weights into 0.0.
    One limit: additions on CPU flush subnormal weights to zero, held or not.

    The mask lives in the state, so another one never recompiles: replace `held` there, or give `held=` to `update`,
    which then keeps it. Calls with the same `inner.update` and `moments` share one `update` function.

    Args:
      inner: any element-wise optax optimizer: AdamW, SGD, Lion, RMSprop, with clips by global norm, schedules, masks.
      mask: bool tree like the parameters, True = held; or a function from parameters to one; or None, nothing is held.
      moments: "selected": held entries give nothing to moments, clips or decay inside `inner`, and the moments of
        entries that change sides are zeroed, so that a released entry of Adam starts with 3.2 times the rate. "dense":
        `inner` sees the whole gradient, and through a clip by global norm one NaN at a held entry reaches all free
        ones.
    Raises: ValueError for a mask that does not fit the parameters, and for optimizers that mix entries (Adafactor,
      Muon, LAMB, LARS, SM3, Novograd, clips by block) or keep a second point (schedule-free, Prodigy, Lookahead).

    >>> tx = isolate(optax.adamw(0.1), {"w": jnp.array([True, False])})
    >>> params = {"w": jnp.array([-0.0, 1.0])}
    >>> updates, state = tx.update({"w": jnp.array([jnp.nan, 1.0])}, tx.init(params), params)
    >>> [f"{x:.2f}" for x in optax.apply_updates(params, updates)["w"]]
    ['-0.00', '0.90']
    """
    if moments not in ("selected", "dense"):
        raise ValueError(f"moments is 'selected' or 'dense', got {moments!r}")
    check_elementwise(inner)

    def init(params: Any) -> IsolateState:
        return IsolateState(initial_mask(mask, params), inner.init(params))

    return optax.GradientTransformationExtraArgs(init, _isolated_update(ByUpdate(inner), moments))


class ByUpdate:
    """An optimizer as a key: equal if `update` is, so that those that differ in `init` share a compiled step."""

    def __init__(self, tx: optax.GradientTransformation):
        self.tx = tx

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByUpdate) and self.tx.update == other.tx.update

    def __hash__(self) -> int:
        return hash(self.tx.update)


@functools.lru_cache(maxsize=64)
def _isolated_update(key: ByUpdate, moments: Moments) -> Any:
    inner = optax.with_extra_args_support(key.tx)

    def update(
        updates: Any, state: IsolateState, params: Any = None, *, held: Any = None, **extra: Any
    ) -> tuple[Any, IsolateState]:
        before, inner_state, weights = state.held, state.inner, params
        if held is None:
            held = before
        else:
            check_mask(held, updates)
        if moments == "selected":
            if held is not before:
                inner_state = forget(inner.init, inner_state, jax.tree.map(jnp.not_equal, held, before))
            updates = hold(held, updates, 0.0)
            weights = None if params is None else hold(held, params, 0.0)
        updates, inner_state = inner.update(updates, inner_state, weights, **extra)
        return hold(held, updates, -0.0), IsolateState(held, inner_state)

    return update


def hold(held: Any, tree: Any, value: float) -> Any:
    """`tree` with `value` at the held entries."""
    return jax.tree.map(lambda h, x: jnp.where(h, jnp.asarray(value, x.dtype), x), held, tree)


def forget(init: Callable[[Any], Any], state: optax.OptState, entries: Any) -> optax.OptState:
    """The state of the optimizer with that `init`, with the moments of the marked entries zeroed."""

    def clear(x: Any, marked: Any) -> Any:
        return x if is_gap(x) else jnp.where(marked, jnp.zeros_like(x), x)

    return optax.tree.map_params(init, clear, state, entries, is_leaf=is_gap)


def is_gap(x: Any) -> bool:
    """Is this what stands for a frozen leaf under `optax.partition`?"""
    return isinstance(x, optax.MaskedNode)


def nothing_held(params: Any) -> Any:
    """The mask that holds no entry: False everywhere, divided over devices like the parameters."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=bool), params)


def initial_mask(mask: Any, params: Any) -> Any:
    """What `init` keeps of a mask, a function to one, or None: a copy, so that no buffer is shared with the caller."""
    if mask is None or not jax.tree.leaves(params):  # without leaves: optax asks what the state looks like
        return nothing_held(params)
    mask = mask(params) if callable(mask) else mask
    if any(is_gap(p) for p in jax.tree.leaves(params, is_leaf=is_gap)):  # frozen leaves have no mask
        mask = jax.tree.map(lambda p, m: p if is_gap(p) else m, params, mask, is_leaf=is_gap)
    check_mask(mask, params)
    return jax.tree.map(lambda m, p: jnp.zeros_like(p, dtype=bool) | m, mask, params)


def check_mask(mask: Any, params: Any) -> None:
    """Raises ValueError, naming the leaf, for a mask whose tree, shapes or dtype are not those of a mask."""
    masks, leaves = named_leaves(mask), named_leaves(params)
    for path in leaves:
        if path not in masks:
            raise ValueError(f"mask has no leaf {path}; it has {list(masks)[:4]}")
    for path, leaf in masks.items():
        if path not in leaves:
            raise ValueError(f"mask has a leaf {path}, the parameters have not; they have {list(leaves)[:4]}")
        if (kind := str(getattr(leaf, "dtype", type(leaf).__name__))) != "bool":
            raise ValueError(f"mask at {path} is {kind}; give bool, True = held")
        if leaf.shape != leaves[path].shape:
            raise ValueError(f"mask at {path} has shape {leaf.shape}, the parameter {leaves[path].shape}")
    given, wanted = str(jax.tree.structure(mask)), str(jax.tree.structure(params))
    if given != wanted:
        raise ValueError(f"mask is a {given}, the parameters are a {wanted}: use the same containers")


def check_elementwise(inner: optax.GradientTransformation) -> None:
    """Raises ValueError for optimizers under which holding entries would not mean what it says."""
    for name in _links(inner.update, set()):
        if name in LAYERWISE:
            raise ValueError(
                f"isolation needs an element-wise optimizer, but {name} lets held entries change the update of free "
                "ones (adafactor, muon, lamb, lars, sm3, novograd, clips by block): use adamw, lion, rmsprop or sgd"
            )
        if name in ELSEWHERE:
            raise ValueError(
                f"isolation needs an optimizer that keeps no other point than the parameters, but {name} does and "
                "would move held entries there: use adamw, lion, rmsprop or sgd"
            )


def _links(part: Any, seen: set[int]) -> Iterator[str]:
    """Names of the functions whose closures make up an optimizer, such as 'scale_by_adam'."""
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, list | tuple):
        inside: Any = part
    elif isinstance(part, dict):
        inside = part.values()
    elif inspect.isfunction(part):
        yield part.__qualname__.partition(".")[0]
        inside = []
        for cell in part.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell: a function that names itself
                inside.append(cell.cell_contents)
    else:
        return
    for each in inside:
        yield from _links(each, seen)


def held_mask(opt_state: optax.OptState) -> Any:
    """The held entries as a tree of bools, from any optimizer state with one isolation inside.

    >>> held_mask(isolate(optax.sgd(1.0), {"w": jnp.array([True, False])}).init({"w": jnp.ones(2)}))
    {'w': Array([ True, False], dtype=bool)}
    """
    states = _isolations(opt_state)
    if len(states) != 1:
        raise ValueError(f"the optimizer state has {len(states)} isolations, held_mask reads one: wrap once")
    state = states[0]
    return state.held if isinstance(state, IsolateState) else marked(state.marks, HELD)


HELD, FIRST = 1, 2  # bits of a mark


def marked(marks: Any, bit: int) -> Any:
    """Which entries have that bit."""
    return jax.tree.map(lambda m: (m & bit) != 0, marks)


def _isolations(opt_state: optax.OptState) -> list[Any]:
    kinds = (IsolateState, EvolvingState)
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]


def with_fresh_inner(opt_state: optax.OptState, fresh: optax.OptState) -> optax.OptState:
    """`fresh`, a new state, but an evolving isolation of the same optimizer keeps importance, marks and step."""

    def is_evolving(x: Any) -> bool:
        return isinstance(x, EvolvingState)

    if not any(is_evolving(state) for state in _isolations(opt_state)):
        return fresh  # perhaps of another optimizer
    return jax.tree.map(
        lambda old, new: old._replace(inner=new.inner) if is_evolving(old) else new,
        opt_state,
        fresh,
        is_leaf=is_evolving,
    )


KINDS = (  # what a path contains, the first that fits
    (r"norm|ln_|layernorm", "norm"),
    (r"embed|positions/table|wte|wpe", "embedding"),
    (r"query|q_proj|wq", "query"),
    (r"key|k_proj|wk", "key"),
    (r"value|v_proj|wv", "value"),
    (r"attention/out|o_proj|wo", "out"),
    (r"gate", "gate"),
    (r"up", "up"),
    (r"down", "down"),
    (r"head", "head"),
)


def isolation_metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """Scalars that tell how the held set evolves; empty without an evolving isolation. Reads small counters only.

    Returns: "isolation/..." with held (share of the entries that could be), choices, overlap_first, overlap_previous,
      chance (what both would be for random sets of that size, q / (2 - q)), entered and left (over the held), stay
      (choices that an entry stays on average, |held| / left, at most `choices`), skipped (gradient entries that were
      not finite) and held/KIND, the share of the held set in embedding, query, key, value, out, gate, up, down, norm,
      head or other.
    """
    states = [state for state in _isolations(opt_state) if isinstance(state, EvolvingState)]
    if not states:
        return {}
    state, drift = states[0], states[0].drift
    choices = drift.choices.astype(jnp.float32)
    metrics = {
        "held": drift.held,
        "overlap_first": drift.overlap_first,
        "overlap_previous": drift.overlap_previous,
        "chance": drift.held / (2 - drift.held),
        "entered": drift.entered,
        "left": drift.left,
        "stay": jnp.where(drift.left * choices > 1, 1 / jnp.maximum(drift.left, 1e-9), choices),
        "choices": choices,
        "skipped": state.skipped.astype(jnp.float32),
    }
    counts = jnp.sum(drift.counts.astype(jnp.float32) * jnp.array([65536.0, 1.0]).reshape(1, 1, 2), axis=(1, 2))
    shares = counts / jnp.maximum(jnp.sum(counts), 1)
    for path, share in zip(named_leaves(state.marks), shares, strict=True):
        kind = next((kind for pattern, kind in KINDS if re.search(pattern, path)), "other")
        metrics[f"held/{kind}"] = metrics.get(f"held/{kind}", jnp.float32(0)) + share
    return {f"isolation/{name}": value for name, value in metrics.items()}
