# SPDX-License-Identifier: Apache-2.0
"""CPI-FT: DPI's cores and stages, then the separately tuned models fused in, then a short staged run on samples."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.methods.dpi import Dpi, Mask, changes, like_params, tasks_of, union
from jaxlm.methods.stages import plan, score_stage, train_stage
from jaxlm.nn.decoder import Model
from jaxlm.train.phase import Params, Phase
from jaxlm.transforms.isolation import isolate
from jaxlm.weights.merging import interpolate
from jaxlm.weights.transplanting import transplant

if TYPE_CHECKING:
    from jaxlm.train.job import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class CpiFt:
    """Core parameter isolation fine-tuning (arXiv:2508.21741).

    Probes, cores and groups are DPI's. The result of `base` is then fused with the probes' models: every entry in one
    task's core is taken from that task's model, all others are interpolated. A staged run of `integration_fraction`
    of the updates on all tasks in equal shares, each stage holding the cores of earlier groups, joins the parts.

    `run.steps` pays for the staged pass and the integration; the probes come on top.

    Attributes:
      dpi: probes, cores, groups, order, and the staged pass.
      base: what the fusion starts from: "staged" (DPI's result), "last_probe" or "initial" (the given weights).
      weight: of each model in the fold: "mean", 1 / (i + 1) for the i-th, or a number in [0, 1].
      space: interpolate the weights, or their differences from the given weights.
      rows: one vector an output row rather than one a matrix.
      eps: 1 - |cos| below which the interpolation is linear.
      overlap: whose an entry in several cores is: see `jaxlm.weights.transplant`.
      integration_fraction: [0, 1), of `run.steps`; 0: no integration. The paper trains on a sample of the records, we
        on as many updates as that sample would take.
      integration_rate: learning rate of the integration, as a share of the optimizer's.
      hold_current: hold the cores of a stage's own group too.
    """

    dpi: Dpi = Dpi()
    base: Literal["staged", "last_probe", "initial"] = "staged"
    weight: float | Literal["mean"] = "mean"
    space: Literal["weights", "task_vectors"] = "weights"
    rows: bool = False
    eps: float = 5e-4
    overlap: Literal["largest", "mean", "last", "group"] = "largest"
    integration_fraction: float = 0.1
    integration_rate: float = 0.5
    hold_current: bool = False

    def __post_init__(self):
        if self.space == "task_vectors" and self.base == "initial":
            raise ValueError("the task vector of base='initial' is zero; choose base='staged' or space='weights'")
        if self.weight != "mean" and not 0 <= self.weight <= 1:
            raise ValueError(f"weight is 'mean' or in [0, 1], got {self.weight}")
        if not 0 <= self.integration_fraction < 1:
            raise ValueError(f"integration_fraction must be in [0, 1), got {self.integration_fraction}")
        if self.dpi.core_source != "probe":
            raise ValueError("CPI-FT takes its cores from probes: set dpi.core_source='probe'")

    @classmethod
    def tiny(cls) -> "CpiFt":
        """For the laws that every method obeys."""
        return cls(dpi=Dpi.tiny())

    def shrunk(self) -> "CpiFt":
        """For two updates a task."""
        return dataclasses.replace(self, dpi=self.dpi.shrunk(), integration_fraction=0.5)

    def total_steps(self, steps: int, num_tasks: int) -> int:
        """Updates of a whole run: probes, then stages and integration, or the integration alone."""
        rest = steps if self.base == "staged" else round(self.integration_fraction * steps)
        return num_tasks * self.dpi.probe_steps + rest

    def model(self, model: Model) -> Model:
        """The model itself."""
        return model

    def phase(self, model: Model, *, num_tasks: int, steps: int) -> Phase:
        """DPI's."""
        return self.dpi.phase(model, num_tasks=num_tasks, steps=steps)

    def run(self, job: "Job"):
        """Probes, groups, stages, fusion, integration; returns the parameters."""
        tasks = tasks_of(job, "CPI-FT")
        phase = self.phase(job.model, num_tasks=len(job.task_names), steps=job.options.steps)

        def tuned(index: int) -> Params:
            """A task's model, from the disk where it is there: one at a time."""
            make = lambda: self.dpi.tuned(job, phase, index, tasks[index])  # noqa: E731
            return job.once(f"model-{tasks[index]}", make, like_params(job.params), stage=f"probe-{tasks[index]}")

        if self.dpi.cores == "random":  # then only the fusion needs the models; but updates are reported in their order
            for index in range(len(tasks)):
                tuned(index)
        cores = self.dpi.cores_of(job, tuned)
        groups = self.dpi.grouped(job, cores)
        integration = round(self.integration_fraction * job.options.steps)
        if 0 < integration < len(groups):
            raise ValueError(
                f"integration_fraction {self.integration_fraction} of {job.options.steps} updates is {integration}, "
                f"too few for {len(groups)} groups: raise it or run.steps, or set it to 0 for no integration"
            )
        step = len(tasks) * self.dpi.probe_steps
        base = job.params
        if self.base == "staged":
            steps = job.options.steps - integration
            base = self.dpi.staged(job, phase, cores, groups, steps=steps, first_step=step)
            step += steps
        elif self.base == "last_probe":
            base = tuned(len(tasks) - 1)
        fused = job.once("fused", lambda: self.fuse(job, base, tuned, cores, groups), like_params(job.params))
        if not integration:
            return fused
        if not job.scores.has("fused"):
            job.score("fused", job.model, fused, step=step, learned=[task for group in groups for task in group])
        return self.integrate(job, phase, fused, cores, groups, steps=integration, first_step=step)

    def fuse(
        self,
        job: "Job",
        base: Params,
        tuned: Callable[[int], Params],
        cores: Mapping[str, Mask],
        groups: Sequence[tuple[str, ...]],
    ) -> Params:
        """`base` with the tasks' models in it: their cores as they are, the rest interpolated."""
        outside = jax.tree.map(jnp.logical_not, union(*cores.values()))
        angles: dict[str, float] = {}

        def widest(number: int, path: str, angle: np.ndarray) -> None:
            angles[path] = max(angles.get(path, 0.0), float(np.max(angle, initial=0.0)))

        folded = interpolate(
            base,
            (tuned(index) for index in range(len(cores))),
            weight=self.weight,
            where=outside,
            space=self.space,
            origin=job.params if self.space == "task_vectors" else None,
            eps=self.eps,
            rows=self.rows,
            report=widest,
        )
        widest_of_all = max(angles.values())
        job.note(
            "fusion",
            {"widest angle, radians": angles},
            f"fusion: {widest_of_all:.3g} radians at most between the models; below 0.032 it is linear",
        )
        tasks = list(cores)
        return transplant(
            folded,
            (tuned(index) for index in range(len(tasks))),
            cores.values(),
            sizes=(changes(tuned(index), job.params, relative=False) for index in range(len(tasks))),
            overlap=self.overlap,
            groups=[[tasks.index(task) for task in group] for group in groups],
        )

    def integrate(
        self,
        job: "Job",
        phase: Phase,
        fused: Params,
        cores: Mapping[str, Mask],
        groups: Sequence[tuple[str, ...]],
        *,
        steps: int,
        first_step: int,
    ) -> Params:
        """Stages on equal shares of the tasks from the fused weights, at a lower rate."""
        optimizer = self.dpi.sft.optimizer
        optimizer = dataclasses.replace(optimizer, learning_rate=self.integration_rate * optimizer.learning_rate)
        sft = dataclasses.replace(self.dpi.sft, optimizer=optimizer)
        stages = plan(groups, job.rows, steps=steps, mixing="balanced", first_step=first_step, name="integration")
        whole = phase._replace(tx=isolate(sft.tx(stages[0].steps)))
        state = job.train(whole, start=fused, steps=0, stage="integration", first_step=first_step)
        held = None
        for stage in stages:
            owned = [cores[task] for task in stage.tasks]
            now = union(held, *owned) if self.hold_current else held
            tx = isolate(sft.tx(stage.steps), now)
            state = train_stage(job, phase._replace(tx=tx), stage, state, model=job.model)
            held = union(held, *owned)
            if stage is not stages[-1]:
                score_stage(job, stage, job.model, state.params)
        return state.params
