# SPDX-License-Identifier: Apache-2.0
"""DPI: tasks grouped by the overlap of their cores and trained in stages that hold the cores of earlier ones."""

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.methods.sft import Sft
from jaxlm.methods.stages import Mixing, Stage, in_order, plan, score_stage, train_stage
from jaxlm.nn.decoder import Model
from jaxlm.train.phase import Params, Phase
from jaxlm.transforms.isolation import isolate
from jaxlm.weights.names import named_leaves
from jaxlm.weights.overlap import chance_jaccard, core_groups, overlap_table
from jaxlm.weights.select import largest, num_held, random_entries

if TYPE_CHECKING:
    from jaxlm.train.job import Job

Mask = Any  # a tree like the parameters, bool, True = belongs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpi:
    """Parameter isolation over stages (arXiv:2601.17777).

        core of task i = the `fraction` of entries that a short run on i alone, from the given weights, moves most
        groups = connected components of the tasks whose cores have a Jaccard overlap of at least `threshold`
        stage m trains group m; entries in the cores of earlier groups are held, bit for bit

    `run.steps` is divided among the stages; the probes come on top, `probe_steps` for each task.

    Attributes:
      sft: what is learnt and by which optimizer.
      fraction: share of all entries, [0, 1); 0: plain stages.
      threshold: Jaccard, (0, 1].
      groups: "threshold", "joint" (one stage, nothing held) or "separate" (every task its own).
      order: of the groups: "random" (from `run.seed`), "given" (by the first task of each in the config), or
        the groups themselves, by task names, in which case overlaps are only reported.
      probe_steps: updates of each probe.
      core_source: "probe" (the paper) or "stage": what the stage itself moved most among the entries free in it. A
        probe starts from the given weights and a stage does not, so "stage" guards what was in fact learnt.
      cores: "changed", or the controls of equal size "random" and "bottom" (those that moved least).
      hold: "earlier", or "none" to see what grouping alone does.
      scope: one cut over all entries, or one in every layer.
      relative: rank by change over magnitude.
      mixing, replay: as in `MultiStage`.
    """

    sft: Sft = Sft()
    fraction: float = 0.01
    threshold: float = 0.1
    groups: Literal["threshold", "joint", "separate"] = "threshold"
    order: Literal["random", "given"] | tuple[tuple[str, ...], ...] = "random"
    probe_steps: int = 500
    core_source: Literal["probe", "stage"] = "probe"
    cores: Literal["changed", "random", "bottom"] = "changed"
    hold: Literal["earlier", "none"] = "earlier"
    scope: Literal["global", "layer"] = "global"
    relative: bool = False
    mixing: Mixing = "concat"
    replay: float = 0.0

    def __post_init__(self):
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction must be in [0, 1), got {self.fraction}: every entry held leaves none to train")
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold must be in (0, 1], got {self.threshold}: every overlap is >= 0, which would put all tasks "
                "in one group; use groups='joint' for that"
            )
        if self.probe_steps < 1:
            raise ValueError(f"probe_steps must be at least 1, got {self.probe_steps}")
        if self.sft.lora is not None:
            raise ValueError("cores are entries of the model's own parameters, lora trains adapters: take one of them")

    @classmethod
    def tiny(cls) -> "Dpi":
        """For the laws that every method obeys."""
        return cls(fraction=0.2, probe_steps=2)

    def shrunk(self) -> "Dpi":
        """For two updates a task."""
        return dataclasses.replace(self, probe_steps=1)

    def total_steps(self, steps: int, num_tasks: int) -> int:
        """Updates of a whole run: probes and stages."""
        return steps + (num_tasks * self.probe_steps if self.needs_probes else 0)

    @property
    def needs_probes(self) -> bool:
        """Whether anything depends on what a task moves by itself."""
        return self.needs_cores and self.cores != "random"

    @property
    def needs_cores(self) -> bool:
        """Whether the tasks' cores decide anything: who is grouped with whom, or what is held."""
        grouped = self.groups != "threshold" or not isinstance(self.order, str)
        return not (grouped and (self.core_source == "stage" or self.hold == "none" or self.groups == "joint"))

    def model(self, model: Model) -> Model:
        """The model itself: isolation adds no module."""
        return model

    def phase(self, model: Model, *, num_tasks: int, steps: int) -> Phase:
        """The phase of a stage, with nothing held yet; what is held is state, so all stages share its compiled step."""
        phase = self.sft.phase(model, num_tasks=num_tasks, steps=steps)
        return phase._replace(tx=isolate(phase.tx))

    def run(self, job: "Job"):
        """Probes, groups, stages; returns the parameters after the last stage."""
        phase = self.phase(job.model, num_tasks=len(job.task_names), steps=job.options.steps)
        cores = self.probe(job, phase)
        groups = self.grouped(job, cores)
        probes = self.total_steps(0, len(job.rows))
        return self.staged(job, phase, cores, groups, steps=job.options.steps, first_step=probes)

    def probe(self, job: "Job", phase: Phase) -> dict[str, Mask]:
        """The core of every task, from runs on each alone; {} if nothing needs them."""
        tasks = tasks_of(job, "DPI")
        if not self.needs_cores:
            return {}
        return self.cores_of(job, lambda index: self.tuned(job, phase, index, tasks[index]))

    def cores_of(self, job: "Job", tuned: Callable[[int], Params]) -> dict[str, Mask]:
        """The core of every task, given the parameters that each alone leads to; kept in the run directory."""
        cores = {}
        for index, task in enumerate(tasks_of(job, "DPI")):

            def core(index=index, task=task):
                if self.cores == "random":
                    return self.random_core(job.params, job.options.seed, index)
                return self.core_of(tuned(index), job.params, task=task)

            like = like_params(job.params, jnp.bool_)
            cores[task] = job.once(f"core-{task}", core, like, stage=f"probe-{task}")
        return cores

    def tuned(self, job: "Job", phase: Phase, index: int, task: str) -> Params:
        """The job's parameters after a short run on one task."""
        phase = phase._replace(tx=isolate(self.sft.tx(self.probe_steps)))
        stage = Stage(f"probe-{task}", (task,), self.probe_steps, index * self.probe_steps, {task: 1.0})
        return train_stage(job, phase, stage, None, model=job.model).params

    def core_of(self, tuned: Params, before: Params, *, task: str, free: Mask | None = None) -> Mask:
        """The `fraction` of entries that moved most, of those free; entries that did not move never belong.

        Raises: ValueError, naming task and leaf, for weights that are not finite or a run that moved nothing; for
          parameters of fewer bits than float32.
        """
        for path, leaf in named_leaves(before).items():
            if jnp.finfo(leaf.dtype).bits < 32:
                raise ValueError(
                    f"{path} is {leaf.dtype}: sizes of its updates are quantized by magnitude, so the largest would be "
                    "those of large weights; train with float32 masters"
                )
        for path, top in named_leaves(_tops(changes(tuned, before, relative=False))).items():
            if not np.isfinite(top):
                raise ValueError(f"task {task!r} left {path} with entries that are not finite: lower its learning rate")
        sizes = changes(tuned, before, relative=self.relative)
        if free is not None:
            sizes = jax.tree.map(lambda s, f: jnp.where(f, s, 0), sizes, free)
        if self.fraction and not any(np.any(top) for top in jax.tree.leaves(_tops(sizes))):
            raise ValueError(f"task {task!r} changed nothing: check its loss weights and learning rate")
        return _moved_most(sizes, self.fraction, self.scope, self.cores == "bottom")

    def random_core(self, params: Params, seed: int, index: int) -> Mask:
        """As many entries, drawn at random."""
        return random_entries(params, self.fraction, seed=(1_000_003 * seed + index) % 2**31, scope=self.scope)

    def grouped(self, job: "Job", cores: dict[str, Mask]) -> list[tuple[str, ...]]:
        """Groups of tasks in the order of training; printed and written to `plan.json` with all overlaps."""
        tasks = tasks_of(job, "DPI")
        table = overlap_table([cores[task] for task in tasks]) if cores else None
        if not isinstance(self.order, str):
            groups = in_order(self.order, tasks)
        elif self.groups == "threshold":
            found = core_groups(table, threshold=self.threshold, mode="threshold")
            groups = [tuple(tasks[i] for i in group) for group in found]
        else:
            groups = [tuple(tasks)] if self.groups == "joint" else [(task,) for task in tasks]
        if self.order == "random":
            random.Random(job.options.seed).shuffle(groups)
        chance = chance_jaccard(self.fraction)
        warnings = []
        if table is not None and self.groups == "threshold" and isinstance(self.order, str):
            others = table[~np.eye(len(tasks), dtype=bool)]
            if np.all(others < 3 * chance):
                warnings.append("cores overlap no more than random sets: the grouping is arbitrary")
            if len(groups) == 1:
                warnings.append("all tasks are in one group: this run is joint SFT")
        wanted = num_held(self.fraction, sum(leaf.size for leaf in jax.tree.leaves(job.params)))
        entries = {task: sum(int(jnp.sum(x)) for x in jax.tree.leaves(core)) for task, core in cores.items()}
        for task, count in entries.items():
            if self.scope == "global" and count < wanted:
                warnings.append(
                    f"the core of {task!r} holds {count} entries instead of {wanted}: no more of them moved"
                )
        lines = [" -> ".join(" + ".join(group) for group in groups)]
        if table is not None:
            lines.append(f"overlap of cores, Jaccard; {chance:.4f} by chance")
            lines += [
                f"{task:>16}  " + "  ".join(f"{x:.4f}" for x in row) for task, row in zip(tasks, table, strict=True)
            ]
        overlap = None if table is None else table.tolist()
        plan_of = {"groups": groups, "tasks": tasks, "overlap": overlap, "chance": chance, "entries": entries}
        plan_of["warnings"] = warnings
        job.note("plan", plan_of, "\n".join([*lines, *(f"warning: {warning}" for warning in warnings)]))
        return groups

    def staged(
        self,
        job: "Job",
        phase: Phase,
        cores: dict[str, Mask],
        groups: Sequence[tuple[str, ...]],
        *,
        steps: int,
        first_step: int,
    ) -> Params:
        """The stages, `steps` updates in all, holding the cores of earlier groups."""
        stages = plan(groups, job.rows, steps=steps, mixing=self.mixing, replay=self.replay, first_step=first_step)
        held, state, params = None, None, job.params
        for stage in stages:
            tx = isolate(self.sft.tx(stage.steps), held)
            before, state = params, train_stage(job, phase._replace(tx=tx), stage, state, model=job.model)
            params = state.params
            if stage is stages[-1]:
                break
            score_stage(job, stage, job.model, params)
            if self.hold == "earlier":
                held = self.hold_also(held, job, stage, cores, params, before)
        return params

    def hold_also(
        self, held: Mask | None, job: "Job", stage: Stage, cores: dict, params: Params, before: Params
    ) -> Mask:
        """What is held after a stage: its tasks' cores too."""
        if self.core_source == "probe":
            return union(held, *(cores[task] for task in stage.tasks))
        if self.cores == "random":
            return union(held, self.random_core(params, job.options.seed, stage.first_step))
        free = None if held is None else jax.tree.map(jnp.logical_not, held)
        return union(held, self.core_of(params, before, task=", ".join(stage.tasks), free=free))


