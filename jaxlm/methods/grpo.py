# SPDX-License-Identifier: Apache-2.0
"""GRPO: what the model samples is rewarded by a verifier, each sample against the others of its prompt."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.losses.policy import policy_terms, support_log_probs
from jaxlm.losses.term import Term
from jaxlm.methods.rollouts import Rollouts
from jaxlm.methods.sft import Sft
from jaxlm.nn.config import Lora
from jaxlm.nn.decoder import Model
from jaxlm.rewards.matching import ExactMatch
from jaxlm.train.options import AdamW
from jaxlm.train.phase import LossFn, Phase

if TYPE_CHECKING:
    from jaxlm.train.job import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo:
    """Group-relative policy optimization (Shao et al. 2024, arXiv:2402.03300) on prompts with a verifier.

    An update sees `run.batch_size` samples: `group_size` of each of `run.batch_size / group_size` prompts. Records
    stand one a row (`data.packing="none"`); the last answer of a record is left to the model, which samples it with the
    very parameters that are trained.

    Attributes:
      optimizer: AdamW's numbers and schedule.
      lora: adapters to train in place of the parameters.
      reward: `(text, record) -> float`, a verifier of `jaxlm.rewards` or any dataclass that is called so; of any size.
      group_size: samples of a prompt, >= 2.
      updates: made on one rollout, >= 1; only from the second on is a ratio other than 1.
      max_tokens: of a sample.
      temperature, top_p, top_k, min_p: how samples are drawn; the policy that is trained is the one over the tokens
        that could be drawn.
      normalize: "std" divides a group's advantages by its standard deviation, "none" leaves them, so that prompts which
        are nearly always or nearly never solved weigh no more (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).
      flat_groups: whose samples all have one reward: "drop" leaves them out of the denominator too (DAPO, arXiv:
        2503.14476, without drawing others for them). Where every group of a rollout is flat all stay: it teaches
        nothing either way.
      average: "tokens": all tokens of an update weigh the same (DAPO); "samples": all samples do (the paper).
      clip_low, clip_high: how far a ratio below and above 1 still pulls; DAPO sets the upper one higher.
      kl: >= 0, coefficient of the divergence from the parameters before training; 0: there is no reference.
    """

    optimizer: AdamW = AdamW()
    lora: Lora | None = None
    reward: Any = ExactMatch()
    group_size: int = 8
    updates: int = 1
    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    normalize: Literal["std", "none"] = "std"
    flat_groups: Literal["drop", "keep"] = "drop"
    average: Literal["tokens", "samples"] = "tokens"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.04
    whole_rows = "it samples with a cache"  # why the tokens of a row cannot lie on several devices

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(
                f"group_size must be at least 2, got {self.group_size}: one sample has none to compare with"
            )
        if self.updates < 1:
            raise ValueError(f"updates must be at least 1, got {self.updates}")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}: greedy samples of a group are equal"
            )
        if not (0 <= self.clip_low < 1 and self.clip_high >= 0 and self.kl >= 0):
            raise ValueError(
                f"need 0 <= clip_low < 1, clip_high >= 0 and kl >= 0, got {self.clip_low}, {self.clip_high}, {self.kl}"
            )
        if not callable(self.reward):
            raise ValueError(f"reward must be called with a text and its record, got {self.reward!r}")

    @classmethod
    def tiny(cls) -> "Grpo":
        """For the laws that every method obeys."""
        return cls(optimizer=AdamW(learning_rate=1e-3))

    @staticmethod
    def tiny_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Text as if it had been sampled: every second row was better than its group, the others worse."""
        sign = np.where(np.arange(len(batch["tokens"])) % 2, 1.0, -1.0)[:, None]
        shape = batch["loss_weights"].shape
        return batch | {
            "advantages": np.broadcast_to(sign, shape).astype(np.float32),
            "old_log_probs": np.full(shape, -4.2, np.float32),  # about log(1 / 64)
            "reference_log_probs": np.full(shape, -4.2, np.float32),
            "sample/reward": sign[:, 0].astype(np.float32),
        }

    def shrunk(self) -> "Grpo":
        """For two updates of eight samples."""
        return dataclasses.replace(self, group_size=4, max_tokens=8)

    @property
    def sft(self) -> Sft:
        """The phase that this one differs from."""
        return Sft(optimizer=self.optimizer, lora=self.lora)

    def model(self, model: Model) -> Model:
        """The model that this method trains: with the adapters' scale when there are adapters."""
        return self.sft.model(model)

    def phase(self, model: Model, *, num_tasks: int, steps: int) -> Phase:
        """SFT's with another loss, for batches as `Rollouts` makes them."""
        phase = self.sft.phase(model, num_tasks=num_tasks, steps=steps)
        return phase._replace(
            loss_fn=_loss_fn(model, num_tasks, self.temperature, self.clip_low, self.clip_high, self.kl)
        )

    def run(self, job: "Job"):
        """Trains on samples of the job's prompts; returns the parameters, adapters merged.

        Raises: ValueError for a batch that groups do not divide, several processes, or records that share a row.
        """
        rows, rest = divmod(job.options.batch_size, self.group_size)
        if rest:
            raise ValueError(
                f"batch_size {job.options.batch_size} is no multiple of group_size {self.group_size}: an update sees "
                "whole groups"
            )
        model = self.model(job.model)
        phase = self.phase(model, num_tasks=len(job.task_names), steps=job.options.steps)
        phase = phase._replace(batches=functools.partial(Rollouts, self, job, model))
        state = job.train(phase, model=model, records=job.batches(rows=rows))
        return self.sft.merged(job, model, phase, state.params)


@functools.lru_cache(maxsize=16)
def _loss_fn(model: Model, num_tasks: int, temperature: float, clip_low: float, clip_high: float, kl: float) -> LossFn:
    """One function for equal arguments, so that runs which differ in anything else share a compiled step."""

    def loss_fn(params, batch, rng):
        hidden = model.apply(params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        log_probs = support_log_probs(
            hidden,
            model.head(params),
            batch["tokens"],
            batch.get("kept"),
            temperature=temperature,
            softcap=model.config.logit_softcap,
        )
        terms = policy_terms(log_probs, batch, clip_low=clip_low, clip_high=clip_high, kl=kl)
        return terms | _by_task(batch, num_tasks)

    return loss_fn


def _by_task(batch: dict[str, jax.Array], num_tasks: int) -> dict[str, Term]:
    """Rewards of each task, [K]."""
    of_task = (batch["task_ids"][:, :1] == jnp.arange(num_tasks)[None]) & (batch["segment_ids"][:, :1] > 0)
    of_task = of_task.astype(jnp.float32)
    total = jnp.sum(of_task * batch["sample/reward"][:, None], axis=0)
    return {"reward_by_task": Term(total, jnp.sum(of_task, axis=0), coefficient=0.0)}
