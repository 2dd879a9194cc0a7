# SPDX-License-Identifier: Apache-2.0
"""Held-out metrics under teacher forcing, summed on the devices batch by batch.

B rows, T tokens, K tasks, S segments of a batch.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.losses.next_token import score_tokens, target_weights
from jaxlm.nn.decoder import Model
from jaxlm.train.mesh import replicated, rows
from jaxlm.train.phase import Batch, Params

_ON_HOST = "record_ids"  # names records for people; never sent to a device


def evaluate(
    model: Model,
    params: Params,
    batches: Iterable[Mapping[str, Any]],
    task_names: Sequence[str],
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float]:
    """Loss, perplexity and exact match of every task.

        loss/<task> = sum w * -log p(token | before) / sum w        over the task's rows, nats a token
        perplexity/<task> = exp(loss/<task>)
        exact_match/<task> = share of records whose every weighted token is the argmax, given the right tokens before it
        loss = the same over all rows together

    Args:
      model, params: any sharding.
      batches: each with `tokens`, `loss_weights`, `positions`, `segment_ids`, `task_ids`, all [B, T], and one shape,
        so that one program is compiled. Rows of padding have weight 0. A record is a segment of a row.
      task_names: index = task id.
      mesh: of the devices; batches are this process's rows. None: the default device.
    Returns: the metrics; a task without a weighted token is left out.
    Raises: ValueError if no task has one.
    """
    sums = np.zeros((4, len(task_names)))
    waiting = None
    for batch in batches:
        arrays: Any = {name: value for name, value in batch.items() if name != _ON_HOST}
        if mesh is not None:
            sharding = rows(mesh)
            arrays = {name: jax.make_array_from_process_local_data(sharding, x) for name, x in arrays.items()}
        added = _sums(model, len(task_names), mesh, params, arrays)
        # The numbers of the batch before are fetched while this one is computed.
        sums += 0 if waiting is None else np.asarray(waiting, np.float64)
        waiting = added
    sums += 0 if waiting is None else np.asarray(waiting, np.float64)
    nll, weight, exact, records = sums
    if not weight.any():
        raise ValueError(f"no held-out row of {', '.join(task_names)} has a token with a weight: nothing to evaluate")
    metrics = {"loss": float(nll.sum() / weight.sum())}
    for index, name in enumerate(task_names):
        if weight[index] > 0:
            loss = float(nll[index] / weight[index])
            metrics[f"loss/{name}"] = loss
            metrics[f"perplexity/{name}"] = float(np.exp(loss))
            metrics[f"exact_match/{name}"] = float(exact[index] / records[index])
    return metrics


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(model: Model, num_tasks: int, mesh: jax.sharding.Mesh | None, params: Params, batch: Batch) -> jax.Array:
    """[4, K] float32: negative log-likelihood, weight, records all right, records. Whole on every device."""
    tokens_BT, segment_ids_BT = batch["tokens"], batch["segment_ids"]
    hidden_BTD = model.apply(params, tokens_BT, positions=batch["positions"], segment_ids=segment_ids_BT)
    weights_BT = target_weights(batch["loss_weights"], segment_ids_BT)
    options = {"softcap": model.config.logit_softcap, "groups": model.row_groups}
    scores = score_tokens(hidden_BTD, model.head(params), tokens_BT, weights_BT, **options)
    counted_BT = weights_BT > 0
    missed_BT = counted_BT & ~scores.correct_BT

    def by_task(values, task_ids):
        return jax.ops.segment_sum(values.ravel(), task_ids.ravel(), num_segments=num_tasks)

    # Segment ids of a row lie in [0, T]: one number for each segment of the batch.
    num_rows, width = tokens_BT.shape[0], tokens_BT.shape[1] + 1
    keys_BT = segment_ids_BT + width * jnp.arange(num_rows, dtype=segment_ids_BT.dtype)[:, None]
    of_segment = functools.partial(jax.ops.segment_max, segment_ids=keys_BT.ravel(), num_segments=num_rows * width)
    counted_S = of_segment(counted_BT.ravel().astype(jnp.int32)) > 0
    missed_S = of_segment(missed_BT.ravel().astype(jnp.int32)) > 0
    task_ids_S = jnp.maximum(of_segment(jnp.where(counted_BT, batch["task_ids"], 0).ravel()), 0)
    sums = jnp.stack(
        [
            by_task(-weights_BT * scores.log_probs_BT, batch["task_ids"]),
            by_task(weights_BT, batch["task_ids"]),
            by_task((counted_S & ~missed_S).astype(jnp.float32), task_ids_S),
            by_task(counted_S.astype(jnp.float32), task_ids_S),
        ]
    )
    return sums if mesh is None else jax.lax.with_sharding_constraint(sums, replicated(mesh))
