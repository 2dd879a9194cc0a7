# SPDX-License-Identifier: Apache-2.0
"""One group of tasks after the other: the setting in which models forget, and the control of every isolation."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import optax

from jaxlm.methods.epi import Epi
from jaxlm.methods.sft import Sft
from jaxlm.methods.stages import Mixing, in_order, plan, score_stage, train_stage
from jaxlm.nn.decoder import Model
from jaxlm.train.phase import Phase
from jaxlm.transforms.isolation import isolate
from jaxlm.weights.select import random_entries

if TYPE_CHECKING:
    from jaxlm.train.job import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiStage:
    """SFT or EPI on the tasks in turn, each stage going on from the weights that the one before left.

    `run.steps` is divided among the stages; moments and schedule start afresh in each, while what an evolving
    isolation knows (importance, held set) goes on.

    Attributes:
      method: what trains in every stage.
      order: groups of task names; (): each task its own stage, in the order of the config.
      mixing: "concat": tasks count by their rows; "balanced": equally.
      replay: [0, 1), share of a stage's rows that come from earlier stages.
      hold_random: [0, 1), share of entries held at random, drawn anew for each stage; 0.5 is half fine-tuning
        (Hui et al. 2024, arXiv:2404.18466), with entries where the paper draws whole matrices.
    """

    method: Sft | Epi = Sft()
    order: tuple[tuple[str, ...], ...] = ()
    mixing: Mixing = "concat"
    replay: float = 0.0
    hold_random: float = 0.0

    @classmethod
    def tiny(cls) -> "MultiStage":
        """For the laws that every method obeys."""
        return cls(hold_random=0.5)

    def shrunk(self) -> "MultiStage":
        """For two updates a task."""
        method = self.method.shrunk() if isinstance(self.method, Epi) else self.method
        return dataclasses.replace(self, method=method)

    def total_steps(self, steps: int, num_tasks: int) -> int:
        """Updates of a whole run."""
        return steps

    def model(self, model: Model) -> Model:
        """The model that the stages train."""
        return self.method.model(model)

    def phase(self, model: Model, *, num_tasks: int, steps: int) -> Phase:
        """The phase of the first stage."""
        phase = self.method.phase(model, num_tasks=num_tasks, steps=steps)
        return phase._replace(tx=self._tx(phase.tx, seed=0))

    def run(self, job: "Job"):
        """Trains the stages; returns the parameters after the last, adapters merged."""
        model = self.model(job.model)
        method = self.method.seeded(job.options.seed) if isinstance(self.method, Epi) else self.method
        phase = method.phase(model, num_tasks=len(job.task_names), steps=job.options.steps)
        groups = in_order(self.order, list(job.rows))
        stages = plan(groups, job.rows, steps=job.options.steps, mixing=self.mixing, replay=self.replay)
        state, params = None, job.params
        for index, stage in enumerate(stages):
            tx = method.tx(stage.steps, num_tasks=len(job.task_names))
            tx = self._tx(tx, seed=(1_000_003 * job.options.seed + index) % 2**31)
            state = train_stage(job, phase._replace(tx=tx), stage, state, model=model)
            params = state.params
            if stage is not stages[-1]:
                score_stage(job, stage, model, params)
        return jax.jit(phase.finish)(params)

    def _tx(self, tx: optax.GradientTransformationExtraArgs, *, seed: int) -> optax.GradientTransformationExtraArgs:
        if not self.hold_random:
            return tx
        if getattr(self.method, "lora", None) is not None:
            raise ValueError("hold_random holds entries of the model's own parameters, lora trains adapters: take one")
        return isolate(tx, lambda params: random_entries(params, self.hold_random, seed=seed))
