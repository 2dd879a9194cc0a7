# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: the phase every other method differs from, with or without low-rank adapters."""

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import optax

from jaxlm.losses.next_token import next_token_terms
from jaxlm.nn.config import Lora
from jaxlm.nn.decoder import Model
from jaxlm.nn.lora import adapted, add_lora, merge_drift, merge_lora
from jaxlm.train.feeding import to_devices
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.options import AdamW
from jaxlm.train.phase import LossFn, Params, Phase
from jaxlm.transforms.frozen import freeze

if TYPE_CHECKING:  # a phase in someone else's loop needs neither the loop nor Orbax: 0.2 GiB
    from jaxlm.train.job import Job

ADAPTERS_ONLY = ((r".*/lora_[ab]", "trained"), (r".*", "frozen"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft:
    """Next-token loss on the tokens that carry weight, every task in every batch as the mixture says.

    Attributes:
      optimizer: AdamW's numbers and schedule.
      z_loss: >= 0, coefficient of log(Z)^2, which keeps the softmax normaliser near one
        (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
      lora: adapters to train in place of the parameters; they are merged when the run ends.
    """

    optimizer: AdamW = AdamW()
    z_loss: float = 0.0
    lora: Lora | None = None

    def model(self, model: Model) -> Model:
        """The model that this method trains: with the adapters' scale when there are adapters."""
        return model if self.lora is None else adapted(model, self.lora)

    def tx(self, steps: int, *, num_tasks: int = 0) -> optax.GradientTransformationExtraArgs:
        """The optimizer of a stage of `steps` updates, for `phase._replace(tx=...)`: its compiled step is the same."""
        tx = make_optimizer(self.optimizer, steps)
        return tx if self.lora is None else freeze(tx, ADAPTERS_ONLY)

    def phase(self, model: Model, *, num_tasks: int, steps: int) -> Phase:
        """SFT as a phase; other methods replace its slots.

        Args:
          model: what `self.model` returned.
          num_tasks: length of the per-task metrics.
          steps: updates that the learning-rate schedule spans.
        """

        loss_fn = _loss_fn(model, num_tasks, self.z_loss)
        if self.lora is None:
            return Phase(loss_fn, self.tx(steps))
        lora = self.lora
        return Phase(
            loss_fn,
            self.tx(steps),
            prepare=lambda params, rng: add_lora(params, lora, rng),
            finish=lambda params: merge_lora(params, lora.scale),
        )

    def run(self, job: "Job"):
        """Trains on the job's mixture; returns the parameters, adapters merged, and reports the merge's drift."""
        model = self.model(job.model)
        phase = self.phase(model, num_tasks=len(job.task_names), steps=job.options.steps)
        return self.merged(job, model, phase, job.train(phase, model=model).params)

    def merged(self, job: "Job", model: Model, phase: Phase, params: Params) -> Params:
        """The parameters after a run: as they are, or with the adapters merged and the merge's drift reported."""
        if self.lora is None:
            return params
        merged = jax.jit(phase.finish)(params)
        # A few tokens of every held-out row: enough to see a drift, and never all logits of a batch.
        tokens = next(iter(job.held_out()))["tokens"][:, :16]
        tokens = to_devices(job.mesh, tokens)
        drift = merge_drift(model, params, merged, tokens)
        job.reporter.event("merge", step=job.options.steps, logit_drift=float(drift))
        return merged


@functools.lru_cache(maxsize=16)
def _loss_fn(model: Model, num_tasks: int, z_loss: float) -> LossFn:
    """One function for equal arguments, so that runs which differ in anything else share a compiled step."""

    def loss_fn(params, batch, rng):
        hidden = model.apply(params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        return next_token_terms(
            hidden,
            model.head(params),
            batch,
            num_tasks=num_tasks,
            softcap=model.config.logit_softcap,
            z_loss=z_loss,
            groups=model.row_groups,
        )

    return loss_fn