def tasks_of(job: "Job", method: str) -> list[str]:
    """The tasks to train. Raises: ValueError for fewer than two."""
    tasks = list(job.rows)
    if len(tasks) < 2:
        raise ValueError(f"{method} needs at least two tasks with training records, got {tasks}; with one this is SFT")
    return tasks


def like_params(params: Params, dtype: Any = None) -> Any:
    """Shapes and shardings of a tree like the parameters, for what a run keeps."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=x.sharding), params)


def union(held: Mask | None, *others: Mask) -> Mask:
    """Entries in any of the masks; None holds nothing."""
    first, *rest = others if held is None else (held, *others)
    return functools.reduce(lambda a, b: jax.tree.map(jnp.logical_or, a, b), rest, first)


@functools.partial(jax.jit, static_argnames="relative")
def changes(tuned: Params, before: Params, *, relative: bool) -> Any:
    """|tuned - before| of every entry, float32; relative: over |before|, entries that are zero as they are."""

    def change(a, b):
        size = jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))
        return size / jnp.where(b == 0, 1.0, jnp.abs(b)) if relative else size

    return jax.tree.map(change, tuned, before)


def _tops(sizes: Any) -> Any:
    """The largest number of every leaf, NaN if there is one, on the host."""
    return jax.device_get(jax.tree.map(jnp.max, sizes))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _moved_most(sizes: Any, fraction: float, scope: Any, least: bool) -> Mask:
    """The entries of largest size, or of least, among those that moved at all."""
    scores = jax.tree.map(lambda s: jnp.where(s > 0, -s, -jnp.inf), sizes) if least else sizes
    return jax.tree.map(lambda m, s: m & (s > 0), largest(scores, fraction, scope=scope), sizes)
