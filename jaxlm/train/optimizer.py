# SPDX-License-Identifier: Apache-2.0
"""AdamW as an optax transformation: clipping, moments, decay by path rules, and a schedule that tells its rate."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.train.options import AdamW
from jaxlm.weights.names import named_leaves, path_of


class FollowState(NamedTuple):
    """State of `follow`.

    Attributes:
      count: int32, updates done.
      learning_rate: float32, of the last update.
      spans: int32 [3], where the schedule bends, as `spans_of` tells.
      peak: float32, its highest rate. Both are state, so that stages of any length and rate share one compiled step.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, though tuples have a method of it
    learning_rate: jax.Array
    spans: jax.Array
    peak: jax.Array


def follow(options: AdamW) -> optax.GradientTransformation:
    """Scales by minus the schedule's rate and keeps it in its state, where the train step finds and reports it."""

    def init(params: Any) -> FollowState:
        count, now, peak = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
        return FollowState(count, now, jnp.zeros(3, jnp.int32), peak)

    def update(updates: Any, state: FollowState, params: Any = None) -> tuple[Any, FollowState]:
        now = state.peak * jnp.asarray(level_at(options, state.count, state.spans, xp=jnp), jnp.float32)
        updates = jax.tree.map(lambda u: u * (-now).astype(u.dtype), updates)
        return updates, state._replace(count=optax.safe_increment(state.count), learning_rate=now)

    return optax.GradientTransformation(init, update)


def spans_of(options: AdamW, steps: int) -> tuple[int, int, int]:
    """(updates of warm-up, update at which the decay begins, updates that it lasts) of a schedule over `steps`.

    Raises: ValueError for numbers out of range.
    """
    for name in ("warmup", "decay", "final"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"{name} is a fraction in [0, 1], got {getattr(options, name)}")
    if options.learning_rate < 0 or steps < 1:
        raise ValueError(f"need learning_rate >= 0 and steps >= 1, got {options.learning_rate} and {steps}")
    if options.schedule not in SCHEDULES:
        raise ValueError(f"schedule is constant, linear, cosine or wsd, got {options.schedule!r}")
    num_warmup = round(options.warmup * steps)
    begin = num_warmup
    if options.schedule == "wsd":
        begin = max(num_warmup, steps - round(options.decay * steps))
    return num_warmup, begin, max(1, steps - begin)


SCHEDULES = ("constant", "linear", "cosine", "wsd")


def level_at(options: AdamW, step: Any, spans: Any, *, xp: Any) -> Any:
    """The rate of update `step` of a schedule with those spans, as a share of the peak."""
    num_warmup, begin, length = spans
    t = xp.clip((step - begin) / length, 0.0, 1.0)
    if options.schedule == "constant":
        level = xp.ones_like(t)
    elif options.schedule == "cosine":
        level = options.final + (1 - options.final) * 0.5 * (1 + xp.cos(np.pi * t))
    else:
        level = 1 - (1 - options.final) * t
    return xp.minimum(1.0, (step + 1) / xp.maximum(1, num_warmup)) * level


def learning_rate(options: AdamW, steps: int, *, xp: Any = np) -> Callable[[Any], Any]:
    """The rate of each update, from its index 0, 1, ...

        warm-up: peak * (step + 1) / num_warmup, so that the first update is not lost
        then, with t from 0 to 1 over the rest:  constant: peak;  linear: peak to final * peak;
        cosine: the same along half a cosine;  wsd: peak, then linear over the last `decay` of the steps

    Args:
      options: `learning_rate` is the peak; `warmup` and `decay` are fractions of the steps.
      steps: updates in all; later ones keep the last rate.
      xp: numpy for numbers on the host, jax.numpy inside a compiled update.
    Raises: ValueError for numbers out of range.

    >>> rate = learning_rate(AdamW(learning_rate=1.0, schedule="linear", warmup=0.2, final=0.0), 10)
    >>> [round(float(rate(step)), 3) for step in range(10)]
    [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    """
    spans = spans_of(options, steps)
    return lambda step: options.learning_rate * level_at(options, step, spans, xp=xp)


def rescheduled(opt_state: Any, tx: optax.GradientTransformation, params: Any) -> Any:
    """An optimizer state that follows the schedule of `tx` from where it stands: a resumed run may be made longer."""

    def schedule(params: Any) -> dict[str, Any]:
        state = tx.init(params)
        found = {name: optax.tree.get_all_with_path(state, name) for name in ("spans", "peak")}
        return {name: values[0][1] for name, values in found.items() if values}

    return optax.tree.set(opt_state, **jax.jit(schedule)(params))


def decay_mask(options: AdamW) -> Callable[[Any], Any]:
    """From parameters to a tree of bools: which of them decay, by `options.decayed`.

    Raises: ValueError, when called on parameters, if nothing decays though `weight_decay` is set.
    """

    def mask(params: Any) -> Any:
        def decays(key_path: Any, _: Any) -> bool:
            return any(re.fullmatch(pattern, path_of(key_path)) for pattern in options.decayed)

        chosen = jax.tree.map_with_path(decays, params)
        if jax.tree.leaves(params) and not any(jax.tree.leaves(chosen)):
            raise ValueError(
                f"weight_decay is {options.weight_decay} but `decayed` {options.decayed} matches none of the trained "
                f"parameters {list(named_leaves(params))[:4]}...: change `decayed` or set weight_decay=0"
            )
        return chosen

    return mask


def make_optimizer(options: AdamW, steps: int) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, Adam moments, decoupled decay on the matching paths, the schedule.

    Args:
      options: the numbers.
      steps: updates that the schedule spans. They and the peak rate lie in the state: where the other options are
        equal, `update` is one function, and stages that share it share a compiled step.

    Source: Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2, with decay inside the learning rate, as in
    optax.adamw.
    """
    spans, peak = spans_of(options, steps), options.learning_rate
    tx = _adamw(dataclasses.replace(options, learning_rate=0.0))

    def init(params: Any) -> Any:
        return optax.tree.set(tx.init(params), spans=jnp.array(spans, jnp.int32), peak=jnp.float32(peak))

    return tx._replace(init=init)


@functools.lru_cache(maxsize=64)
def _adamw(options: AdamW) -> optax.GradientTransformationExtraArgs:
    if options.clip_norm is not None and options.clip_norm <= 0:
        raise ValueError(f"clip_norm must be positive, or None for no clipping, got {options.clip_norm}")
    links = [] if options.clip_norm is None else [optax.clip_by_global_norm(options.clip_norm)]
    links.append(optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.epsilon))
    if options.weight_decay:
        links.append(optax.add_decayed_weights(options.weight_decay, mask=decay_mask(options)))
    links.append(follow(options))
    return optax.with_extra_args_support(optax.chain(*links))
