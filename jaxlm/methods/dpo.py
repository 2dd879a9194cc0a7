# SPDX-License-Identifier: Apache-2.0
"""DPO: answers that people chose gain on those they rejected, measured from where training began."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.kernels.cross_entropy import token_log_probs
from jaxlm.losses.preference import preference_terms
from jaxlm.methods.sft import Sft
from jaxlm.nn.config import Lora
from jaxlm.nn.decoder import Model
from jaxlm.train.feeding import to_devices
from jaxlm.train.options import AdamW
from jaxlm.train.phase import LossFn, Params, Phase

if TYPE_CHECKING:
    from jaxlm.train.job import Job


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo:
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) on records of two answers.

    The reference is the model that training starts from. Its log-probs are numbers in the batch, made from the run's
    first parameters as the batch comes: they are kept anyway, and have neither gradient nor optimizer state.

    Attributes:
      optimizer: AdamW's numbers and schedule.
      lora: adapters to train in place of the parameters.
      beta: > 0, strength of the pull to the reference.
      kind: "sigmoid", the paper's; "ipo": a margin of 1 / (2 beta) and no more (Azar et al. 2023, arXiv:2310.12036).
      smoothing: in [0, 0.5), share of labels taken to be the wrong way round (cDPO); for "sigmoid".
    """

    optimizer: AdamW = AdamW()
    lora: Lora | None = None
    beta: float = 0.1
    kind: Literal["sigmoid", "ipo"] = "sigmoid"
    smoothing: float = 0.0

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}: 0 forgets the reference, and the labels with it")
        if not 0 <= self.smoothing < 0.5:
            raise ValueError(f"smoothing must be in [0, 0.5), got {self.smoothing}: at a half the labels say nothing")
        if self.smoothing and self.kind == "ipo":
            raise ValueError(f"smoothing is of the sigmoid loss, ipo has none, got {self.smoothing}: set one of them")

    @classmethod
    def tiny(cls) -> "Dpo":
        """For the laws that every method obeys."""
        return cls(optimizer=AdamW(learning_rate=1e-2))

    @staticmethod
    def tiny_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Text as pairs: a row's first half is preferred to its second, whose tokens are turned round."""
        half = batch["tokens"].shape[1] // 2
        second = np.arange(2 * half) >= half
        return batch | {
            "tokens": np.where(second, 63 - batch["tokens"], batch["tokens"]),
            "positions": batch["positions"] % half,
            "segment_ids": np.where(second, 2, 1) * (batch["segment_ids"] > 0),
            "reference_log_probs": np.full_like(batch["loss_weights"], -4.0),
        }

    @property
    def sft(self) -> Sft:
        """The phase that this one differs from."""
        return Sft(optimizer=self.optimizer, lora=self.lora)

    def model(self, model: Model) -> Model:
        """The model that this method trains: with the adapters' scale when there are adapters."""
        return self.sft.model(model)

    def phase(self, model: Model, *, num_tasks: int, steps: int) -> Phase:
        """SFT's with another loss, for batches of pairs with `reference_log_probs`, as `referred` makes them."""
        phase = self.sft.phase(model, num_tasks=num_tasks, steps=steps)
        return phase._replace(loss_fn=_loss_fn(model, self.beta, self.kind, self.smoothing))

    def run(self, job: "Job"):
        """Trains on the job's pairs; returns the parameters, adapters merged."""
        model = self.model(job.model)
        phase = self.phase(model, num_tasks=len(job.task_names), steps=job.options.steps)
        phase = phase._replace(batches=functools.partial(referred, job.model, job.params, job.mesh))
        return self.sft.merged(job, model, phase, job.train(phase, model=model).params)


def referred(
    model: Model, params: Params, mesh: jax.sharding.Mesh, records: Any, params_fn: Callable[[], Params]
) -> Iterator[dict[str, Any]]:
    """Batches of pairs with what the reference gives each token: the column `reference_log_probs` [B, T].

    Raises: ValueError for a batch whose segments are no pairs.
    """
    for batch in records:
        _check_pairs(batch)
        names = ("tokens", "positions", "segment_ids")
        placed = {name: to_devices(mesh, batch[name]) for name in names}
        yield batch | {"reference_log_probs": _reference(model, params, placed)}


def answer_log_probs(model: Model, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    """log p of each token given those before it in its segment, [B, T] float32; of a row's first one meaningless."""
    hidden = model.apply(params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
    following = jnp.roll(batch["tokens"], -1, axis=1)
    head, softcap = model.head(params), model.config.logit_softcap
    return jnp.roll(token_log_probs(hidden, head, following, softcap=softcap, groups=model.row_groups), 1, axis=1)


_reference = jax.jit(answer_log_probs, static_argnums=0)


def _check_pairs(batch: dict[str, np.ndarray]) -> None:
    """Raises ValueError unless segments 2k + 1 and 2k + 2 of every row are of one record."""
    segments, records = batch["segment_ids"], batch["record_ids"]
    # Within a pair the record stays the same where the segment changes; between pairs it changes.
    goes_on = (segments[:, 1:] == segments[:, :-1] + 1) & (segments[:, 1:] > 1)
    same, second = records[:, 1:] == records[:, :-1], segments[:, 1:] % 2 == 0
    if np.any(segments.max(axis=1) % 2) or np.any(goes_on & second & ~same):
        raise ValueError(
            "a batch holds records that are no pairs of answers: every record to train on needs 'prompt', 'chosen' and "
            "'rejected'"
        )


@functools.lru_cache(maxsize=16)
def _loss_fn(model: Model, beta: float, kind: Literal["sigmoid", "ipo"], smoothing: float) -> LossFn:
    """One function for equal arguments, so that runs which differ in anything else share a compiled step."""

    def loss_fn(params, batch, rng):
        log_probs = answer_log_probs(model, params, batch)
        return preference_terms(log_probs, batch, beta=beta, kind=kind, smoothing=smoothing)

    return loss_fn
