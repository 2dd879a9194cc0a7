# SPDX-License-Identifier: Apache-2.0
"""What a method is handed: a model, its parameters, its data, and the one `train` bound to the run's options.

Whatever a method of several stages makes is kept in the run directory, so that the same command goes on where it was:

checkpoints/<stage>   states, from `train`
kept/<name>           trees of arrays, from `once`: cores, fused weights
<name>.json           what people want to read, from `note`: groups and their overlaps
scores.npz            held-out scores of every record after every stage, from `score`
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from jaxlm.checkpoints.runs import RunCheckpoints
from jaxlm.nn.decoder import Model
from jaxlm.train.held_out import evaluate, item_metrics, score_items
from jaxlm.train.loop import train
from jaxlm.train.options import RunOptions
from jaxlm.train.phase import Params, Phase
from jaxlm.train.scores import Scores
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
      batches: `(tasks=None, weights=None, rows=0, whole=False) -> stream` of training batches, endless; None and 0:
        the configured mixture, and the rows of an update. A process gets the rows that it feeds, or the whole batch.
      held_out: `() -> iterable` of evaluation batches, each held-out row once.
      reporter: where metrics and events go.
      describe: `(task_id, record_id) -> str`, a record's place in its source.
      rows: task -> rows to train on, of those that have any.
      scores: the run's held-out scores by record and stage; column 0 comes before training.
      kept: what `once` made in a run without a directory.
      tokenizer: `() -> tokenizer` of the data.
      record: `(task_id, record_id) -> record` as the task's training source has it.
      generated: `(model, params) -> metrics` of held-out records that the model answers by itself; None: it does not.
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
    rows: Mapping[str, int]
    scores: Scores
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Callable[[], Any] | None = None
    record: Callable[[int, int], Any] | None = None
    generated: Callable[[Model, Params], Mapping[str, float]] | None = None

    def evaluate(self, model: Model, params: Params) -> dict[str, float]:
        """Held-out metrics: loss, and per task loss, perplexity and exact match; and what `generated` measures."""
        metrics = evaluate(model, params, self.held_out(), self.task_names, mesh=self.mesh)
        return metrics | self._generated(model, params)

    def score(
        self, column: str, model: Model, params: Params, *, step: int, learned: Sequence[str] = ()
    ) -> dict[str, float]:
        """Held-out metrics, reported, and the scores of every record as a column of the run's matrix.

        Args:
          column: the stage that has just ended; one of that name is replaced.
          step: updates of the run so far.
          learned: the tasks that this stage taught.
        """
        items = score_items(model, params, self.held_out(), mesh=self.mesh)
        metrics = item_metrics(items, self.task_names) | self._generated(model, params)
        self.reporter.evaluation(step, metrics)  # before the column is kept: what is kept is not scored again
        self.scores.record(column, items, learned=[list(self.task_names).index(task) for task in learned])
        return metrics

    def _generated(self, model: Model, params: Params) -> dict[str, float]:
        return {} if self.generated is None else dict(self.generated(model, params))

    def once(self, name: str, make: Callable[[], Any], like: Any, *, stage: str = "") -> Any:
        """What `make` returns, made once in a run: later, and when the run is resumed, it comes from the disk.

        Args:
          name: unique in a run.
          make: a tree of arrays.
          like: its shapes, dtypes and shardings.
          stage: whose checkpoints are of no use once the tree is kept, and go.
        """
        if not self.options.directory:
            if name not in self.kept:
                self.kept[name] = make()
            return self.kept[name]
        kept = RunCheckpoints(pathlib.Path(self.options.directory) / "kept" / name, keep_last=1)
        try:
            restored = kept.restore(like)
            if restored is not None:
                return restored.state
            tree = make()
            kept.save(0, tree, background=False)
        finally:
            kept.close()
        if stage and jax.process_index() == 0:
            shutil.rmtree(pathlib.Path(self.options.directory) / "checkpoints" / stage, ignore_errors=True)
        return tree

    def note(self, name: str, value: Any, text: str) -> None:
        """Prints a plan, a table, a decision as `text`, and writes it as JSON to `<name>.json` in the run directory."""
        if jax.process_index():
            return
        print(text, flush=True)
        if self.options.directory:
            part = pathlib.Path(self.options.directory) / f"{name}.json.part"
            part.write_text(json.dumps(value, indent=1) + "\n")
            part.replace(part.with_suffix(""))

    def train(
        self,
        phase: Phase,
        *,
        model: Model | None = None,
        start: Params | State | None = None,
        records: Any = None,
        steps: int | None = None,
        stage: str = "train",
        first_step: int = 0,
    ) -> State:
        """Runs one phase with the run's options; a stage that is already on disk is resumed or returned at once.

        Args:
          phase: what to learn and how.
          model: that evaluates the phase's parameters; None: the job's.
          start: parameters, or the state of an earlier stage, moments included; None: the job's parameters.
          records: what `phase.batches` is given; None: the configured mixture.
          steps: updates; None: `options.steps`.
          stage: names the checkpoints; unique within a run.
          first_step: updates of the run before this stage, where `start` is parameters.
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
            first_step=first_step,
            evaluate=lambda params: self.evaluate(trained, params),
            reporter=self.reporter,
            describe=self.describe,
            task_names=self.task_names,
            config=dataclasses.asdict(trained.config),
        )
