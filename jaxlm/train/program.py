# SPDX-License-Identifier: Apache-2.0
"""The compiled train step, kept between stages: stages that share a phase share one program."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxlm.train.phase import Batch, Phase
from jaxlm.train.state import State
from jaxlm.train.step import Metrics, make_train_step


class Program:
    """A train step that compiles once for each shape of a batch and says how long that took."""

    def __init__(self, step: Any):
        self._step = step
        self._compiled: dict[Any, Any] = {}

    def __call__(self, state: State, batch: Batch, on_compile: Callable[[float], None]) -> tuple[State, Metrics]:
        """One update; `on_compile` hears the seconds when a new shape came."""
        shape = _shape(batch)
        if shape not in self._compiled:
            begin = time.perf_counter()
            self._compiled[shape] = self._step.lower(state, batch).compile()
            on_compile(time.perf_counter() - begin)
        return self._compiled[shape](state, batch)

    def is_new(self, batch: Batch) -> bool:
        """Whether an update with this batch compiles first."""
        return _shape(batch) not in self._compiled


def _shape(batch: Batch) -> Any:
    return tuple((name, x.shape, x.dtype) for name, x in sorted(batch.items()))


def program(phase: Phase, *, mesh: jax.sharding.Mesh, shardings: State, num_parts: int) -> Program:
    """The program of a phase; the same one again when loss, update function, mesh and shardings are the same.

    How an optimizer's state begins (a held set, the length of a schedule) is no part of the program.
    """
    leaves, treedef = jax.tree.flatten(shardings)
    loss_fn: Any = phase.loss_fn
    return _program(loss_fn, phase.tx.update, phase.extra, mesh, tuple(leaves), treedef, num_parts)


def _no_init(params: Any) -> Any:
    raise AssertionError("a step updates a state, it makes none")


@functools.lru_cache(maxsize=8)
def _program(loss_fn: Any, update: Any, extra: Any, mesh: Any, leaves: tuple, treedef: Any, num_parts: int) -> Program:
    shardings = jax.tree.unflatten(treedef, leaves)
    phase = Phase(loss_fn, optax.GradientTransformationExtraArgs(_no_init, update), extra=extra)
    return Program(make_train_step(phase, mesh=mesh, shardings=shardings, num_parts=num_parts))
