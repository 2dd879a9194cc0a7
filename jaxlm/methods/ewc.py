# SPDX-License-Identifier: Apache-2.0
"""EWC: stages with a quadratic pull to where earlier tasks were solved, the soft neighbour of holding entries."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.methods.sft import Sft
from jaxlm.methods.stages import Mixing, Stage, in_order, plan, score_stage, train_stage
from jaxlm.nn.decoder import Model
from jaxlm.train.phase import Params, Phase
from jaxlm.transforms.elastic import pull
from jaxlm.transforms.squares import squared_gradients

if TYPE_CHECKING:
    from jaxlm.train.job import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ewc:
    """Elastic weight consolidation over stages (arXiv:1612.00796).

    After each stage `fisher_steps` batches of its tasks are seen without training; the mean of the squared gradients,
    divided by its mean over all entries so that one `strength` fits models of any size, weighs a penalty around the
    parameters that the stage ended with. Departs: these are squares of batch gradients, not of single examples.

    Attributes:
      sft: what is learnt and by which optimizer.
      strength: >= 0, of the penalty; 0: plain stages.
      fisher_steps: batches, on top of `run.steps`.
      order, mixing: as in `MultiStage`.
    """

    sft: Sft = Sft()
    strength: float = 0.1
    fisher_steps: int = 20
    order: tuple[tuple[str, ...], ...] = ()
    mixing: Mixing = "concat"

    def __post_init__(self):
        if self.sft.lora is not None:
            raise ValueError("EWC pulls on the model's own parameters, lora trains adapters: take one of them")
        if self.fisher_steps < 1:
            raise ValueError(f"fisher_steps must be at least 1, got {self.fisher_steps}")

    def shrunk(self) -> "Ewc":
        """For two updates a task."""
        return dataclasses.replace(self, fisher_steps=1)

    def total_steps(self, steps: int, num_tasks: int) -> int:
        """Updates of a whole run, counting batches that are only looked at."""
        return steps + (len(self.order) or num_tasks) * self.fisher_steps - self.fisher_steps

    def model(self, model: Model) -> Model:
        """The model itself."""
        return model

    def phase(self, model: Model, *, num_tasks: int, steps: int) -> Phase:
        """SFT's with the pull around its optimizer, of strength zero until a stage has ended."""
        phase = self.sft.phase(model, num_tasks=num_tasks, steps=steps)
        return phase._replace(tx=pull(phase.tx, strength=self.strength))

    def run(self, job: "Job"):
        """Trains the stages; returns the parameters after the last."""
        phase = self.phase(job.model, num_tasks=len(job.task_names), steps=job.options.steps)
        look = phase._replace(tx=squared_gradients())
        stages = plan(in_order(self.order, list(job.rows)), job.rows, steps=job.options.steps, mixing=self.mixing)
        weight = anchor = state = None
        params = job.params
        for index, stage in enumerate(stages):
            tx = pull(self.sft.tx(stage.steps), strength=self.strength)
            if weight is not None:
                tx = tx._replace(init=functools.partial(_begin, tx.init, weight, anchor))
            stage = stage._replace(first_step=stage.first_step + index * self.fisher_steps)
            state = train_stage(job, phase._replace(tx=tx), stage, state, model=job.model)
            params = state.params
            if index + 1 == len(stages):
                break
            score_stage(job, stage, job.model, params)
            seen = Stage(
                f"fisher-{index + 1}", stage.tasks, self.fisher_steps, stage.first_step + stage.steps, stage.weights
            )
            squares: Any = train_stage(job, look, seen, state, model=job.model).opt_state
            weight, anchor = _added(squares.total, params, weight, anchor)
        return params


def _begin(init: Callable, weight: Any, anchor: Any, params: Params) -> Any:
    """The state of a stage that is pulled from its first update on."""
    if not jax.tree.leaves(params):  # optax asks which leaves are like parameters
        return init(params)
    return init(params)._replace(weight=weight, anchor=anchor)


@jax.jit
def _added(squares: Any, params: Params, weight: Any, anchor: Any) -> tuple[Any, Any]:
    """Sums of weights and of weighted solutions, one task more; the task's weights have mean 1."""
    mean = optax.tree.sum(squares) / sum(leaf.size for leaf in jax.tree.leaves(squares))
    mine = jax.tree.map(lambda s: s / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny), squares)
    here = jax.tree.map(jnp.multiply, mine, params)
    if weight is None:
        return mine, here
    return jax.tree.map(jnp.add, weight, mine), jax.tree.map(jnp.add, anchor, here)
