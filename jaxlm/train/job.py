# SPDX-License-Identifier: Apache-2.0
"""What a method is handed: a model, its parameters, its data, and the one `train` bound to the run's options."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jaxlm.nn.decoder import Model
from jaxlm.train.held_out import evaluate
from jaxlm.train.loop import train
from jaxlm.train.options import RunOptions
from jaxlm.train.phase import Params, Phase
from jaxlm.train.state import State


@dataclasses.dataclass(frozen=True)
class Job:
    """One run's means, made by `jaxlm.run` and used by a method's `run`.

    Attributes:
      model: as configured.
      params: before training, sharded over `mesh`.
      task_names: index = task id in the batches.
      options: steps, batch size, seed, directory and intervals.
      mesh: of all devices of all processes.
      batches: `(tasks=None, weights=None) -> stream` of training batches, endless; None: the configured mixture.
      held_out: `() -> iterable` of evaluation batches, each held-out row once.
      reporter: where metrics and events go.
      describe: `(task_id, record_id) -> str`, a record's place in its source.
    """

    model: Model
    params: Params
    task_names: Sequence[str]
    options: RunOptions
    mesh: jax.sharding.Mesh
    batches: Callable[..., Any]
    held_out: Callable[[], Iterable[Any]]
    reporter: Any
    describe: Callable[[int, int], str]

    def evaluate(self, model: Model, params: Params) -> dict[str, float]:
        """Held-out metrics: loss, and per task loss, perplexity and exact match."""
        return evaluate(model, params, self.held_out(), self.task_names, mesh=self.mesh)

    def train(
        self,
        phase: Phase,
        *,
        model: Model | None = None,
        start: Params | State | None = None,
        records: Any = None,
        steps: int | None = None,
        stage: str = "train",
    ) -> State:
        """Runs one phase with the run's options; a stage that is already on disk is resumed or returned at once.

        Args:
          phase: what to learn and how.
          model: that evaluates the phase's parameters; None: the job's.
          start: parameters, or the state of an earlier stage, moments included; None: the job's parameters.
          records: what `phase.batches` is given; None: the configured mixture.
          steps: updates; None: `options.steps`.
          stage: names the checkpoints; unique within a run.
        """
        trained = self.model if model is None else model
        return train(
            phase,
            self.params if start is None else start,
            self.batches() if records is None else records,
            options=self.options,
            mesh=self.mesh,
            steps=steps,
            stage=stage,
            evaluate=lambda params: self.evaluate(trained, params),
            reporter=self.reporter,
            describe=self.describe,
            task_names=self.task_names,
            config=dataclasses.asdict(trained.config),
        )
