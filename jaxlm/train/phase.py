# SPDX-License-Identifier: Apache-2.0
"""One training run as six slots: what is learnt, how, on what, and what happens before and after."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import optax

from jaxlm.losses.term import Term

Params = Any  # a nested dict of arrays
Batch = dict[str, jax.Array]


class LossFn(Protocol):
    """A pure function of parameters, batch and key that returns named terms."""

    def __call__(self, params: Params, batch: Batch, rng: jax.Array) -> dict[str, Term]: ...


def unchanged(params: Params, rng: jax.Array | None = None) -> Params:
    """Parameters as they are."""
    return params


def as_given(records: Any, params_fn: Callable[[], Params]) -> Iterator[Batch]:
    """Records that already are batches."""
    return records


def nothing_more(batch: Batch) -> Mapping[str, Any]:
    """No extra arguments."""
    return {}


class Phase(NamedTuple):
    """One training run.

    Attributes:
      loss_fn: what is learnt: `(params, batch, rng) -> {name: Term}`.
      tx: how a gradient becomes an update; any optax transformation, extra arguments allowed.
      prepare: `(params, rng) -> params` before step 0: adapters, a new head. Runs compiled, so it must be pure.
      batches: `(records, params_fn) -> iterator`: rollouts, mining, curricula.
      finish: `params -> params` after the last step: merge adapters, drop a head.
      extra: `batch -> {name: value}`, extra arguments of `tx.update`: what an optimizer must know of the batch, such as
        whose task it is. Called inside the compiled step, on the whole batch of an update.
    """

    loss_fn: LossFn
    tx: optax.GradientTransformationExtraArgs
    prepare: Callable[..., Params] = unchanged
    batches: Callable[..., Iterator[Batch]] = as_given
    finish: Callable[..., Params] = unchanged
    extra: Callable[[Batch], Mapping[str, Any]] = nothing_more
