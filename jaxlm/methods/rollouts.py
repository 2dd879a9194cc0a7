# SPDX-License-Identifier: Apache-2.0
"""Rollouts: prompts from records, samples from the parameters as they are now, rewards, advantages; as batches.

P prompts, G samples of each, B = P * G rows, T tokens.
"""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np

from jaxlm.data.prompts import Prompt, prompts_of
from jaxlm.data.stream import named_seed
from jaxlm.generate.engine import Completion, Sampling
from jaxlm.generate.sampler import Sampler
from jaxlm.losses.policy import kept_tokens, support_log_probs
from jaxlm.nn.decoder import Model
from jaxlm.rewards.verifier import InBatches
from jaxlm.train.mesh import rows
from jaxlm.train.phase import Params

if TYPE_CHECKING:
    from jaxlm.methods.grpo import Grpo
    from jaxlm.train.job import Job

Batch = dict[str, Any]  # of NumPy arrays


class Advantages(NamedTuple):
    """Of each sample, [P, G] float32: advantage, the standard deviation of its group, whether that is 0."""

    advantages: np.ndarray
    spread: np.ndarray
    flat: np.ndarray


def group_advantages(rewards_PG: np.ndarray, *, normalize: Literal["std", "none"]) -> Advantages:
    """Rewards against the mean of their group; "std": in units of its standard deviation.

    >>> group_advantages(np.array([[1.0, 0.0], [1.0, 1.0]]), normalize="std").advantages.tolist()
    [[1.0, -1.0], [0.0, 0.0]]
    """
    centred = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    spread = np.sqrt(np.mean(centred**2, axis=1, keepdims=True))
    flat = rewards_PG.max(axis=1, keepdims=True) == rewards_PG.min(axis=1, keepdims=True)
    advantages = np.where(flat, 0.0, centred / np.where(flat | (normalize == "none"), 1.0, spread))
    flat, spread = (np.broadcast_to(x, rewards_PG.shape) for x in (flat, np.where(flat, 0.0, spread)))
    return Advantages(advantages.astype(np.float32), spread.astype(np.float32), flat)


