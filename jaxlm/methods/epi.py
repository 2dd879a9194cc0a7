# SPDX-License-Identifier: Apache-2.0
"""EPI: SFT whose most important entries are held, chosen anew as importance moves."""

import dataclasses
from typing import TYPE_CHECKING, Literal

import jax.numpy as jnp
import optax

from jaxlm.methods.sft import Sft
from jaxlm.nn.decoder import Model
from jaxlm.train.phase import Phase
from jaxlm.transforms.evolving import evolving_isolation

if TYPE_CHECKING:
    from jaxlm.train.job import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epi:
    """Evolving parameter isolation (arXiv:2604.14010): one slot of SFT, the optimizer, wrapped.

    Attributes:
      sft: what is learnt and by which optimizer.
      per_task: one average of squared gradients a task, ranked by the largest; an update counts for the task that has
        most loss weight in its batch, so let stages or batches hold one task each. It guards tasks that are no
        longer trained, which one average forgets within about `1 / (1 - decay)` updates.
      the others: see `jaxlm.transforms.evolving_isolation`.
    """

    sft: Sft = Sft()
    fraction: float = 0.01  # share of all eligible entries, [0, 1)
    refresh_every: int | None = 100  # updates between two choices; None: one choice, after the warm-up
    decay: float = 0.99  # of the average of squared gradients, [0, 1)
    warmup: int = 100  # updates before the first choice
    normalizer: Literal["mean", "max", "minmax", "zscore", "tanh_z", "none"] = "mean"
    layer: Literal["leaf", "block"] = "leaf"  # what a layer is to the normalizer
    scope: Literal["global", "layer"] = "global"  # one cut for all, or one a layer
    importance_source: Literal["gradient", "adam_nu"] = "gradient"
    importance_dtype: Literal["float32", "bfloat16"] = "float32"
    per_task: bool = False
    release_fraction: float | None = None  # a held entry leaves only below this share
    select: Literal["top", "bottom", "random"] = "top"  # controls
    exclude: tuple[str, ...] = ()  # paths never held; full matches
    apply: bool = True  # False: choose and report, hold nothing
    moments: Literal["dense", "selected"] = "dense"
    seed: int | None = None  # of random choices and roundings; None: the run's

    @classmethod
    def tiny(cls) -> "Epi":
        """For the laws that every method obeys: the set changes several times in a few updates."""
        return cls(fraction=0.2, refresh_every=2, warmup=2, decay=0.5)

    def shrunk(self) -> "Epi":
        """For two updates."""
        return dataclasses.replace(self, refresh_every=1, warmup=1)

    def seeded(self, seed: int) -> "Epi":
        """With the run's seed where there is anything to draw; elsewhere runs of all seeds share a compiled step."""
        draws = self.select == "random" or self.importance_dtype == "bfloat16"
        return dataclasses.replace(self, seed=seed) if draws and self.seed is None else self

    def model(self, model: Model) -> Model:
        """The model itself: EPI adds no module."""
        return self.sft.model(model)

    def tx(self, steps: int, *, num_tasks: int) -> optax.GradientTransformationExtraArgs:
        """The optimizer of a stage of `steps` updates."""
        if self.sft.lora is not None:
            raise ValueError("EPI holds entries of the model's own parameters, lora trains adapters: take one of them")
        inner = self.sft.tx(steps)
        return evolving_isolation(
            inner,
            fraction=self.fraction,
            refresh_every=self.refresh_every,
            decay=self.decay,
            warmup=self.warmup,
            normalizer=self.normalizer,
            layer=self.layer,
            scope=self.scope,
            importance_source=self.importance_source,
            importance_dtype=self.importance_dtype,
            tasks=num_tasks if self.per_task else None,
            release_fraction=self.release_fraction,
            select=self.select,
            exclude=self.exclude,
            apply=self.apply,
            moments=self.moments,
            seed=self.seed or 0,
        )

    def phase(self, model: Model, *, num_tasks: int, steps: int) -> Phase:
        """The phase of SFT with its optimizer wrapped."""
        phase = self.sft.phase(model, num_tasks=num_tasks, steps=steps)
        phase = phase._replace(tx=self.tx(steps, num_tasks=num_tasks))
        if not self.per_task:
            return phase

        def whose(batch):
            of_task = [jnp.sum(jnp.where(batch["task_ids"] == i, batch["loss_weights"], 0)) for i in range(num_tasks)]
            return {"task": jnp.argmax(jnp.stack(of_task))}

        return phase._replace(extra=whose)

    def run(self, job: "Job"):
        """Trains on the job's mixture; the parameters need no post-processing."""
        model, seeded = self.model(job.model), self.seeded(job.options.seed)
        phase = seeded.phase(model, num_tasks=len(job.task_names), steps=job.options.steps)
        return job.train(phase, model=model).params
