# SPDX-License-Identifier: Apache-2.0
"""Held-out scores under teacher forcing: every record's or every token's, and the metrics they come to.

B rows, T tokens, S segments of a row, Q records; W windows of L tokens.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.kernels.cross_entropy import weighted_nll
from jaxlm.losses.next_token import score_tokens, target_weights
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import Model
from jaxlm.train.feeding import to_devices
from jaxlm.train.mesh import replicated, row_devices, rows
from jaxlm.train.phase import Batch, Params


class Items(NamedTuple):
    """What a model said to every held-out record, sorted by task and record. All are [Q].

    Attributes:
      task_ids, record_ids: int64; who it is. A record cut into pieces has an entry a piece; record -1: not told.
      nll: float64, nats, `sum w * -log p(token | before)` over the record's tokens.
      tokens: float64, `sum w`: how many tokens are answered for, where weights are 0 or 1.
      correct: float64, `sum w` over those that are the argmax; equal to `tokens` where all of them are.
    """

    task_ids: np.ndarray
    record_ids: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray


def score_items(
    model: Model, params: Params, batches: Iterable[Mapping[str, Any]], mesh: jax.sharding.Mesh | None = None
) -> Items:
    """Scores every record that has a weighted token, given the right tokens before each.

    Args:
      model, params: any sharding.
      batches: each with `tokens`, `loss_weights`, `positions`, `segment_ids`, `task_ids` and, where records are to be
        told apart, `record_ids`, all [B, T] and of one shape, so that one program is compiled. Rows of padding have
        weight 0. A record is a segment of a row; one cut into pieces is several.
      mesh: of the devices; batches are this process's rows. None: the default device.
    Returns: `Items`, the same and whole on every process.
    """
    found: list[Items] = []
    waiting = None
    for batch in batches:
        arrays: Any = {"record_ids": np.full_like(batch["task_ids"], -1)} | dict(batch)
        if mesh is not None:
            arrays = {name: to_devices(mesh, x) for name, x in arrays.items()}
        scored = _score(model, mesh, params, arrays)
        # The numbers of the batch before are fetched while this one is computed.
        found += [] if waiting is None else [_with_weight(*waiting)]
        waiting = scored
    found += [] if waiting is None else [_with_weight(*waiting)]
    empty = _with_weight(np.zeros((3, 0)), np.zeros((2, 0), np.int64))
    items = Items(*(np.concatenate(parts) for parts in zip(empty, *found, strict=True)))
    order = np.lexsort((items.record_ids, items.task_ids))  # stable: equal records stay in the order of the batches
    return Items(*(values[order] for values in items))


def evaluate(
    model: Model,
    params: Params,
    batches: Iterable[Mapping[str, Any]],
    task_names: Sequence[str],
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float]:
    """Loss, perplexity and exact match of every task: `item_metrics` of `score_items`.

    Args:
      model, params, batches, mesh: as in `score_items`.
      task_names: index = task id.
    Raises: ValueError if no task has a weighted token.
    """
    return item_metrics(score_items(model, params, batches, mesh), task_names)


def item_metrics(items: Items, task_names: Sequence[str]) -> dict[str, float]:
    """What scored records come to.

        loss/<task> = sum w * -log p(token | before) / sum w        over the task's records, nats a token
        perplexity/<task> = exp(loss/<task>)
        exact_match/<task> = share of records whose every weighted token is the argmax, given the right tokens before it
        loss = the same over all records together

    Returns: the metrics; a task without a weighted token is left out.
    Raises: ValueError if no task has one.
    """
    if not items.tokens.any():
        raise ValueError(f"no held-out row of {', '.join(task_names)} has a token with a weight: nothing to evaluate")
    metrics = {"loss": float(items.nll.sum() / items.tokens.sum())}
    for index, name in enumerate(task_names):
        mine = items.task_ids == index
        if mine.any():
            loss = float(items.nll[mine].sum() / items.tokens[mine].sum())
            metrics[f"loss/{name}"] = loss
            metrics[f"perplexity/{name}"] = float(np.exp(loss))
            metrics[f"exact_match/{name}"] = float(np.mean(items.correct[mine] == items.tokens[mine]))
    return metrics


LONG = 4096  # tokens of a row above which blocks of scores would take gigabytes


def suited(config: ModelConfig, length: int) -> ModelConfig:
    """The config whose attention reads rows of `length` tokens in memory linear in it: tile by tile above `LONG`."""
    return dataclasses.replace(config, attention="tiled") if length > LONG and config.attention == "auto" else config


def score_windows(
    model: Model,
    params: Params,
    inputs: np.ndarray,
    targets: np.ndarray,
    mesh: jax.sharding.Mesh | None = None,
    *,
    tokens_at_once: int = LONG,
) -> np.ndarray:
    """-log p(target | inputs of the window up to it), nats, [W, L] float32.

        perplexity = exp(mean of all);  of the last t predictions of each window: exp(mean of [:, -t:])

    Args:
      model, params: any sharding.
      inputs, targets: int32 [W, L], of `jaxlm.data.windows_of`, whole on every process.
      mesh: of the devices; None: the default device.
      tokens_at_once: of a batch, at least one window a device.
    """
    W, L = inputs.shape
    num_devices = 1 if mesh is None else row_devices(mesh)
    size = max(num_devices, min(W, tokens_at_once // L) // num_devices * num_devices)
    place = (lambda x: x) if mesh is None else functools.partial(jax.device_put, device=rows(mesh))
    found = []
    for start in range(0, W, size):
        pair = [x[start : start + size] for x in (inputs, targets)]
        pair = [np.pad(x, ((0, size - len(x)), (0, 0)), mode="edge") for x in pair]
        found.append(np.asarray(_score_windows(model, mesh, params, *map(place, pair))))
    return np.concatenate(found)[:W]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score_windows(
    model: Model, mesh: jax.sharding.Mesh | None, params: Params, inputs_BT: jax.Array, targets_BT: jax.Array
) -> jax.Array:
    """[B, T] float32, whole on every device."""
    hidden_BTD = model.apply(params, inputs_BT)
    scores = weighted_nll(
        hidden_BTD,
        model.head(params),
        targets_BT,
        jnp.ones(targets_BT.shape),
        softcap=model.config.logit_softcap,
        groups=model.row_groups,
    )
    nll_BT = -scores.log_probs_BT
    return nll_BT if mesh is None else jax.lax.with_sharding_constraint(nll_BT, replicated(mesh))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(model: Model, mesh: jax.sharding.Mesh | None, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """[3, B, S] float32: nll, weight, missed weight; [2, B, S] int32: task, record. Whole on every device."""
    tokens_BT, segment_ids_BT = batch["tokens"], batch["segment_ids"]
    hidden_BTD = model.apply(params, tokens_BT, positions=batch["positions"], segment_ids=segment_ids_BT)
    weights_BT = target_weights(batch["loss_weights"], segment_ids_BT)
    options = {"softcap": model.config.logit_softcap, "groups": model.row_groups}
    scores = score_tokens(hidden_BTD, model.head(params), tokens_BT, weights_BT, **options)
    num_segments = tokens_BT.shape[1] + 1  # segment ids of a row lie in [0, T]

    def summed(values_T: jax.Array, segment_ids_T: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values_T, segment_ids_T, num_segments=num_segments)

    def largest(values_T: jax.Array, segment_ids_T: jax.Array) -> jax.Array:
        return jax.ops.segment_max(values_T, segment_ids_T, num_segments=num_segments)

    sums = [-weights_BT * scores.log_probs_BT, weights_BT, jnp.where(scores.correct_BT, 0.0, weights_BT)]
    counted_BT = weights_BT > 0
    names = [jnp.where(counted_BT, batch[name], -1) for name in ("task_ids", "record_ids")]
    both = (
        jnp.stack([jax.vmap(summed)(x_BT, segment_ids_BT) for x_BT in sums]),
        jnp.stack([jax.vmap(largest)(x_BT, segment_ids_BT) for x_BT in names]),
    )
    return both if mesh is None else jax.lax.with_sharding_constraint(both, replicated(mesh))


def _with_weight(sums: Any, names: Any) -> Items:
    """The segments that have a weighted token."""
    sums, names = np.asarray(sums, np.float64), np.asarray(names, np.int64)
    some = sums[1] > 0
    nll, tokens, missed = sums[:, some]
    task_ids, record_ids = names[:, some]
    return Items(task_ids, record_ids, nll, tokens, tokens - missed)