class Rollouts:
    """An endless iterator of batches [B, T], each rollout handed out `method.updates` times.

    A rollout depends on the run's seed, its number, its prompts and the parameters, and on nothing else; one that is
    half used is part of the state, because the parameters it came from are gone.

    Args:
      method: how to sample and to reward.
      job: its tokenizer, records, options and mesh; its parameters are the reference.
      model: that `params_fn` is for.
      records: batches of P rows, one record each, with `get_state` and `set_state`.
      params_fn: the parameters now.
    """

    def __init__(self, method: "Grpo", job: "Job", model: Model, records: Any, params_fn: Callable[[], Params]):
        if jax.process_count() > 1:
            raise ValueError("rollouts are sampled by one process: run it on the devices of one host")
        if job.tokenizer is None or job.record is None:
            raise ValueError("rollouts need the job's tokenizer and record: make the job by jaxlm.run")
        self._method, self._job, self._model = method, job, model
        self._records, self._params_fn = records, params_fn
        self._tokenizer, self._record = job.tokenizer(), job.record
        self._sampler: Sampler | None = None
        self._batch: Batch = {}
        self._left = self._rollouts = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        fresh = self._left == 0
        if fresh:
            self._batch = self._rollout(next(self._records))
            self._left = self._method.updates
            self._rollouts += 1
        self._left -= 1
        if fresh:
            return self._batch
        return self._batch | {"sample/tokens_sampled": np.zeros_like(self._batch["sample/tokens_sampled"])}

    def get_state(self) -> dict[str, Any]:
        """Where the records stand, and the rollout that is in use; json-able."""
        return {
            "records": self._records.get_state(),
            "rollouts": self._rollouts,
            "left": self._left,
            "batch": _packed(self._batch) if self._left else {},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `get_state` was called."""
        self._records.set_state(state["records"])
        self._rollouts, self._left = int(state["rollouts"]), int(state["left"])
        self._batch = _unpacked(state["batch"])

    def _rollout(self, rows_PT: Batch) -> Batch:
        method, T = self._method, rows_PT["tokens"].shape[1]
        prompts = [self._prompt(rows_PT, row) for row in range(len(rows_PT["tokens"]))]
        if self._sampler is None:
            # A slot for every sample: all begin together. Activations lie where the parameters put them.
            model, slots = Model(self._model.config), len(prompts) * method.group_size
            self._sampler = Sampler(model, self._params_fn(), self._tokenizer, slots=slots, size=T)
        self._sampler.params = params = self._params_fn()
        sampling = Sampling(
            num_samples=method.group_size,
            max_tokens=method.max_tokens,
            temperature=method.temperature,
            top_p=method.top_p,
            top_k=method.top_k,
            min_p=method.min_p,
            seed=named_seed(self._job.options.seed, f"rollout/{self._rollouts}"),
        )
        samples = self._sampler.sample([prompt.tokens.tolist() for prompt in prompts], sampling)
        rewards = self._rewards(prompts, samples)
        batch = assemble(prompts, samples, rewards, T, method=method)
        placed = {name: jax.device_put(x, rows(self._job.mesh)) for name, x in batch.items() if x.ndim == 2}
        if method.top_p < 1 or method.top_k is not None or method.min_p > 0:
            batch["kept"] = np.asarray(_kept(self._model, method.temperature, params, placed))
            placed["kept"] = jax.device_put(batch["kept"], rows(self._job.mesh))
        if method.kl:
            model = self._job.model
            batch["reference_log_probs"] = np.asarray(_reference(model, method.temperature, self._job.params, placed))
        return batch

    def _prompt(self, rows_PT: Batch, row: int) -> Prompt:
        """What stands before the last answer of a row."""
        method, T = self._method, rows_PT["tokens"].shape[1]
        if rows_PT["segment_ids"][row].max() > 1:
            raise ValueError('a row holds several records, and rollouts want one prompt each: set data.packing="none"')
        (prompt,) = prompts_of({name: column[row] for name, column in rows_PT.items()})
        begin = len(prompt.tokens)
        if begin + method.max_tokens > T:
            raise ValueError(
                f"{self._job.describe(prompt.task_id, prompt.record_id)}: a prompt of {begin} tokens and max_tokens "
                f"{method.max_tokens} do not fit a row of {T}: set data.length or method.max_tokens; a text without a "
                "prompt cannot be sampled"
            )
        return prompt

    def _rewards(self, prompts: Sequence[Prompt], samples: Sequence[Sequence[Completion]]) -> np.ndarray:
        """[P, G], of the method's verifier."""
        reward = self._method.reward
        texts = [completion.text for group in samples for completion in group]
        asked = [self._record(prompt.task_id, prompt.record_id) for prompt in prompts]
        records = [record for record, group in zip(asked, samples, strict=True) for _ in group]
        if isinstance(reward, InBatches):
            found = np.asarray(reward.many(texts, records), np.float64)
        else:
            found = np.array([reward(*pair) for pair in zip(texts, records, strict=True)], np.float64)
        found = found.reshape(len(prompts), -1)
        for prompt, group in zip(prompts, found, strict=True):
            if not np.all(np.isfinite(group)):
                place = self._job.describe(prompt.task_id, prompt.record_id)
                raise ValueError(f"{place}: rewards must be finite, got {group.tolist()} from {reward!r}")
        return found


def assemble(
    prompts: Sequence[Prompt],
    samples: Sequence[Sequence[Completion]],
    rewards_PG: np.ndarray,
    T: int,
    *,
    method: "Grpo",
) -> Batch:
    """Samples and their rewards as a batch of one sample a row; what `policy_terms` reads, and what is reported.

    Returns: [B, T] the six columns of any batch, `advantages`, `old_log_probs`; [B] "sample/<name>", metrics.
    """
    B = rewards_PG.size
    integers = ("tokens", "positions", "segment_ids", "task_ids")
    batch = {name: np.zeros((B, T), np.int32) for name in integers} | {"record_ids": np.full((B, T), -1, np.int32)}
    batch |= {name: np.zeros((B, T), np.float32) for name in ("loss_weights", "advantages", "old_log_probs")}
    found = group_advantages(rewards_PG, normalize=method.normalize)
    drop = found.flat if method.flat_groups == "drop" and not found.flat.all() else np.zeros_like(found.flat)
    lengths = np.zeros(B, np.float32)
    pairs = [(p, c) for p, group in zip(prompts, samples, strict=True) for c in group]
    for row, (prompt, completion) in enumerate(pairs):
        begin, count = len(prompt.tokens), len(completion.tokens)
        end = begin + count
        lengths[row] = count
        batch["tokens"][row, :end] = np.concatenate([prompt.tokens, completion.tokens])
        batch["positions"][row, :end] = np.arange(end)
        batch["segment_ids"][row, :end] = 1
        batch["task_ids"][row] = prompt.task_id
        batch["record_ids"][row, :end] = prompt.record_id
        batch["old_log_probs"][row, begin:end] = completion.log_probs
        batch["advantages"][row, begin:end] = found.advantages.flat[row]
        weight = 1.0 if method.average == "tokens" else 1.0 / count
        batch["loss_weights"][row, begin:end] = 0.0 if drop.flat[row] else weight
    told = {
        "reward": rewards_PG.ravel(),
        "reward_std": np.full(B, rewards_PG.std()),
        "group_spread": found.spread.ravel(),
        "flat_groups": found.flat.ravel(),
        "completion_length": lengths,
        "cut_off": [completion.finish_reason == "length" for _, completion in pairs],
        "tokens_sampled": np.full(B, lengths.sum()),
    }
    return batch | {f"sample/{name}": np.asarray(x, np.float32) for name, x in told.items()}


@partial(jax.jit, static_argnums=(0, 1))
def _kept(model: Model, temperature: float, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    """The tokens that could be drawn, as bits [B, T, W]."""
    return _on_support(kept_tokens, model, temperature, params, batch, batch["old_log_probs"])


@partial(jax.jit, static_argnums=(0, 1))
def _reference(model: Model, temperature: float, params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    """log-probs [B, T] under the reference, over the tokens that could be drawn."""
    return _on_support(support_log_probs, model, temperature, params, batch, batch.get("kept"))


def _on_support(function: Callable, model: Model, temperature: float, params: Params, batch: Any, more: Any) -> Any:
    hidden = model.apply(params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
    options = {"temperature": temperature, "softcap": model.config.logit_softcap}
    return function(hidden, model.head(params), batch["tokens"], more, **options)


def _packed(batch: Batch) -> dict[str, Any]:
    return {
        name: [x.dtype.str, list(x.shape), base64.b64encode(np.ascontiguousarray(x).tobytes()).decode()]
        for name, x in batch.items()
    }


def _unpacked(packed: Mapping[str, Any]) -> Batch:
    return {
        name: np.frombuffer(base64.b64decode(data), np.dtype(dtype)).reshape(shape)
        for name, (dtype, shape, data) in packed.items()
    }
