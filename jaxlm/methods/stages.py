# SPDX-License-Identifier: Apache-2.0
"""Training in stages: who learns when, for how long, and what is handed from one stage to the next."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax.numpy as jnp

from jaxlm.nn.decoder import Model
from jaxlm.train.phase import Params, Phase, unchanged
from jaxlm.train.state import State
from jaxlm.transforms.isolation import with_fresh_inner

if TYPE_CHECKING:
    from jaxlm.train.job import Job

Mixing = Literal["concat", "balanced"]


class Stage(NamedTuple):
    """One stage of a plan.

    Attributes:
      name: of its checkpoints and of its column of scores.
      tasks: that it teaches.
      steps: updates.
      first_step: updates of the run before it.
      weights: task -> share of the rows; with replay, tasks of earlier stages too.
    """

    name: str
    tasks: tuple[str, ...]
    steps: int
    first_step: int
    weights: Mapping[str, float]


def plan(
    groups: Sequence[Sequence[str]],
    rows: Mapping[str, int],
    *,
    steps: int,
    mixing: Mixing = "concat",
    replay: float = 0.0,
    first_step: int = 0,
    name: str = "stage",
) -> list[Stage]:
    """Divides `steps` updates among groups of tasks.

    Args:
      groups: in the order of training.
      rows: task -> training rows.
      steps: of all stages together, so that a staged run costs what a joint one with the same `run.steps` costs.
      mixing: "concat": tasks count by their rows, in the length of a stage and inside it; "balanced": equally.
      replay: [0, 1), share of the rows of a stage that come from the tasks of earlier stages, equally.
      first_step: updates of the run before the first stage.
    Raises: ValueError for a share out of range, or fewer updates than stages.

    >>> [stage[:4] for stage in plan([["a", "b"], ["c"]], {"a": 10, "b": 10, "c": 20}, steps=8)]
    [('stage-1', ('a', 'b'), 4, 0), ('stage-2', ('c',), 4, 4)]
    """
    if not 0 <= replay < 1:
        raise ValueError(f"replay is a share in [0, 1), got {replay}")
    if steps < len(groups):
        raise ValueError(f"{steps} updates are too few for {len(groups)} stages: each needs at least one")
    share = {task: rows[task] if mixing == "concat" else 1 for group in groups for task in group}
    stages: list[Stage] = []
    earlier: list[str] = []
    done = 0
    for index, group in enumerate(groups):
        inside = sum(share[task] for task in group)
        passed = sum(share[task] for task in [*earlier, *group])
        end = round(steps * passed / sum(share.values()))
        end = min(max(end, done + 1), steps - (len(groups) - 1 - index))  # at least one update for each
        again = replay if earlier else 0.0
        weights = {task: (1 - again) * share[task] / inside for task in group}
        weights |= {task: again / len(earlier) for task in earlier if again}
        stages.append(Stage(f"{name}-{index + 1}", tuple(group), end - done, first_step + done, weights))
        earlier += group
        done = end
    return stages


def train_stage(job: "Job", phase: Phase, stage: Stage, start: State | None, *, model: Model) -> State:
    """Runs one stage from where another ended; None begins with the job's parameters, which `phase.prepare` changes.

    The moments of the optimizer start afresh; what an evolving isolation knows goes on.
    """
    if start is not None:
        phase = phase._replace(prepare=unchanged)
        opt_state = with_fresh_inner(start.opt_state, phase.tx.init(start.params))
        start = start._replace(step=jnp.int32(stage.first_step), opt_state=opt_state)
    return job.train(
        phase,
        model=model,
        start=start,
        records=job.batches(tasks=list(stage.weights), weights=stage.weights),
        steps=stage.steps,
        stage=stage.name,
        first_step=stage.first_step,
    )


def in_order(order: Sequence[Sequence[str]], tasks: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups of tasks as given; none given: each task its own, in the order of the config.

    Raises: ValueError where a group names a task without training records, misses one or repeats one.
    """
    if not order:
        return [(task,) for task in tasks]
    named = [task for group in order for task in group]
    if unknown := sorted(set(named) - set(tasks)):
        raise ValueError(f"the order names {unknown}, which have no training records; there are {', '.join(tasks)}")
    if sorted(named) != sorted(tasks):
        missing, twice = sorted(set(tasks) - set(named)), sorted({t for t in named if named.count(t) > 1})
        raise ValueError(f"the order must name every task once: missing {missing}, repeated {twice}")
    return [tuple(group) for group in order]


def score_stage(job: "Job", stage: Stage, model: Model, params: Params) -> None:
    """A column of the run's task x time scores, after a stage that is not the last (the run itself does that one).

    One that is there already, of a run that was resumed, stays.
    """
    if not job.scores.has(stage.name):
        job.score(stage.name, model, params, step=stage.first_step + stage.steps, learned=stage.tasks)
